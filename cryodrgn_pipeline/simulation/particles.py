"""Draw the particles: states, poses, optics, defocus, and what the user's tables say about them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryodrgn_pipeline.particles import Ctf, ImageRef, Optics, ParticleSet, Poses
from cryodrgn_pipeline.simulation.assembly import MOST_SPECIES
from cryodrgn_pipeline.simulation.phantom import MOTIONS

Array = NDArray[np.float64]

PARTICLES_PER_MICROGRAPH = 50
MICROGRAPH_SIZE_PX = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that decides a simulated set; the same settings give the same bytes.

    Lengths in Å, angles in degrees, boxes in pixels, fractions from 0 to 1. `snr` is the variance of the
    CTF-filtered signal over that of the noise, per pixel of the whole image, without DC.
    """

    box_size: int = 32
    particles: int = 2000
    pixel_size_a: float = 6.0
    particle_diameter_a: float | None = None
    atoms: int | None = None
    snr: float = 0.2
    seed: int = 0
    structure_seed: int = 0
    structure: str | None = None
    hinge_chain: str | None = None
    absent_chain: str | None = None
    motion: str = "hinge"
    motion_range: float = 90.0
    occupancy: float = 0.6
    orientations: str = "uniform"
    shift_percent: float = 6.0
    defocus_min_um: float = 0.6
    defocus_max_um: float = 3.0
    astigmatism_a: float = 400.0
    voltage_kv: float = 300.0
    cs_mm: float = 2.7
    amplitude_contrast: float = 0.1
    phase_shift_deg: float = 0.0
    b_factor_a2: float = 100.0
    noise_colour: float = 0.0
    contrast_spread: float = 0.0
    junk: float = 0.0
    pose_error_deg: float = 0.0
    shift_error_a: float = 0.0
    optics_groups: int = 2
    pixel_size_spread: float = 0.0
    stacks: int = 2
    states: int = 21
    species: int = 0
    dark_on_light: bool = False

    def __post_init__(self) -> None:
        checks = {
            "box_size": self.box_size >= 8 and self.box_size % 2 == 0,
            "particles": self.particles >= 1,
            "pixel_size_a": self.pixel_size_a > 0,
            "snr": self.snr > 0,
            "motion": self.motion in MOTIONS,
            "occupancy": 0 <= self.occupancy <= 1,
            "junk": 0 <= self.junk <= 1,
            "orientations": self.orientations in ("uniform", "preferred"),
            "defocus_max_um": self.defocus_min_um <= self.defocus_max_um,
            "shift_percent": 0 <= self.shift_percent <= 25,
            "noise_colour": self.noise_colour >= 0,
            "contrast_spread": self.contrast_spread >= 0,
            "optics_groups": self.optics_groups >= 1,
            "stacks": self.stacks >= 1,
            "states": self.states >= 2,
            "species": self.species in (0, *range(2, MOST_SPECIES + 1)),
        }
        for name, good in checks.items():
            if not good:
                raise ValueError(f"{name.replace('_', '-')} cannot be {getattr(self, name)}")
        if self.structure is not None and (self.particle_diameter_a or self.atoms):
            raise ValueError("a structure has its own size: leave the particle diameter away")
        if self.structure is not None and self.species:
            raise ValueError("species are made up: leave the structure away")
        if self.structure is None and (self.hinge_chain or self.absent_chain):
            raise ValueError("chains are those of a structure: name a PDB file as well")

    @property
    def diameter_a(self) -> float:
        """Diameter in Å of the sphere that holds the particle: 0.62 of the box unless told."""
        return self.particle_diameter_a or 0.62 * self.box_size * self.pixel_size_a

    @property
    def atom_count(self) -> int:
        """Number of atoms; by default it grows with the box, so that finer boxes hold finer detail."""
        return self.atoms or int(np.clip(400 * (self.box_size / 64) ** 2, 300, 4000))

    @property
    def sigma_a(self) -> float:
        """Width of an atom in Å: it leaves a sixth of the amplitude at Nyquist."""
        return 0.6 * self.pixel_size_a


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedParticles:
    """N particles in the order of their tables.

    `reported` is what the tables say; `poses` the truth; `motion` `(N,)` in 0…1; `occupancy` `(N,)` 0 or 1;
    `contrast` `(N,)`; `junk` `(N,)`; `species` `(N,)` from 0; `uid` `(N,)` uint64; `written` `(N,)` is each
    particle's place in the order in which the images are written.
    """

    reported: ParticleSet
    poses: Poses
    motion: Array
    occupancy: Array
    contrast: Array
    junk: NDArray[np.bool_]
    uid: NDArray[np.uint64]
    written: NDArray[np.int64]
    species: NDArray[np.int64]


