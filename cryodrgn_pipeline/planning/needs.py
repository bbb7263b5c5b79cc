"""What one job holds, writes and takes, by formula, from N particles, box and settings.

`Needs` are what is expected; `planning.jobs` adds the margins that a job asks for on top. Formulas of memory
that steer a step (the subspace's, that of volumes from particles) stand beside it and are used here. What was
measured against these is in docs/scaling.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cryodrgn_pipeline.config.models import Analyze, Consensus, Preprocess, Train, Volumes
from cryodrgn_pipeline.fourier.sizes import PADDING, half_grid_points, half_plane_points
from cryodrgn_pipeline.particle_volumes_memory import GIB, SHARE, sums_bytes, work_bytes
from cryodrgn_pipeline.subspace.levels import levels_of
from cryodrgn_pipeline.subspace.memory import affordable, affordable_curves, learning_bytes

PROGRAM_BYTES = 350e6  # Python with torch, compiled kernels and their compiler
TABLES_BYTES = 150e6  # ... without torch
TABLE_BYTES = 1000  # in memory, per row of a particle table while it is read
ROW_BYTES = 250  # ... and on disk
CHUNK_BYTES = 64 * 2**20  # of images in work

KERNELS_PER_S = 1.2e9  # multiply-adds of the compiled kernels, per core
GPU_KERNELS_PER_S = 3e10  # ... of the same in torch, on a GPU
NETWORK_PER_S = 2e10  # ... of a network's matrix products
GPU_PER_S = 1e13  # ... on a GPU
TRANSFORMS_PER_S = 2e9  # operations of FFTs, per core
DISK_PER_S = 2e8  # bytes of images, read in order
THREADS_SHARE = 0.7  # of a thread beyond the first that comes out as speed
COMPILING_S = 60.0  # where kernels have to be compiled first

KERNEL_MAPS = 13  # of the default model: the mean and the functions
CURVED_MAPS = 3
START_STEPS, START_BATCH, START_MULTIPLY_ADDS = 40_000, 256, 36_000  # of the network in the span of the maps
GRIDS = 27  # padded half spectra held at once, float32, from the sums of two half sets to their FSC
WIDTHS = 4
SHARED_BYTES = 8 * GIB  # volumes from particles share passes over the images up to here
CENTERS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Expected of one job: peak of anonymous memory, wall time, and what it leaves on disk."""

    memory_bytes: float
    seconds: float
    disk_bytes: float


def cores(threads: int) -> float:
    """How many times faster than one thread."""
    return 1 + THREADS_SHARE * (threads - 1)


def transform_seconds(size: int) -> float:
    """One real transform of a `size`³ box on one core."""
    points = size**3
    return 2.5 * points * max(1, points.bit_length()) / TRANSFORMS_PER_S


def fetch_needs(particles: int) -> Needs:
    """A job of cryoSPARC read into a file; the images stay where they are."""
    return Needs(
        memory_bytes=TABLES_BYTES + TABLE_BYTES * particles,
        seconds=60 + 2e-5 * particles,
        disk_bytes=500e6 + 2 * ROW_BYTES * particles,  # maps of any box go along
    )


def import_needs(particles: int) -> Needs:
    """The particle table in its canonical form."""
    return Needs(
        memory_bytes=TABLES_BYTES + TABLE_BYTES * particles,
        seconds=5 + 2e-5 * particles,
        disk_bytes=ROW_BYTES * particles,
    )


def preprocess_needs(
    particles: int, source_box_px: int, box_size_px: int, given: Preprocess, threads: int
) -> Needs:
    """Images read once, centred, cropped, written once."""
    source, stored = source_box_px**2, box_size_px**2
    stored_bytes = stored * (2 if given.dtype == "float16" else 4)
    moving = (4 * source + stored_bytes) / DISK_PER_S
    working = (8e-9 * source + 8e-9 * stored) / cores(threads)
    return Needs(
        memory_bytes=PROGRAM_BYTES
        + TABLE_BYTES * particles
        + 2 * CHUNK_BYTES * stored / source
        + threads * 32 * 4 * (4 * source + 6 * stored),
        seconds=10 + particles * max(moving, working),
        disk_bytes=particles * (stored_bytes + ROW_BYTES),
    )


