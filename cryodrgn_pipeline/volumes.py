"""Volumes decoded from a trained model: at given latents, at k-means centres, or along a path."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.fourier.density import (
    crop_real,
    low_pass,
    mirror,
    solvent_level,
)
from cryodrgn_pipeline.io.atomic import replacing_directory
from cryodrgn_pipeline.io.checkpoints import Model, load_model
from cryodrgn_pipeline.io.ids import read_id_rows
from cryodrgn_pipeline.io.mrc import write_volume
from cryodrgn_pipeline.io.output_lock import sole_writer
from cryodrgn_pipeline.io.runs import Columns, read_latents, read_z, write_columns
from cryodrgn_pipeline.landscape.cluster import kmeans_centers
from cryodrgn_pipeline.landscape.density import inside_region, latent_region
from cryodrgn_pipeline.landscape.embed import principal_components
from cryodrgn_pipeline.landscape.outliers import well_fitted_rows
from cryodrgn_pipeline.landscape.traverse import pc_traversal
from cryodrgn_pipeline.progress import progress

log = logging.getLogger(__name__)

OURS = ("vol_*.mrc", "volumes.parquet", "metrics.json", "halves")  # of volumes from particles too


@dataclass(frozen=True, slots=True, kw_only=True)
class MapOptions:
    """What is done to each map, in this order.

    `box_size_px`: decode on a coarser grid of this even box (larger voxels, same field of view).
    `low_pass_a`: remove finer detail. `flip_hand`: mirror. `crop_px`: cut to this cube in real space.
    """

    box_size_px: int | None = None
    low_pass_a: float | None = None
    flip_hand: bool = False
    crop_px: int | None = None


@torch.no_grad()
def decode_volume(model: Model, z: NDArray[np.floating[Any]], options: MapOptions) -> tuple[Tensor, float]:
    """The map of one latent: `(d, d, d)` float32 density, solvent at 0, and its voxel size in Å.

    The density is in the grey scale of the images (a projection sums voxels), at any decoded box.

    Parameters
    ----------
    model
        What `load_model` gives.
    z
        `(latent_dim,)` latent coordinates.
    options
        Box, filter, hand and crop of the map.
    """
    full = model.box_size_px
    d = options.box_size_px or full
    density = model.density(torch.as_tensor(np.asarray(z, dtype=np.float32)), d)
    voxel_size_a = model.pixel_size_a * full / d
    return finished_map(density, voxel_size_a, options), voxel_size_a


def finished_map(density: Tensor, voxel_size_a: float, options: MapOptions) -> Tensor:
    """A `(D, D, D)` density with its solvent at 0, filtered, mirrored and cropped as the options say."""
    density = density - solvent_level(density)
    if options.low_pass_a is not None:
        density = low_pass(density, voxel_size_a, options.low_pass_a)
    if options.flip_hand:
        density = mirror(density)
    if options.crop_px is not None:
        density = crop_real(density, options.crop_px)
    return density


def decode_volumes(
    run: Path, z: NDArray[np.floating[Any]], output: Path, options: MapOptions, device: torch.device
) -> list[Path]:
    """Decode one map per row of `z` into `output`: `vol_000.mrc` … and `volumes.parquet`; the maps' paths.

    volumes.parquet says of each map whether it lies where particles are (`inside`) and how dense they are
    there (`latent_density`, in units of that at the median particle). The folder appears whole or not at
    all. Raises `ConfigError` when box, crop or filter do not fit.
    """
    model = load_model(run, device)
    check_options(options, model.box_size_px, model.pixel_size_a)
    if z.shape[1] != model.latent_dim:
        raise InputFormatError(
            f"z holds rows of {z.shape[1]} numbers; the model of {run} expects rows of {model.latent_dim}"
        )
    names = [f"vol_{i:03d}.mrc" for i in range(len(z))]
    with (
        sole_writer(output),
        replacing_directory(output, ours=OURS) as folder,
        progress("decoding volumes", len(z), "volumes") as advance,
    ):
        for name, latent in zip(names, z, strict=True):
            density, voxel_size_a = decode_volume(model, latent, options)
            label = "decoded at z " + " ".join(f"{value:.2g}" for value in latent)
            write_volume(folder / name, density.numpy(), voxel_size_a, label)
            advance(1)
        columns = {f"z_{j}": z[:, j].astype(np.float32) for j in range(z.shape[1])}
        write_columns(folder / "volumes.parquet", {"path": names, **columns, **support_columns(run, z)})
    return [output / name for name in names]


def support_columns(run: Path, z: NDArray[np.floating[Any]]) -> Columns:
    """Columns `inside` and `latent_density` of the points `(M, J)`, and a warning where no particles are."""
    if not (run / "latent.parquet").is_file():
        log.warning("%s: no latent.parquet, so nothing tells which volumes lie where particles are", run)
        return {}
    latents = read_latents(run)
    inside, density = inside_region(latents.z[well_fitted_rows(latents)], z)
    if not inside.all():
        names = ", ".join(f"{row:03d}" for row in np.flatnonzero(~inside))
        log.warning("outside the region of particles, drawn without data: volumes %s", names)
    return {"inside": inside, "latent_density": density}


def latents_for(
    run: Path,
    *,
    z_table: Path | None,
    kmeans: int | None,
    ids: Path | None,
    pc: int | None,
    n: int,
    seed: int,
) -> NDArray[np.float32]:
    """The latents to decode, by whichever one of the four ways is given.

    Parameters
    ----------
    z_table
        A csv of latents. `kmeans`: that many cluster centres, each a particle's own latent.
        `ids`: the mean latent of these particles. `pc`: `n` points along that principal component, from 1.
    """
    if sum(way is not None for way in (z_table, kmeans, ids, pc)) != 1:
        raise ConfigError("give exactly one of --z, --kmeans, --ids and --pc")
    if z_table is not None:
        return read_z(z_table).astype(np.float32)
    latents = read_latents(run)
    z = latents.z
    if kmeans is not None:
        return kmeans_centers(z, kmeans, seed)[0]
    if ids is not None:
        rows = read_id_rows(ids, latents.particle_id, f"the run {run}")
        mean: NDArray[np.float32] = z[rows].mean(axis=0, keepdims=True)
        return mean
    components = principal_components(z)
    if pc is None or not 1 <= pc <= len(components.components):
        raise ConfigError(f"--pc {pc}: expected 1 to {len(components.components)}")
    return pc_traversal(components, pc, latent_region(z[well_fitted_rows(latents)], seed), n)


def check_options(options: MapOptions, box_size_px: int, pixel_size_a: float) -> None:
    """Raise `ConfigError` where box, crop or filter do not fit maps of this box and voxel size (Å)."""
    full, box, crop = box_size_px, options.box_size_px, options.crop_px
    if box is not None and (box % 2 or not 2 <= box <= full):
        raise ConfigError(f"--box-size {box}: expected an even number up to the model's {full} px")
    if crop is not None and (crop % 2 or not 2 <= crop <= (box or full)):
        raise ConfigError(f"--crop-px {crop}: expected an even number up to the map's {box or full} px")
    nyquist = 2 * pixel_size_a * full / (box or full)
    if options.low_pass_a is not None and options.low_pass_a < nyquist:
        raise ConfigError(f"--low-pass-a {options.low_pass_a}: finer than the map's Nyquist, {nyquist:.2f} Å")
