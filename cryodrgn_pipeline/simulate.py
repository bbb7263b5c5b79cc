"""Simulate a particle set with known answers, written as a user would have it from RELION and cryoSPARC."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import ConfigError
from cryodrgn_pipeline.io.atomic import replacing, replacing_directory
from cryodrgn_pipeline.io.mrc import MrcStackWriter, write_volume
from cryodrgn_pipeline.progress import progress
from cryodrgn_pipeline.simulation.assembly import Mixture, make_mixture
from cryodrgn_pipeline.simulation.images import ctf_plane, noise_filter, slices, volume
from cryodrgn_pipeline.simulation.particles import Settings, SimulatedParticles, draw_particles
from cryodrgn_pipeline.simulation.phantom import Phantom, make_phantom
from cryodrgn_pipeline.simulation.structure import read_pdb, structure_phantom
from cryodrgn_pipeline.simulation.write import write_cs, write_description, write_star, write_truth

__all__ = ["Settings", "simulate"]

log = logging.getLogger(__name__)

CHUNK = 128
CALIBRATION_PARTICLES = 1024
OURS = ("particles*.star", "particles*.cs", "stacks", "consensus.mrc", "truth", "simulate.json")


def phantom_of(settings: Settings) -> Phantom | Mixture:
    """The molecule, or the mixture of them, that these settings describe."""
    if settings.species:
        return make_mixture(
            species=settings.species,
            diameter_a=settings.diameter_a,
            sigma_a=settings.sigma_a,
            atoms=settings.atom_count,
            seed=settings.structure_seed,
        )
    if settings.structure is not None:
        return structure_phantom(
            read_pdb(Path(settings.structure)),
            sigma_a=settings.sigma_a,
            box_a=settings.box_size * settings.pixel_size_a,
            motion=settings.motion,
            motion_range=settings.motion_range,
            hinge_chain=settings.hinge_chain,
            absent_chain=settings.absent_chain,
        )
    return make_phantom(
        diameter_a=settings.diameter_a,
        sigma_a=settings.sigma_a,
        atoms=settings.atom_count,
        motion=settings.motion,
        motion_range=settings.motion_range,
        seed=settings.structure_seed,
    )


def signal_spectra(
    particles: SimulatedParticles, rows: NDArray[np.int64], phantom: Phantom | Mixture, settings: Settings
) -> torch.Tensor:
    """CTF-filtered, shifted, noise-free images of some rows as rfft2 coefficients `(B, D, D/2+1)`."""
    poses = particles.poses.take(rows)
    if isinstance(phantom, Mixture):
        position, weight = phantom.states(particles.species[rows])
    else:
        position, weight = phantom.states(particles.motion[rows], particles.occupancy[rows])
    for row in np.flatnonzero(particles.junk[rows]):  # aggregate or debris: the same mass, anywhere
        rng = np.random.default_rng([settings.seed, 0x70B, int(particles.written[rows[row]])])
        position[row] = rng.normal(0, settings.diameter_a / 5, size=position[row].shape)
    placed = np.einsum("bij,baj->bai", poses.rotation, position)
    placed[..., :2] -= poses.shift_a[:, None]  # moving the content by +shift centres it
    optics = particles.reported.optics.take(rows)
    spectrum = slices(
        torch.from_numpy(placed).float(),
        torch.from_numpy(weight * particles.contrast[rows, None]).float(),
        pixel_size_a=torch.from_numpy(optics.pixel_size_a).float(),
        sigma_a=phantom.sigma_a,
        box_size_px=settings.box_size,
    )
    # a projection's coefficients grow as the square of the pixel density
    magnified = torch.from_numpy((settings.pixel_size_a / optics.pixel_size_a) ** 2).float()
    defocus = particles.reported.ctf.take(rows)
    return spectrum * ctf_plane(optics, defocus, b_factor_a2=settings.b_factor_a2) * magnified[:, None, None]


def _images(spectrum: torch.Tensor, box_size_px: int) -> torch.Tensor:
    images: torch.Tensor = torch.fft.irfft2(spectrum, s=(box_size_px, box_size_px))
    return images


def _signal_variance(particles: SimulatedParticles, phantom: Phantom | Mixture, settings: Settings) -> float:
    """Mean variance per pixel of the noise-free images without DC, over an even sample of the set."""
    rows = np.unique(np.linspace(0, settings.particles - 1, CALIBRATION_PARTICLES).astype(np.int64))
    rows = rows[~particles.junk[rows]]
    if not len(rows):
        raise ConfigError("simulate: every particle is junk, nothing to set the noise by; lower --junk")
    total = 0.0
    for start in range(0, len(rows), CHUNK):
        images = _images(
            signal_spectra(particles, rows[start : start + CHUNK], phantom, settings), settings.box_size
        )
        total += float(images.double().var(dim=(1, 2), correction=0).sum())
    return total / len(rows)


def _write_stacks(
    folder: Path, particles: SimulatedParticles, phantom: Phantom | Mixture, settings: Settings, scale: float
) -> None:
    d = settings.box_size
    colour = noise_filter(d, settings.noise_colour) if settings.noise_colour else None
    images_ref, sign = particles.reported.images, -1.0 if settings.dark_on_light else 1.0
    with progress("simulate", settings.particles) as advance:
        for number, name in enumerate(images_ref.stack_paths):
            rows = np.flatnonzero(images_ref.stack == number)
            rows = rows[np.argsort(images_ref.index[rows])]
            (folder / name).parent.mkdir(exist_ok=True)
            with MrcStackWriter(
                folder / name,
                n_images=len(rows),
                box_size_px=d,
                voxel_size_a=settings.pixel_size_a,
                label="simulate",
            ) as stack:
                for start in range(0, len(rows), CHUNK):
                    chunk = rows[start : start + CHUNK]
                    signal = signal_spectra(particles, chunk, phantom, settings) * scale
                    rng = np.random.default_rng([settings.seed, 0x201, number, start])
                    noise = torch.from_numpy(rng.standard_normal((len(chunk), d, d), dtype=np.float32))
                    if colour is None:
                        images = _images(signal, d) + noise
                    else:
                        images = _images(signal + torch.fft.rfft2(noise) * colour, d)
                    stack.append(np.float32(sign) * images.numpy())
                    advance(len(chunk))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrueStates:
    """S states: `coordinates` name → `(S,)`, `share` `(S,)` of the particles, and the atoms of each.

    `position_a` `(S, A, 3)` in Å and `weight` `(S, A)`.
    """

    coordinates: dict[str, NDArray[np.float64]]
    share: NDArray[np.float64]
    position_a: NDArray[np.float64]
    weight: NDArray[np.float64]


def true_states(molecule: Phantom | Mixture, settings: Settings) -> TrueStates:
    """The states whose volumes are the truth: every species, or evenly spaced motions with and without."""
    if isinstance(molecule, Mixture):
        species = np.arange(settings.species)
        position, weight = molecule.states(species)
        names = {"species": species.astype(np.float64)}
        return TrueStates(
            coordinates=names,
            share=np.full(len(species), 1 / len(species)),
            position_a=position,
            weight=weight,
        )
    motions = np.array([0.5]) if settings.motion == "none" else np.linspace(0, 1, settings.states)
    # evenly spaced states include both ends, which stand for half an interval each
    of_motion = np.ones(len(motions))
    of_motion[[0, -1]] = 1.0 if len(motions) == 1 else 0.5
    of_occupancy = {1.0: settings.occupancy, 0.0: 1 - settings.occupancy}
    occupancies = [occupancy for occupancy, share in of_occupancy.items() if share > 0]
    motion, occupancy = np.tile(motions, len(occupancies)), np.repeat(occupancies, len(motions))
    shares = [of_occupancy[each] * of_motion / of_motion.sum() for each in occupancies]
    position, weight = molecule.states(motion, occupancy)
    return TrueStates(
        coordinates={"motion": motion, "occupancy": occupancy},
        share=np.concatenate(shares),
        position_a=position,
        weight=weight,
    )


def _write_states(
    folder: Path, consensus: Path, molecule: Phantom | Mixture, settings: Settings, scale: float
) -> None:
    """Volumes of the true states, their table, and the consensus as their weighted mean."""
    states = true_states(molecule, settings)
    mean = np.zeros((settings.box_size,) * 3)
    lines = [",".join(["path", *states.coordinates])]
    folder.mkdir(parents=True)
    for number, share in enumerate(states.share):
        density = scale * volume(
            states.position_a[number],
            states.weight[number],
            sigma_a=molecule.sigma_a,
            box_size_px=settings.box_size,
            pixel_size_a=settings.pixel_size_a,
        )
        mean += share * density
        name, at = f"state_{number:03d}.mrc", {key: each[number] for key, each in states.coordinates.items()}
        label = ", ".join(["truth", *(f"{key} {value:.3f}" for key, value in at.items())])
        write_volume(folder / name, density, settings.pixel_size_a, label)
        lines.append(",".join([name, *(f"{value:.9g}" for value in at.values())]))
    with replacing(folder / "states.csv") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_volume(consensus, mean, settings.pixel_size_a, "consensus of the true states")


def simulate(settings: Settings, output: Path) -> None:
    """Write a simulated set to the folder `output`, whole or not at all.

    It gets `particles.star` and `particles.cs` (the same particles; `particles_passthrough.cs` beside it),
    `stacks/*.mrcs`, `consensus.mrc`, `truth/truth.parquet`, `truth/volumes/` with `states.csv`, and
    `simulate.json`. The noise has a standard deviation of 1; images and maps share one grey scale.
    """
    phantom = phantom_of(settings)
    particles = draw_particles(settings)
    variance = _signal_variance(particles, phantom, settings)
    scale = float(np.sqrt(settings.snr / variance))
    with replacing_directory(output, ours=OURS) as folder:
        _write_stacks(folder, particles, phantom, settings, scale)
        _write_states(folder / "truth" / "volumes", folder / "consensus.mrc", phantom, settings, scale)
        write_star(folder / "particles.star", particles)
        write_cs(folder / "particles.cs", particles)
        write_truth(folder / "truth" / "truth.parquet", particles, settings)
        measured: dict[str, float | str] = {
            "grey_scale": scale,
            "noise_standard_deviation": 1.0,
            "junk_particles": int(particles.junk.sum()),
            "atoms": phantom.weight.shape[-1],
        }
        if settings.structure is not None:
            measured["structure_sha256"] = sha256(Path(settings.structure).read_bytes()).hexdigest()
        write_description(folder / "simulate.json", settings, measured)
    log.info("simulated %d particles of %d px in %s", settings.particles, settings.box_size, output)