def consensus_needs(particles: int, box_size_px: int, given: Consensus, threads: int) -> Needs:
    """Two half maps by backprojection, and the hypotheses of the convention check."""
    points = half_plane_points(box_size_px)
    padded = half_grid_points(PADDING * box_size_px)
    a_pass = particles * max(3 * 8 * points / KERNELS_PER_S / cores(threads), 4 * box_size_px**2 / DISK_PER_S)
    check = 0.0 if given.check in ("off", False) else 60.0
    return Needs(
        memory_bytes=PROGRAM_BYTES + TABLE_BYTES * particles + 4 * CHUNK_BYTES + 4 * padded * GRIDS,
        seconds=COMPILING_S + check + a_pass + 30 * transform_seconds(PADDING * box_size_px),
        disk_bytes=4 * 4 * box_size_px**3,
    )


def select_needs(particles: int) -> Needs:
    """Ids chosen from an analysed table."""
    return Needs(
        memory_bytes=TABLES_BYTES + 500 * particles, seconds=5 + 2e-6 * particles, disk_bytes=60 * particles
    )


def export_needs(particles: int, kept: int) -> Needs:
    """Rows of the source's own table, every column of it."""
    return Needs(
        memory_bytes=TABLES_BYTES + 1600 * particles,
        seconds=5 + 3e-5 * particles,
        disk_bytes=500 * kept,
    )


def train_needs(
    particles: int, box_size_px: int, given: Train, *, threads: int, gpus: int, nodes: int
) -> Needs:
    """Learning, by whatever model; what it starts from is learnt in the same job.

    Memory, threads and GPUs are those of each node; there is a process for each GPU.
    """
    trained = given.method == "vae" and (given.encoder == "image" or given.decoder == "mlp")
    starts = not trained or given.encoder == "subspace" or given.decoder == "basis"
    learning = _subspace_needs(particles, box_size_px, given, threads, gpus, nodes) if starts else None
    if learning is not None:  # each process holds the sums of all images
        learning = replace(learning, memory_bytes=max(1, gpus) * learning.memory_bytes)
    training = _network_needs(particles, box_size_px, given, threads, gpus, nodes) if trained else None
    parts = [part for part in (learning, training) if part is not None]
    return Needs(
        memory_bytes=max(part.memory_bytes for part in parts),
        seconds=sum(part.seconds for part in parts),
        disk_bytes=sum(part.disk_bytes for part in parts),
    )


def _subspace_needs(
    particles: int, box_size_px: int, given: Train, threads: int, gpus: int, nodes: int
) -> Needs:
    linear = given.method == "subspace"
    components = given.latent_dim if linear else KERNEL_MAPS - 1
    if linear:
        curved, exact = affordable_curves(box_size_px, components, 5)
        final = 1 + components + curved * (curved + 1) // 2
    else:
        most, exact = affordable(box_size_px, components, 5)
        final = 1 + most
    tried = 1 + components
    taught = min(particles, given.learn_from)
    read_s = 4 * box_size_px**2 / DISK_PER_S
    levels = levels_of(box_size_px)
    # of one process: it solves for itself, and shares the passes with the others
    alone = GPU_KERNELS_PER_S if gpus else KERNELS_PER_S * cores(threads)
    solving, per_s, seconds = alone / KERNELS_PER_S, alone * nodes * max(1, gpus), COMPILING_S
    for number, level in enumerate(levels):
        images = taught if number else min(taught, 50_000)
        iterations = 3 if number else 20  # with and without offsets of poses
        sums, looks = _passes(level, tried)
        seconds += iterations * images * (sums + looks) / per_s
        seconds += iterations * _solve_seconds(level, tried, 4) / solving
        seconds += (3 if number else 1) * taught * read_s
    # maps from those that teach; then where all lie, twice where poses are off, and on the functions' maps
    for box in {levels[-1], box_size_px}:
        sums, _ = _passes(box, final)
        seconds += taught * (sums / per_s + 2 * read_s) + _solve_seconds(box, final, exact) / solving
    for maps in (tried, tried) if linear else (tried, tried, final):
        _, looks = _passes(levels[-1], maps)
        seconds += particles * (looks / per_s + read_s)
    if not linear and given.decoder == "basis":
        seconds += START_STEPS * START_BATCH * START_MULTIPLY_ADDS / NETWORK_PER_S
    return Needs(
        memory_bytes=PROGRAM_BYTES
        + TABLE_BYTES * particles
        + learning_bytes(
            particles,
            taught,
            box_size_px,
            tried,
            (final, exact),
            level_maps=1 if linear else tried,
        ),
        seconds=seconds,
        disk_bytes=particles * (200 + 4 * given.latent_dim * (given.latent_dim + 5) / 2)
        + 2 * (final + tried) * 4 * box_size_px**3,
    )