def viewing_rotations(count: int, rng: np.random.Generator, *, preferred: bool) -> Array:
    """Rotations `(count, 3, 3)`, object to image; `preferred` crowds the views around one axis and its back.

    The viewing direction in the object's frame is the third row of a rotation.
    """
    if not preferred:
        return Rotation.random(count, rng=rng).as_matrix()  # type: ignore[no-any-return]
    cosine = np.clip(1 - rng.exponential(0.25, size=count), -1, 1) * rng.choice([-1.0, 1.0], size=count)
    angles = np.stack(
        [
            rng.uniform(-180, 180, size=count),
            np.rad2deg(np.arccos(cosine)),
            rng.uniform(-180, 180, size=count),
        ],
        axis=1,
    )
    rotation: Array = Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix()
    return rotation.transpose(0, 2, 1)


def _table_order(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows by micrograph, but shuffled within and between: table order is never image order."""
    micrograph = np.arange(count) // PARTICLES_PER_MICROGRAPH
    rank = rng.permutation(micrograph[-1] + 1)[micrograph]
    return np.lexsort((rng.uniform(size=count), rank)).astype(np.int64)


def _defocus(settings: Settings, micrograph: NDArray[np.int64], rng: np.random.Generator) -> Ctf:
    count, films = len(micrograph), int(micrograph.max()) + 1
    mean = rng.uniform(settings.defocus_min_um * 1e4, settings.defocus_max_um * 1e4, size=films)[micrograph]
    mean = mean + rng.normal(0, 100.0, size=count)  # particles lie at several heights in the ice
    spread = np.abs(rng.normal(0, settings.astigmatism_a, size=films))[micrograph]
    return Ctf(
        defocus_u_a=mean + spread / 2,
        defocus_v_a=mean - spread / 2,
        defocus_angle_deg=rng.uniform(0, 180, size=films)[micrograph],
        phase_shift_deg=np.full(count, settings.phase_shift_deg),
    )


def _optics(settings: Settings, group: NDArray[np.int64]) -> Optics:
    last = max(settings.optics_groups - 1, 1)
    return Optics(
        optics_group=group + 1,
        pixel_size_a=settings.pixel_size_a * (1 + settings.pixel_size_spread * group / last),
        box_size_px=np.full(len(group), settings.box_size, dtype=np.int64),
        voltage_kv=np.full(len(group), settings.voltage_kv),
        cs_mm=np.full(len(group), settings.cs_mm),
        amplitude_contrast=np.full(len(group), settings.amplitude_contrast),
    )


def draw_particles(settings: Settings) -> SimulatedParticles:
    """Draw all N particles; images are made later, a chunk at a time."""
    n = settings.particles
    rng = np.random.default_rng([settings.seed, 0xD2A])
    order = _table_order(n, rng)
    micrograph = order // PARTICLES_PER_MICROGRAPH
    per_stack = -(-n // settings.stacks)
    poses = Poses(
        rotation=viewing_rotations(n, rng, preferred=settings.orientations == "preferred"),
        shift_a=rng.uniform(-1, 1, size=(n, 2))
        * (settings.shift_percent / 100 * settings.box_size * settings.pixel_size_a),
    )
    tilt = Rotation.from_rotvec(rng.normal(0, np.deg2rad(settings.pose_error_deg) / np.sqrt(3), size=(n, 3)))
    reported_poses = Poses(
        rotation=tilt.as_matrix() @ poses.rotation,
        shift_a=poses.shift_a + rng.normal(0, settings.shift_error_a, size=(n, 2)),
    )
    ids = [f"{image % per_stack + 1:06d}@{stack_name(image // per_stack)}" for image in order.tolist()]
    reported = ParticleSet(
        particle_id=np.array(ids, dtype=object),
        images=ImageRef(
            stack_paths=tuple(stack_name(k) for k in range(-(-n // per_stack))),
            stack=order // per_stack,
            index=order % per_stack,
        ),
        optics=_optics(settings, micrograph % settings.optics_groups),
        ctf=_defocus(settings, micrograph, rng),
        poses=reported_poses,
        contrast_sign=np.full(n, -1.0 if settings.dark_on_light else 1.0),
        half_set=rng.permutation(n) % 2 + 1,
        micrograph=np.array(
            [f"micrographs/{film + 1:05d}.mrc" for film in micrograph.tolist()], dtype=object
        ),
    )
    return SimulatedParticles(
        reported=reported,
        poses=poses,
        motion=np.full(n, 0.5) if settings.motion == "none" else rng.uniform(size=n),
        occupancy=(rng.uniform(size=n) < settings.occupancy).astype(np.float64),
        contrast=np.clip(rng.normal(1, settings.contrast_spread, size=n), 0.2, None),
        junk=rng.uniform(size=n) < settings.junk,
        uid=_unique_ids(n, rng),
        written=order,
        species=rng.integers(max(1, settings.species), size=n),
    )


def stack_name(number: int) -> str:
    """Path of a stack beside the tables."""
    return f"stacks/stack_{number:03d}.mrcs"


def _unique_ids(count: int, rng: np.random.Generator) -> NDArray[np.uint64]:
    """Random 64-bit ids, all above 2^53 as cryoSPARC's are; a low-bits counter keeps them apart."""
    high = rng.integers(1 << 31, 1 << 40, size=count, dtype=np.uint64)
    return (high << np.uint64(24)) | rng.permutation(count).astype(np.uint64)
