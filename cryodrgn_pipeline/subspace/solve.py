"""K maps from their normal equations: conjugate gradients on the exact operator, inside a soft mask.

The sums of `NormalEquations`, freed from the window of trilinear splatting, are the transform of a Toeplitz
operator: padding to 2 D makes its action on D³ voxels a product in Fourier space.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cryodrgn_pipeline.fourier.sizes import PADDING, half_grid_points
from cryodrgn_pipeline.fourier.slices import gridding_window, volume_grid
from cryodrgn_pipeline.reconstruct import grid_shells
from cryodrgn_pipeline.subspace.sums import compiled, grid_columns, pack, unpack

FFTS_AT_ONCE = 4
MATRIX_BYTES = 2**28
BEYOND = 1e3  # times the strongest prior, where |k| > D/2 and no image says anything


class Lattice:
    """Padded Fourier lattice of D³ maps: shells, windows, transforms, and the mask that maps live in.

    Sums and transforms lie on `device`; maps, masks and what is said about shells on the CPU.
    """

    def __init__(self, box_size_px: int, *, device: torch.device | str = "cpu") -> None:
        d = box_size_px
        self.device = torch.device(device)
        self.box_size_px, self.size = d, PADDING * d
        self.shape = (self.size, self.size, self.size // 2 + 1)
        radius = grid_shells(self.size, device=device)
        self.shell = radius.round().long().clamp(max=d // 2).flatten()
        self.inside = (radius <= d / 2).flatten()
        unpadded = grid_shells(d, 1, device=device)
        self.unpadded_shell = unpadded.round().long().clamp(max=d // 2).flatten()
        self.unpadded_inside = (unpadded <= d / 2).flatten()
        self.mask = torch.ones(d, d, d)
        wrapped = torch.fft.fftfreq(self.size, device=device)
        axis = 1 / torch.sinc(wrapped) ** 2
        self._window = axis[:, None, None] * axis[None, :, None] * axis[None, None, :]
        k = torch.arange(self.size, device=device)
        parity = 1.0 - 2.0 * (k % 2)
        self._centre = parity[:, None, None] * parity[None, :, None] * parity[: self.size // 2 + 1]
        self._apodisation = gridding_window(d, device=device)

    @property
    def mask_fraction(self) -> float:
        """Σ mask² over the voxels of the padded box: the share of a transform's power that a map may have."""
        return float(self.mask.square().sum()) / self.size**3

    def spectra(self, maps: Tensor) -> Tensor:
        """Transforms `(K, E, E, E/2+1)` of `(K, D, D, D)` maps, origin at index 0."""
        result: Tensor = torch.fft.rfftn(maps, s=(self.size,) * 3, dim=(-3, -2, -1))
        return result

    def adjoint(self, spectra: Tensor) -> Tensor:
        """The adjoint of `spectra`, counted over all frequencies: `(K, D, D, D)`."""
        d = self.box_size_px  # axis by axis, and what lies in the padding is dropped at once: half the time
        planes = torch.fft.ifft(spectra, dim=-3, norm="forward")[:, :d]
        lines = torch.fft.ifft(planes, dim=-2, norm="forward")[:, :, :d]
        rows: Tensor = torch.fft.irfft(lines, n=self.size, dim=-1, norm="forward")
        return rows[..., :d]

    def columns(self, maps: Tensor) -> Tensor:
        """The maps as `inner_products` reads them: `(G, 2K)` float32."""
        return grid_columns(torch.stack([volume_grid(one) for one in maps.to(self.device)]))

    def right_hand_side(self, sums: Tensor) -> Tensor:
        """What splatted Σ w c a y `(K, E, E, E/2+1)` says about the voxels, `(K, D, D, D)`."""
        d, edge = self.box_size_px, (self.size - self.box_size_px) // 2
        padded: Tensor = torch.fft.irfftn(
            sums * self._centre, s=(self.size,) * 3, dim=(-3, -2, -1), norm="forward"
        )
        inner = slice(edge, edge + d)
        return padded[:, inner, inner, inner] / self._apodisation

    def toeplitz(self, normal: Tensor) -> Tensor:
        """Packed splatted weights `(G, P)`, freed from the window of splatting: the exact operator."""
        operator = torch.empty_like(normal)
        for part, kernels in self._kernels(normal):
            operator[:, part] = self._spectra_of(kernels * self._window)
        return operator

    def smoothed(self, normal: Tensor) -> Tensor:
        """Packed splatted weights `(G, P)`, averaged over what the mask's transform cannot tell apart.

        A grid point that no image touched is still known from its neighbours.
        """
        result, overlap = torch.empty_like(normal), self._overlap()
        for part, kernels in self._kernels(normal):
            result[:, part] = self._spectra_of(kernels * overlap)
        return result

    def blocks(self, normal: Tensor, *, exact: bool) -> Tensor:
        """The operator's diagonal blocks `(H, P)` on the grid of the unpadded box, as `smoothed`.

        Parameters
        ----------
        normal
            `(G, P)`, or `(H, P)` as splatted on the unpadded grid.
        exact
            Make `normal`, `(G, P)`, the exact operator in the same pass.
        """
        d, axes = self.box_size_px, (-3, -2, -1)
        if len(normal) < half_grid_points(self.size):
            return self._unpadded_blocks(normal)
        diagonal, overlap = normal.new_empty(half_grid_points(d), normal.shape[1]), self._overlap()
        for part, kernels in self._kernels(normal):
            if exact:
                normal[:, part] = self._spectra_of(kernels * self._window)
            # every second frequency of the padded box: the transform of its halves laid on each other
            folded = kernels * overlap
            for axis in axes:
                folded = folded.narrow(axis, 0, d) + folded.narrow(axis, d, d)
            diagonal[:, part] = self._spectra_of(folded)
        return diagonal

    def _unpadded_blocks(self, normal: Tensor) -> Tensor:
        d, axes = self.box_size_px, (-3, -2, -1)
        mask = self.mask.to(self.device)
        overlap = torch.fft.irfftn(torch.fft.rfftn(mask).abs().square(), s=(d,) * 3)
        # the same weights lie on an eighth of the points
        overlap = overlap / overlap[0, 0, 0] / PADDING**3
        diagonal = torch.empty_like(normal)
        for part in torch.split(torch.arange(normal.shape[1]), FFTS_AT_ONCE):
            weights = normal[:, part].T.reshape(-1, d, d, d // 2 + 1).to(torch.complex64)
            diagonal[:, part] = self._spectra_of(torch.fft.irfftn(weights, s=(d,) * 3, dim=axes) * overlap)
        return diagonal

    def _overlap(self) -> Tensor:
        """The autocorrelation of the mask, 1 at the origin: `(E, E, E)`."""
        power = self.spectra(self.mask[None].to(self.device))[0].abs().square()
        overlap: Tensor = torch.fft.irfftn(power, s=(self.size,) * 3)
        return overlap / overlap[0, 0, 0]

    def _kernels(self, normal: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Some columns of packed weights at a time, and their transforms `(F, E, E, E)`."""
        for part in torch.split(torch.arange(normal.shape[1]), FFTS_AT_ONCE):
            weights = normal[:, part].T.reshape(-1, *self.shape).to(torch.complex64)
            yield part, torch.fft.irfftn(weights, s=(self.size,) * 3, dim=(-3, -2, -1))

    @staticmethod
    def _spectra_of(kernels: Tensor) -> Tensor:
        result: Tensor = torch.fft.rfftn(kernels, dim=(-3, -2, -1)).real.flatten(1).T
        return result

    def shell_power(self, maps: Tensor) -> Tensor:
        """Mean |F|² per shell 0 … D/2 of `(K, D, D, D)` maps, `(K, D/2+1)` float64."""
        shells = self.box_size_px // 2 + 1
        power = self.spectra(maps.to(self.device)).abs().square().flatten(1)[:, self.inside].double()
        shell = self.shell[self.inside]
        counts = torch.bincount(shell, minlength=shells)
        sums = torch.zeros(len(maps), shells, dtype=torch.float64, device=self.device)
        return (sums.index_add_(1, shell, power) / counts).cpu()

    def mean_weight(self, weight: Tensor) -> Tensor:
        """Mean of a `(G,)` weight per shell 0 … D/2, `(D/2+1,)` float64; of `(H,)` as if it were padded."""
        padded = len(weight) == half_grid_points(self.size)
        shell, inside = self.shell, self.inside
        if not padded:
            shell, inside, weight = self.unpadded_shell, self.unpadded_inside, weight / PADDING**3
        shells, shell = self.box_size_px // 2 + 1, shell[inside]
        sums = torch.zeros(shells, dtype=torch.float64, device=weight.device)
        sums.index_add_(0, shell, weight[inside].double())
        return (sums / torch.bincount(shell, minlength=shells)).cpu()


def solve(
    lattice: Lattice,
    back: Tensor,
    normal: Tensor,
    prior: Tensor,
    *,
    start: Tensor | None = None,
    iterations: int = 4,
    kernel: str = "auto",
) -> Tensor:
    """Maps that minimise Σ w |y − c Σⱼ aⱼ S Vⱼ|² + Σ |F V|² / prior within the mask.

    Parameters
    ----------
    back, normal
        `(K, D, D, D)` and `(G or H, K(K+1)/2)` from `NormalEquations.complete`; with iterations `normal` is
        overwritten.
    prior
        `(K, D/2+1)` expected power |F|² per coefficient of each map's padded transform.
    start
        `(K, D, D, D)` maps to go on from; without them the preconditioner makes the start.
    iterations
        Conjugate gradient steps; 0 gives the preconditioner's answer (the diagonal approximation), which is
        all that unpadded weights `(H, …)` can give.

    Returns
    -------
    `(K, D, D, D)` float32, on the CPU.
    """
    maps = len(back)
    use_numba = compiled(kernel, normal.device)
    ridge = (1 / prior).T.to(normal)  # (D/2+1, K)
    at_shell = torch.cat([ridge, ridge.amax().mul(BEYOND).expand(1, maps)])
    if iterations and len(normal) < half_grid_points(lattice.size):
        raise ValueError("unpadded weights give the diagonal approximation only: iterations must be 0")
    blocks = lattice.blocks(normal, exact=iterations > 0)
    unpadded_shell = torch.where(lattice.unpadded_inside, lattice.unpadded_shell, len(ridge))
    inverse = _inverse(blocks, at_shell, unpadded_shell, use_numba)
    mask, d = lattice.mask.to(lattice.device), lattice.box_size_px

    def preconditioned(volumes: Tensor) -> Tensor:
        """The inverse of the operator's diagonal blocks, on the unpadded grid."""
        spectra = torch.fft.rfftn(volumes * mask, dim=(-3, -2, -1))
        product = _apply(inverse, spectra.flatten(1), use_numba).reshape(spectra.shape)
        # unnormalised transforms both ways, and the padded grid has 8 points for each of these
        result: Tensor = torch.fft.irfftn(product, s=(d,) * 3, dim=(-3, -2, -1)) * mask / lattice.size**3
        return result

    target = back * mask
    if not iterations:
        return preconditioned(target).cpu()
    operator = normal
    shell = torch.where(lattice.inside, lattice.shell, len(ridge))
    operator[:, [j * (j + 3) // 2 for j in range(maps)]] += at_shell[shell]

    def applied(volumes: Tensor) -> Tensor:
        spectra = lattice.spectra(volumes * mask)
        product = _apply(operator, spectra.flatten(1), use_numba).reshape(spectra.shape)
        return lattice.adjoint(product) * mask

    x = preconditioned(target) if start is None else start.to(lattice.device, copy=True)
    residual = target - applied(x)
    direction = z = preconditioned(residual)
    rz = _dot(residual, z)
    for _ in range(iterations):
        image = applied(direction)
        curvature = _dot(direction, image)
        if not curvature > 0 or not rz > 0:
            break  # rounding has the last word: converged
        step = rz / curvature
        x = x + step * direction
        residual = residual - step * image
        z = preconditioned(residual)
        rz, former = _dot(residual, z), rz
        direction = z + (rz / former) * direction
    return x.cpu()


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def _apply(packed: Tensor, spectra: Tensor, use_numba: bool) -> Tensor:
    if use_numba:
        from cryodrgn_pipeline.subspace.kernels import apply_packed

        out = torch.empty_like(spectra)
        apply_packed(packed.numpy(), spectra.numpy(), out.numpy())
        return out
    out = torch.empty_like(spectra)
    for part in _parts(len(packed), len(spectra)):
        matrices = unpack(packed[part], len(spectra)).to(spectra)
        out[:, part] = torch.einsum("gjk,kg->jg", matrices, spectra[:, part])
    return out


def _inverse(normal: Tensor, ridge: Tensor, shell: Tensor, use_numba: bool) -> Tensor:
    """Packed inverses of the matrices at each grid point with their prior on the diagonal."""
    if use_numba:
        from cryodrgn_pipeline.subspace.kernels import invert_packed

        out = torch.empty_like(normal)
        invert_packed(normal.numpy(), ridge.double().numpy(), shell.numpy(), out.numpy())
        return out
    inverse = torch.empty_like(normal)
    for part in _parts(len(normal), ridge.shape[1]):
        matrices = unpack(normal[part].double(), ridge.shape[1])
        diagonal = torch.diagonal(matrices, dim1=-2, dim2=-1)
        diagonal.clamp_(min=0).add_(ridge[shell[part]].double())
        inverse[part] = pack(torch.linalg.inv(matrices)).float()
    return inverse


def _parts(points: int, maps: int) -> Iterator[slice]:
    """Slices of grid points whose K × K matrices, in double precision, fit in memory together."""
    step = max(1, MATRIX_BYTES // (8 * maps**2))
    return (slice(at, min(at + step, points)) for at in range(0, points, step))
