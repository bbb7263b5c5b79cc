"""Volumes from the particles themselves: the images near each latent point correct the model's own map.

`particle_volumes_rings` says which particles speak for a point, `particle_volumes_sums` sums up their images,
`particle_volumes_widths` chooses among kernels, `particle_volumes_maps` makes the map, the half maps and the
FSC; here they meet run, stack and files. See docs/volumes.md.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.fourier.fsc import resolution_a
from cryodrgn_pipeline.fourier.padded import Ball
from cryodrgn_pipeline.fourier.slices import resample_volume
from cryodrgn_pipeline.io.atomic import replacing_directory
from cryodrgn_pipeline.io.checkpoints import Model, TrainedModel, load_model
from cryodrgn_pipeline.io.memory import peak_bytes
from cryodrgn_pipeline.io.mrc import write_volume
from cryodrgn_pipeline.io.output_lock import sole_writer
from cryodrgn_pipeline.io.runs import write_columns
from cryodrgn_pipeline.particle_volumes_halves import half_states, own_halves
from cryodrgn_pipeline.particle_volumes_maps import StateMap, fsc_of_halves, state_map
from cryodrgn_pipeline.particle_volumes_members import Members, members_of, stack_of
from cryodrgn_pipeline.particle_volumes_memory import GIB, Plan, plan_passes
from cryodrgn_pipeline.particle_volumes_rings import SHARES, Rings, rings_of, squared_distances
from cryodrgn_pipeline.particle_volumes_sums import Prediction, accumulate_targets, packed_grids
from cryodrgn_pipeline.progress import duration, progress
from cryodrgn_pipeline.ranks import ALONE, Ranks
from cryodrgn_pipeline.stack import Stack
from cryodrgn_pipeline.volumes import OURS, MapOptions, check_options, finished_map, support_columns

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParticleVolumes:
    """What to make: maps at `targets` `(T, J)` of a run.

    `ids`: only the particles of this file, all alike, at one target. `stack`: a stack of the run's particles,
    None for the run's own. `memory_gb`: what may be held, GiB; None takes a share of what is available.
    `independent_halves`: half maps from a subspace of each half set's own.
    """

    run: Path
    targets: NDArray[np.float32]
    ids: Path | None
    stack: Path | None
    options: MapOptions
    memory_gb: float | None = None
    independent_halves: bool = False


def particle_volumes(
    request: ParticleVolumes, output: Path, device: torch.device, ranks: Ranks = ALONE
) -> list[Path]:
    """Make one map per target and write them with their half maps and `volumes.parquet`; the maps' paths.

    The folder appears whole or not at all. Ranks share the images; rank 0 alone makes maps and writes.

    Parameters
    ----------
    device
        Where the model draws its maps; images are summed up on the CPU.

    Raises
    ------
    InputFormatError
        If the stack is missing or lacks particles of the run, or the targets do not fit the model.
    ConfigError
        If crop or filter do not fit the maps, or the maps the memory.
    """
    started, targets = time.monotonic(), request.targets
    model = load_model(request.run, device)
    if targets.shape[1] != model.latent_dim:
        raise InputFormatError(
            f"z holds rows of {targets.shape[1]} numbers; the model of {request.run} expects rows of "
            f"{model.latent_dim}"
        )
    stack = stack_of(request.run, request.stack)
    check_options(request.options, stack.box_size_px, stack.pixel_size_a)
    members = members_of(request.run, stack, request.ids)
    squared = squared_distances(members.z, members.covariance, targets.astype(np.float64))
    log.info("%d particles, %d targets at %d px", members.counted.sum(), len(targets), stack.box_size_px)
    drawn = ModelOnStack(model=model, targets=targets, stack=stack)
    apart = np.where(members.counted[:, None], 0.0 if request.ids else squared, np.inf)
    rings = rings_of(apart, SHARES[-1:] if request.ids else SHARES)
    plan = drawn.plan(rings.widths, request.memory_gb, ranks)
    if plan.widths < rings.widths:
        rings = rings_of(apart, SHARES[-plan.widths :])
    names = [f"vol_{number:03d}.mrc" for number in range(len(targets))]
    table: list[dict[str, Any]] = [{} for _ in names]
    with (
        sole_writer(output) if ranks.leads else nullcontext(),
        replacing_directory(output, ours=OURS) if ranks.leads else nullcontext(output) as folder,
    ):
        files = Files(folder=folder, names=names, options=request.options, stack=stack)
        if ranks.leads:
            (folder / "halves").mkdir()
        if request.independent_halves:
            for number, row in _independent_halves(request, files, model, drawn.kept_bytes, ranks):
                table[number] |= row
        else:
            log.info("half sets' FSC is optimistic: z was learnt from both (fsc_independent is false)")
        with_halves = not request.independent_halves
        for number, found in _state_maps(drawn, members, rings, squared, plan, with_halves, ranks):
            files.write_map(number, found.density)
            if found.halves is not None:
                table[number] |= files.write_halves(number, found.halves) | _shared_row(found, rings, number)
            table[number] |= _residual_row(found, rings, number)
            log.info("%s: %s", names[number], _in_words(table[number]))
        if not ranks.leads:
            return []
        latent = {f"z_{j}": targets[:, j] for j in range(model.latent_dim)}
        measured = {key: np.array([row[key] for row in table]) for key in table[0] if key not in _PATHS}
        paths = {key: [row[key] for row in table] for key in _PATHS}
        support = support_columns(request.run, targets)
        write_columns(folder / "volumes.parquet", {"path": names, **latent, **paths, **measured, **support})
    log.info(
        "%d volumes in %s, peak memory %.2f GiB: %s",
        *(len(names), duration(time.monotonic() - started), peak_bytes() / GIB, output),
    )
    return [output / name for name in names]


def _independent_halves(
    request: ParticleVolumes, files: Files, model: Model, kept: int, ranks: Ranks
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Write half maps that share nothing but where the target lies; each target's number and columns."""
    targets, memory_gb = request.targets, request.memory_gb
    for each in range(2):  # rank 0 learns them, then the others find them there
        if ranks.leads == (each == 0):
            own = own_halves(request.run, model.latent_dim)
        ranks.largest(0)
    of_half = [
        half_states(
            request.run, own, number, files.stack, targets, kept=kept, memory_gb=memory_gb, ranks=ranks
        )
        for number in (0, 1)
    ]
    first = list(of_half[0])
    for number, (one, two) in enumerate(zip(first, of_half[1], strict=True)):
        row = files.write_halves(number, (one.density, two.density))
        row |= {"n_effective": one.n_effective + two.n_effective, "fsc_independent": own.of_source}
        for half, state in enumerate((one, two), start=1):
            row |= {f"half{half}_components": own.components[half - 1]}
            row |= {f"half{half}_kernel_width_{band}": edge for band, edge in enumerate(state.edges)}
        yield number, row