def _passes(box_size_px: int, maps: int) -> tuple[float, float]:
    """Multiply-adds an image of a pass that sums, and of one that looks."""
    points, pairs = half_plane_points(box_size_px), maps * (maps + 1) // 2
    return 8 * points * (2 * maps + pairs), points * (16 * maps + 2 * pairs)


def _solve_seconds(box_size_px: int, maps: int, iterations: int) -> float:
    pairs = maps * (maps + 1) // 2
    of_steps = (iterations + 1) * 4 * maps * transform_seconds(PADDING * box_size_px)
    return of_steps + 4 * pairs * transform_seconds((PADDING if iterations else 1) * box_size_px)


def _network_needs(
    particles: int, box_size_px: int, given: Train, threads: int, gpus: int, nodes: int
) -> Needs:
    """cryoDRGN's autoencoder and its relatives, epoch by epoch."""
    points = half_plane_points(box_size_px) * given.mask_radius**2
    radius = given.mask_radius if given.encoder_mask_radius is None else given.encoder_mask_radius
    read = half_plane_points(box_size_px) * radius**2
    encoder = decoder = 0.0
    if given.encoder == "image":
        encoder = given.encoder_width * (2 * read + given.encoder_layers * given.encoder_width)
    if given.decoder == "mlp":
        fed = 3 * box_size_px + given.latent_dim
        decoder = given.decoder_width * (fed + given.decoder_layers * given.decoder_width)
    drawn = points * given.coordinate_fraction
    aligned = given.encoder == "image" and given.encoder_input == "aligned"
    data = 8.0 * particles * (points + (read if aligned else 0))
    held = data if given.in_memory else 0.0 if given.in_memory is False else _held_if_free(data)
    activations = 4 * drawn * given.batch_size * given.decoder_width * (2 * given.decoder_layers + 2)
    weights = 4 * (encoder + decoder)
    work = 3 * (drawn * decoder + encoder)
    per_s = nodes * (GPU_PER_S * gpus if gpus else NETWORK_PER_S * cores(threads))
    reading = 0.0 if held else 4 * box_size_px**2 / DISK_PER_S
    saved = given.epochs // given.checkpoint_every_epochs + 1
    return Needs(
        memory_bytes=max(1, gpus)
        * (
            PROGRAM_BYTES * (4 if gpus else 1)
            + TABLE_BYTES * particles
            + held
            + 4 * weights
            + (0 if gpus else activations)
            + 4 * CHUNK_BYTES
        ),
        seconds=60 + particles * (given.epochs + 1) * max(work / per_s, reading),
        disk_bytes=(saved + 2 * 3) * weights + particles * (100 + 8 * given.latent_dim),
    )


def _held_if_free(data_bytes: float) -> float:
    """What makes a training that may choose keep its data in memory: it takes half of what is free."""
    return 2 * data_bytes if data_bytes <= 16 * GIB else 0.0


