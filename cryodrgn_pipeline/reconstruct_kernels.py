"""CPU kernels for `reconstruct` and `convention_check`: the same sums as fourier.slices, compiled.

Imported only where they are used: loading numba and the compiled kernels costs about a second. The loop over
the eight grid points around a sample is written out in every kernel: behind a shared inline function a splat
of ten maps takes a quarter longer.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray


@njit(cache=True, fastmath=True, inline="always")
def _corner(kx, ky, rotation, scale):  # type: ignore[no-untyped-def]
    """Grid point below the sample, the fractions above it, and +1, or −1 where it was taken at −k."""
    x = scale * (kx * rotation[0, 0] + ky * rotation[1, 0])
    y = scale * (kx * rotation[0, 1] + ky * rotation[1, 1])
    z = scale * (kx * rotation[0, 2] + ky * rotation[1, 2])
    side = np.float32(1.0)
    if x < 0:
        x, y, z = -x, -y, -z
        side = np.float32(-1.0)
    fx, fy, fz = np.floor(x), np.floor(y), np.floor(z)
    return int(fx), int(fy), int(fz), np.float32(x - fx), np.float32(y - fy), np.float32(z - fz), side


@njit(cache=True, fastmath=True, parallel=True)
def splat(grids, slab_edges, target, rotation, scale, kx, ky, image, ctf, weight, group):  # type: ignore[no-untyped-def]
    """Add Σ w c y and Σ w c² of images to the grids; no two threads write the same plane.

    `grids` `(S, E, E, E/2+1, 3)` float32 (real, imaginary, weight); `slab_edges` `(T+1,)` planes of kz in FFT
    order shifted by E/2; `target` `(B,)` grid of each image; `scale` `(B,)` padding times volume over image
    pixel size; `image` `(B, P)` complex64; `ctf` `(B, P)`; `weight` `(G, P)` and `group` `(B,)`.
    """
    sets, size = grids.shape[0], grids.shape[1]
    half, stride, one = size // 2, 3 * (size // 2 + 1), np.float32(1)
    slabs = slab_edges.shape[0] - 1
    for task in prange(sets * slabs):
        which, slab = task // slabs, task % slabs
        lowest, highest = slab_edges[slab] - half, slab_edges[slab + 1] - half
        grid = grids[which].reshape(-1)
        for i in range(image.shape[0]):
            if target[i] != which:
                continue
            turn, zoom, of_group = rotation[i], scale[i], group[i]
            for p in range(kx.shape[0]):
                x0, y0, z0, fx, fy, fz, side = _corner(kx[p], ky[p], turn, zoom)
                if z0 + 1 < lowest or z0 >= highest:
                    continue
                if max(x0, y0, z0) + 1 >= half or min(y0, z0) <= -half:
                    continue
                c = ctf[i, p]
                cw = c * weight[of_group, p]
                real, imaginary, square = cw * image[i, p].real, side * cw * image[i, p].imag, cw * c
                for dz in range(2):
                    zz = z0 + dz
                    if zz < lowest or zz >= highest:
                        continue
                    wz = fz if dz else one - fz
                    zz = zz + size if zz < 0 else zz
                    for dy in range(2):
                        w = wz * (fy if dy else one - fy)
                        yy = y0 + dy
                        yy = yy + size if yy < 0 else yy
                        w0, w1 = w * (one - fx), w * fx
                        at = (zz * size + yy) * stride + 3 * x0
                        grid[at] += w0 * real
                        grid[at + 1] += w0 * imaginary
                        grid[at + 2] += w0 * square
                        grid[at + 3] += w1 * real
                        grid[at + 4] += w1 * imaginary
                        grid[at + 5] += w1 * square


@njit(cache=True, fastmath=True, parallel=True)
def correlate(grids, source, rotation, scale, kx, ky, image, ctf, weight, group, out):  # type: ignore[no-untyped-def]
    """Normalised correlation of each image with the CTF-filtered slice of its grid, into `out` `(B,)`.

    `grids` `(S, E, E, E/2+1)` complex64, of which image i reads `source[i]`; the rest as in `splat`.
    """
    size = grids.shape[1]
    half, one = size // 2, np.float32(1)
    for i in prange(out.shape[0]):
        grid, turn, zoom, of_group = grids[source[i]], rotation[i], scale[i], group[i]
        inner, norm = 0.0, 0.0
        for p in range(kx.shape[0]):
            x0, y0, z0, fx, fy, fz, side = _corner(kx[p], ky[p], turn, zoom)
            if max(x0, y0, z0) + 1 >= half or min(y0, z0) <= -half:
                continue
            real, imaginary = np.float32(0), np.float32(0)
            for dz in range(2):
                wz = fz if dz else one - fz
                zz = z0 + dz
                zz = zz + size if zz < 0 else zz
                for dy in range(2):
                    w = wz * (fy if dy else one - fy)
                    yy = y0 + dy
                    yy = yy + size if yy < 0 else yy
                    a, b = grid[zz, yy, x0], grid[zz, yy, x0 + 1]
                    real += w * ((one - fx) * a.real + fx * b.real)
                    imaginary += w * ((one - fx) * a.imag + fx * b.imag)
            c = ctf[i, p]
            cw = c * weight[of_group, p]
            inner += cw * (real * image[i, p].real + side * imaginary * image[i, p].imag)
            norm += cw * c * (real * real + imaginary * imaginary)
        out[i] = inner / np.sqrt(norm) if norm > 0 else 0.0


def balanced_slabs(grid_size: int, slabs: int) -> NDArray[np.int64]:
    """Edges `(slabs + 1,)` of kz slabs that random directions fill alike: a plane gets about R − |kz|."""
    z = np.arange(grid_size) - grid_size // 2
    filled = np.cumsum(np.maximum(grid_size // 2 - np.abs(z), 0.0))
    inner = np.searchsorted(filled, filled[-1] * np.arange(1, slabs) / slabs)
    return np.concatenate([[0], inner, [grid_size]]).astype(np.int64)


def use_threads(wanted: int) -> int:
    """Let the kernels run on `wanted` threads, or on as many as numba started with; returns how many."""
    threads = min(wanted, int(numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    numba.set_num_threads(threads)
    return threads