def _state_maps(
    drawn: ModelOnStack,
    members: Members,
    rings: Rings,
    squared: NDArray[np.float64],
    plan: Plan,
    with_halves: bool,
    ranks: Ranks,
) -> Iterator[tuple[int, StateMap]]:
    """Each target's number and map, for rank 0; the log says how long passes and maps took."""
    stack, count, passes = drawn.stack, len(drawn.targets), plan.passes(len(drawn.targets))
    for turn in range(passes):
        started = time.monotonic()
        block = range(turn * plan.per_pass, min((turn + 1) * plan.per_pass, count))
        prediction = drawn.prediction(members.z, squared)
        around = rings.of(slice(block.start, block.stop))
        with progress("volumes from particles", len(around.counted)) as advance:
            sums = accumulate_targets(
                stack,
                members.rows,
                around,
                members.half,
                members.contrast,
                prediction,
                poses=members.poses,
                advance=advance,
                ranks=ranks,
            )
        del prediction  # the maps need its memory
        log.info("pass %d of %d: %s", turn + 1, passes, duration(time.monotonic() - started))
        for number in block if ranks.leads else ():
            started = time.monotonic()
            kernels = around.weights(number - block.start)
            seen, model_map = sums.around(number - block.start, kernels), drawn.map_at(number)
            found = state_map(seen, model_map, with_halves=with_halves)
            log.info("target %d of %d: %.1f s", number + 1, count, time.monotonic() - started)
            yield number, found
        del sums  # before those of the next block are made


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOnStack:
    """What a model says on the grid of a stack: at T `targets` `(T, J)`, and of each particle.

    A model made of maps predicts every particle at its own z; a decoder would have to be run for each, so
    that particles are predicted at the target nearest to them.
    """

    model: Model
    targets: NDArray[np.float32]
    stack: Stack

    def plan(self, widths: int, memory_gb: float | None, ranks: Ranks) -> Plan:
        """How many targets share a pass over the images."""
        targets = len(self.targets)
        return plan_passes(
            self.stack.box_size_px,
            targets,
            widths,
            grids=targets if self.maps is None else len(self.maps),
            kept=self.kept_bytes,
            memory_gb=memory_gb,
            ranks=ranks,
        )

    @property
    def maps(self) -> Tensor | None:
        """`(K, D0, D0, D0)` of a model that is made of maps."""
        return None if isinstance(self.model, TrainedModel) else self.model.maps

    @property
    def kept_bytes(self) -> int:
        """Memory of its maps."""
        return 0 if self.maps is None else self.maps.nbytes

    @torch.no_grad()
    def map_at(self, target: int) -> Tensor:
        """The map at one of the targets, `(D, D, D)`."""
        z = torch.from_numpy(self.targets[target])
        return self._on_grid(self.model.density(z, self.model.box_size_px))

    @torch.no_grad()
    def prediction(self, z: NDArray[np.float64], squared: NDArray[np.float64]) -> Prediction:
        """What it says of N particles at `z` `(N, J)`, at squared distances `(N, T)` from the targets."""
        ball = Ball(self.stack.box_size_px)
        if not isinstance(self.model, TrainedModel):
            maps = self.model.maps
            grids = packed_grids((self._on_grid(each) for each in maps), len(maps), ball)
            return Prediction(
                grids=grids, factors=self.model.factors(torch.from_numpy(z).float()).float().cpu()
            )
        log.info("a decoder's prediction of each particle is its map at the nearest target")
        count = len(self.targets)
        grids = packed_grids((self.map_at(target) for target in range(count)), count, ball)
        nearest = torch.from_numpy(squared.argmin(axis=1))
        return Prediction(grids=grids, factors=torch.nn.functional.one_hot(nearest, len(grids)).float())

    def _on_grid(self, volume: Tensor) -> Tensor:
        stack, p0 = self.stack, self.model.pixel_size_a
        d, p = stack.box_size_px, stack.pixel_size_a
        if volume.shape[-1] == d and abs(p0 / p - 1) < 1e-6:
            return volume.cpu()
        # images keep their grey scale in another box, and more, smaller voxels sum up to it
        return resample_volume(volume.cpu(), p0, d, p) * (p / p0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Maps of the given names in a folder, finished as the options say; half maps are not filtered."""

    folder: Path
    names: list[str]
    options: MapOptions
    stack: Stack

    def write_map(self, number: int, density: Tensor) -> None:
        """Write one target's map `(D, D, D)`."""
        pixel_size_a = self.stack.pixel_size_a
        whole = finished_map(density, pixel_size_a, self.options)
        write_volume(self.folder / self.names[number], whole.numpy(), pixel_size_a, "from particles")

    def write_halves(self, number: int, halves: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """Write one target's half maps, mirrored and cropped with its map; where they lie, and their FSC's
        resolutions."""
        d, p = self.stack.box_size_px, self.stack.pixel_size_a
        unfiltered = MapOptions(flip_hand=self.options.flip_hand, crop_px=self.options.crop_px)
        columns: dict[str, Any] = {}
        for half, density in enumerate(halves, start=1):
            path = f"halves/{Path(self.names[number]).stem}_half{half}.mrc"
            density = finished_map(density, p, unfiltered)
            write_volume(self.folder / path, density.numpy(), p, f"from particles, half {half}")
            columns[f"half{half}_path"] = path
        curve = fsc_of_halves(halves)
        for name, threshold in (("fsc0143", 0.143), ("fsc05", 0.5)):
            found = resolution_a(curve, threshold, d, p)
            columns[f"resolution_{name}_a"] = np.nan if found is None else found
        return columns


_PATHS = ("half1_path", "half2_path")


def _shared_row(found: StateMap, rings: Rings, number: int) -> dict[str, Any]:
    """Columns on half maps whose particles were weighed by a model of both."""
    edge, effective = rings.edge[number], rings.n_effective(number)
    return {
        "n_effective": float(min(effective[width] for width in found.width)),
        "fsc_independent": False,
        **{f"kernel_width_{band}": float(edge[width]) for band, width in enumerate(found.width)},
    }


def _residual_row(found: StateMap, rings: Rings, number: int) -> dict[str, Any]:
    edge = rings.edge[number]
    return {
        "residual_share": found.residual_share,
        **{
            f"residual_width_{band}": float(edge[width]) if width >= 0 else np.nan
            for band, width in enumerate(found.residual_width)
        },
    }


def _in_words(row: dict[str, Any]) -> str:
    resolution = row["resolution_fsc0143_a"]
    resolved = "nothing resolved" if np.isnan(resolution) else f"{resolution:.2f} Å (FSC 0.143)"
    of_model = ", the model's map as it is" if row["residual_share"] == 0 else ""
    return f"{resolved}, {row['n_effective']:.0f} particles in effect{of_model}"