def analyze_needs(particles: int, latent_dim: int, given: Analyze) -> Needs:
    """Components, clusters, paths, and the UMAP of a sample."""
    fitted = min(particles, given.umap_max_particles) if given.umap else 0
    return Needs(
        memory_bytes=PROGRAM_BYTES + particles * (300 + 40 * latent_dim) + 4000 * fitted,
        seconds=60 + 1e-4 * particles + 2e-3 * fitted,
        disk_bytes=particles * (60 + 4 * latent_dim),
    )


def points_of(series: str, given: Analyze) -> int:
    """How many volumes a series has."""
    if series != "centers":
        return given.traversal_points
    return CENTERS if given.clusters == "auto" else given.clusters


def volumes_needs(
    particles: int, box_size_px: int, points: int, train: Train, given: Volumes, threads: int, gpus: int
) -> Needs:
    """Maps of a series, drawn by the model or from the images."""
    maps = 1 + train.latent_dim + CURVED_MAPS if train.method == "subspace" else KERNEL_MAPS
    written = given.crop_px or given.box_size_px or box_size_px
    if given.source == "particles":
        return _particle_volumes_needs(particles, box_size_px, points, maps, written, given, threads)
    drawn = given.box_size_px or box_size_px
    seconds = 30 + points * 4 * transform_seconds(PADDING * drawn)
    if train.method == "vae" and train.decoder == "mlp":
        weights = train.decoder_width * (3 * box_size_px + train.decoder_layers * train.decoder_width)
        per_s = GPU_PER_S * gpus if gpus else NETWORK_PER_S * cores(threads)
        seconds += points * drawn**3 * weights / per_s
    return Needs(
        memory_bytes=PROGRAM_BYTES * (4 if gpus else 1)
        + 500 * particles
        + 4 * 2 * maps * box_size_px**3
        + 4 * 24 * drawn**3,
        seconds=seconds,
        disk_bytes=points * 4 * written**3,
    )


def _particle_volumes_needs(
    particles: int, box_size_px: int, points: int, maps: int, written: int, given: Volumes, threads: int
) -> Needs:
    """As `plan_passes` shares the passes, in the memory that it is given or up to 8 GiB of sums."""
    kept = 4 * maps * box_size_px**3
    beside = kept + max(maps * 8 * half_grid_points(PADDING * box_size_px), work_bytes(box_size_px))

    def sums(count: int) -> int:
        return sums_bytes(box_size_px, count, WIDTHS, with_model=True)

    if given.memory_gb is not None:
        limit = given.memory_gb * GIB
        share = 1.0
    else:
        limit, share = beside + max(sums(1), SHARED_BYTES), SHARE
    at_once = max([1, *(count for count in range(1, points + 1) if beside + sums(count) <= limit)])
    held = limit if given.memory_gb is not None else (beside + sums(at_once)) / share
    passes = -(-points // at_once)
    halves = 3 if given.independent_halves else 1
    work = 8 * half_plane_points(box_size_px) * (5 * (passes + points / 4) + 2 * maps * passes)
    reading = passes * 4 * box_size_px**2 / DISK_PER_S
    return Needs(
        memory_bytes=PROGRAM_BYTES + TABLE_BYTES * particles + held,
        seconds=halves
        * (
            COMPILING_S
            + particles * max(work / KERNELS_PER_S / cores(threads), reading)
            + points * 100 * transform_seconds(PADDING * box_size_px) / cores(threads)
        ),
        disk_bytes=3 * points * 4 * written**3,
    )


def report_needs(particles: int, latent_dim: int) -> Needs:
    """The page and its figures."""
    return Needs(
        memory_bytes=2 * TABLES_BYTES + particles * (300 + 40 * latent_dim),
        seconds=60 + 5e-5 * particles,
        disk_bytes=50e6,
    )


def push_needs(particles: int, latent_dim: int) -> Needs:
    """Tables and maps sent to cryoSPARC; what stays here is a receipt."""
    return Needs(
        memory_bytes=TABLES_BYTES + particles * (TABLE_BYTES + 16 * latent_dim),
        seconds=300 + 1e-4 * particles,
        disk_bytes=1e6,
    )
