"""From a stack to a consensus map: two half maps, their FSC, the filtered map, and the convention check."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryodrgn_pipeline.convention_check import ConventionCheck, check_conventions
from cryodrgn_pipeline.errors import ConventionError, InputFormatError
from cryodrgn_pipeline.fourier.fsc import corrected_fsc, fsc, resolution_a
from cryodrgn_pipeline.fourier.masks import particle_mask
from cryodrgn_pipeline.fourier.slices import resample_volume
from cryodrgn_pipeline.half_sets import half_sets
from cryodrgn_pipeline.io.atomic import replacing, write_json
from cryodrgn_pipeline.io.mrc import read_volume, write_volume
from cryodrgn_pipeline.progress import duration, progress
from cryodrgn_pipeline.ranks import ALONE, Ranks
from cryodrgn_pipeline.reconstruct import (
    Backprojection,
    accumulate_stack,
    prior_from_fsc,
    shell_mean_weight,
)
from cryodrgn_pipeline.stack import Stack

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Consensus:
    """The maps `(D, D, D)` with solvent at 0, the mask, and FSC curves `(D/2+1,)` (reference: or None)."""

    density: Tensor
    halves: tuple[Tensor, Tensor]
    mask: Tensor
    fsc_unmasked: Tensor
    fsc_masked: Tensor
    fsc_corrected: Tensor
    fsc_reference: Tensor | None


def maps_from_sums(
    sums: Backprojection, mask: Tensor | None = None, reference: Tensor | None = None
) -> Consensus:
    """Half maps, mask, FSC and the filtered map from the sums of two half sets.

    Parameters
    ----------
    sums
        Backprojections of the halves as sets 0 and 1.
    mask
        `(D, D, D)` soft mask; found in the maps where not given.
    reference
        `(D, D, D)` map to compare with.
    """
    d = sums.box_size_px
    halves = (sums.map(0), sums.map(1))
    unmasked = fsc(*halves)
    if mask is None:
        resolved = resolution_a(unmasked, 0.5, d, 1.0)
        shell = d / resolved if resolved else None
        mean, noise = (halves[0] + halves[1]) / 2, (halves[0] - halves[1]) / 2
        mask = particle_mask(mean, noise=noise, resolution_shell=shell)
    masked, corrected = corrected_fsc(*halves, mask)
    both = [0, 1]
    prior = prior_from_fsc(corrected, shell_mean_weight(sums.weight(both), d))
    filtered = sums.map(both, prior)
    solvent = mask < 0.01
    at_zero = [v - v[solvent].mean() if bool(solvent.any()) else v for v in (filtered, *halves)]
    return Consensus(
        density=at_zero[0],
        halves=(at_zero[1], at_zero[2]),
        mask=mask,
        fsc_unmasked=unmasked,
        fsc_masked=masked,
        fsc_corrected=corrected,
        fsc_reference=None if reference is None else fsc(at_zero[0], reference, mask),
    )


def consensus(
    stack_path: Path,
    output: Path,
    *,
    reference: Path | None = None,
    check: str = "stop",
    mask: Path | None = None,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> dict[str, Any] | None:
    """Reconstruct a stack's consensus map and check the conventions in force against the data.

    Writes map.mrc, half1.mrc, half2.mrc, mask.mrc, fsc.parquet and consensus.json to the folder `output`.

    Parameters
    ----------
    stack_path
        Folder that `preprocess` made.
    reference
        The user's own consensus map from the same refinement; with it hand and pixel size are judged too.
    check
        `stop` (raise where the data contradict a convention), `warn` or `off`.
    mask
        Soft mask for the FSC, resampled where its box is another; found in the map where not given.
    seed
        Deals the half sets where the source has none, and draws the check's subset.
    ranks
        Those that share the images; rank 0 alone checks the conventions, makes the maps and writes.

    Returns
    -------
    The content of consensus.json, for rank 0.

    Raises
    ------
    ConventionError
        If the data contradict a convention and `check` is `stop`; everything is written before.
    """
    if check not in ("stop", "warn", "off"):
        raise ValueError(f"check must be stop, warn or off, not {check}")
    started = time.monotonic()
    stack = Stack.open(stack_path)
    stack.particles.require_poses("consensus")
    d, p = stack.box_size_px, stack.pixel_size_a
    target, source = half_sets(stack.particles, seed)
    given = None if reference is None else read_reference(reference)
    of_reference = None if given is None else resample_volume(*given, d, p)
    of_mask = None if mask is None else _mask_on_grid(mask, d, p)
    tested = None
    if check != "off" and ranks.leads:
        tested = check_conventions(stack, reference=given, seed=seed)
    backprojecting = time.monotonic()
    rows = np.arange(len(stack))
    with progress("consensus", len(rows[ranks.share(len(rows))])) as advance:
        sums = accumulate_stack(stack, rows, target, advance=advance, ranks=ranks)
    if not ranks.leads:
        return None
    backprojected = time.monotonic()
    result = maps_from_sums(sums, of_mask, of_reference)
    content = _summary(stack, result, source, tested)
    content["ms_per_image"] = 1e3 * (backprojected - backprojecting) / max(1, len(stack))
    content["wall_time_s"] = time.monotonic() - started
    _write(output, result, p, content)
    at = content["resolution_fsc0143_a"]
    log.info(
        "consensus of %d particles: %s (FSC 0.143), in %s",
        len(stack),
        "nothing resolved" if at is None else f"{at:.2f} Å",
        duration(content["wall_time_s"]),
    )
    if tested is not None:
        _speak(tested, check, output)
    return content


def _summary(stack: Stack, result: Consensus, source: str, tested: ConventionCheck | None) -> dict[str, Any]:
    d, p = stack.box_size_px, stack.pixel_size_a
    reference = result.fsc_reference
    return {
        "resolution_fsc0143_a": resolution_a(result.fsc_corrected, 0.143, d, p),
        "resolution_fsc05_a": resolution_a(result.fsc_corrected, 0.5, d, p),
        "resolution_unmasked_fsc0143_a": resolution_a(result.fsc_unmasked, 0.143, d, p),
        "resolution_reference_fsc05_a": None if reference is None else resolution_a(reference, 0.5, d, p),
        "n_particles": len(stack),
        "box_size_px": d,
        "pixel_size_a": p,
        "half_sets": source,
        "mask_volume_fraction": float(result.mask.mean()),
        "stack": str(stack.path),
        "stack_fingerprint": stack.fingerprint,
        "convention_check": {"verdict": "not_tested", "tests": []} if tested is None else tested.as_json(),
    }


def _write(output: Path, result: Consensus, pixel_size_a: float, content: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    output.mkdir(parents=True, exist_ok=True)
    (output / "consensus.json").unlink(missing_ok=True)  # written last: its presence says that all is whole
    maps = {"map": result.density, "half1": result.halves[0], "half2": result.halves[1], "mask": result.mask}
    for name, volume in maps.items():
        write_volume(output / f"{name}.mrc", volume.numpy(), pixel_size_a, f"consensus {name}")
    shells = len(result.fsc_unmasked)
    box_a = content["box_size_px"] * pixel_size_a
    reference = result.fsc_reference
    table = pa.table(
        {
            "shell": pa.array(range(shells), pa.int32()),
            "frequency_per_a": pa.array(np.arange(shells) / box_a),
            "fsc_unmasked": pa.array(result.fsc_unmasked.numpy()),
            "fsc_masked": pa.array(result.fsc_masked.numpy()),
            "fsc_corrected": pa.array(result.fsc_corrected.numpy()),
            "fsc_reference": pa.nulls(shells, pa.float64())
            if reference is None
            else pa.array(reference.numpy()),
        }
    )
    with replacing(output / "fsc.parquet") as temporary:
        pq.write_table(table, temporary)
    write_json(output / "consensus.json", content)


def read_reference(path: Path) -> tuple[Tensor, float]:
    """A reference map as an even cube `(D, D, D)` and its voxel size in Å.

    Raises
    ------
    InputFormatError
        If it is no even cube, lacks a voxel size, or holds no density.
    """
    values, voxel_a = read_volume(path)
    nz, ny, nx = values.shape
    if not nz == ny == nx or nx % 2:
        raise InputFormatError(
            f"{path}: a reference must be an even cube, this map has {nx} x {ny} x {nz} voxels"
        )
    if voxel_a <= 0:
        raise InputFormatError(
            f"{path}: its header has no voxel size; set it (in RELION: relion_image_handler --angpix; in "
            "Python: mrcfile, voxel_size) and run again"
        )
    if not np.isfinite(values).all() or values.std() == 0:
        raise InputFormatError(f"{path}: holds no density (constant, or values that are not numbers)")
    return torch.from_numpy(values), voxel_a


def _mask_on_grid(path: Path, box_size_px: int, pixel_size_a: float) -> Tensor:
    values, voxel_a = read_volume(path)
    low, high = values.min(), values.max()
    if not (low >= -1e-3 and 0 < high <= 1.001):  # also where a voxel is no number
        raise InputFormatError(f"{path}: a mask lies between 0 and 1, this map in {low:.3g} ... {high:.3g}")
    mask, shape = torch.from_numpy(values), values.shape
    if shape != (box_size_px,) * 3:
        if shape != (shape[0],) * 3 or shape[0] % 2 or voxel_a <= 0:
            raise InputFormatError(
                f"{path}: the mask has {' x '.join(map(str, shape[::-1]))} voxels of {voxel_a:.4g} Å, the "
                f"stack {box_size_px} px; to be resampled it must be an even cube with a voxel size"
            )
        mask = resample_volume(mask, voxel_a, box_size_px, pixel_size_a)
    return mask.clamp(0, 1)


def _speak(tested: ConventionCheck, check: str, output: Path) -> None:
    stop = tested.verdict == "contradicted" and check == "stop"
    names_by_words: dict[tuple[str, str], list[str]] = {}
    for test in tested.tests:
        names_by_words.setdefault((test.verdict, test.statement), []).append(test.name)
    for (verdict, statement), names in names_by_words.items():
        if verdict == "contradicted" and stop:
            continue  # the error says it
        level = logging.WARNING if verdict == "contradicted" else logging.INFO
        log.log(level, "%s: %s. %s", ", ".join(names), verdict.replace("_", " "), statement)
    if stop:
        raise ConventionError(
            f"{tested.message()}\nThe maps as imported are in {output}; to go on regardless: --check warn"
        )
