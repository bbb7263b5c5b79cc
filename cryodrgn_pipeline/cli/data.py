"""The verbs of this part of the command line: import, preprocess, phase-flip, consensus, export, simulate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cryodrgn_pipeline.cli._app import DATA, Nodes, Processes, app, in_processes, say
from cryodrgn_pipeline.cli._choice import Cluster, Invert, NoJunk, Outline, Range, Where, selection

if TYPE_CHECKING:
    from numpy.typing import NDArray


@app.command("import", rich_help_panel=DATA)
def import_verb(
    particles: Annotated[Path, typer.Argument(help="RELION .star or cryoSPARC .cs file of a 3D refinement.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write into.")],
    passthrough: Annotated[
        list[Path] | None,
        typer.Option(help="cryoSPARC passthrough .cs file of the same job; may be repeated."),
    ] = None,
    datadir: Annotated[
        Path | None,
        typer.Option(help="Folder that the image paths are relative to: the project folder."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Overwrite a column for all particles, such as pixel_size_a=1.31; may be repeated.",
        ),
    ] = None,
    metadata_only: Annotated[
        bool, typer.Option("--metadata-only", help="Do not look for the image files.")
    ] = False,
    class_number: Annotated[
        int | None,
        typer.Option("--class", metavar="K", min=0, help="Take the particles and poses of this class only."),
    ] = None,
    transpose_rotations: Annotated[
        bool, typer.Option("--transpose-rotations", help="Remedy: the rotations are the inverse ones.")
    ] = False,
    negate_shifts: Annotated[
        bool, typer.Option("--negate-shifts", help="Remedy: the shifts have the other sign.")
    ] = False,
    shift_scale: Annotated[
        float, typer.Option(min=0, help="Remedy: multiply the shifts, as for another pixel size.")
    ] = 1.0,
    mirror_hand: Annotated[
        bool, typer.Option("--mirror-hand", help="Remedy: the poses belong to the mirror image.")
    ] = False,
) -> None:
    """Read the poses and CTFs of a consensus refinement and bring them into one convention.

    Understands RELION 3.0 to 5 (.star) and cryoSPARC (.cs, with its
    passthrough file). Images are looked for in --datadir, the working
    directory, and upwards from the particle file. Writes particles.parquet
    and import.json. The remedies are for poses that break their package's
    convention: `consensus` names them.

    Example: cryodrgn-pipeline import run_data.star -o results/import
    """
    from cryodrgn_pipeline.conventions import Remedies
    from cryodrgn_pipeline.errors import ConfigError
    from cryodrgn_pipeline.importing import ImportOptions, import_particles

    try:
        remedies = Remedies(
            transpose_rotations=transpose_rotations,
            negate_shifts=negate_shifts,
            shift_scale=shift_scale,
            mirror_hand=mirror_hand,
        )
    except ValueError as error:
        raise ConfigError(f"import: {error}") from error
    options = ImportOptions(
        passthrough=tuple(passthrough or ()),
        datadir=datadir,
        assignments=tuple(assignments or ()),
        metadata_only=metadata_only,
        class_number=class_number,
        remedies=remedies,
    )
    import_particles(particles, output, options)
    typer.echo(output / "particles.parquet")


@app.command("export", rich_help_panel=DATA)
def export_verb(
    import_dir: Annotated[Path, typer.Argument(help="Folder of an import.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write: .star or .cs.")],
    subset: Annotated[
        Path | None, typer.Option(help="Text file, one particle id per line; all particles without it.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Folder that train wrote, to choose by what it found:")
    ] = None,
    cluster: Cluster = None,
    range_: Range = None,
    where: Where = None,
    outline: Outline = None,
    no_junk: NoJunk = False,
    invert: Invert = False,
) -> None:
    """Write imported particles, or a subset of them, as a RELION or cryoSPARC file.

    A file of the source's own kind is the original table with rows left
    out: all columns, the order and every value stay as they were (a .cs
    passthrough file is cut beside it). The other kind is made from the poses
    and CTFs, with remedies and --set values applied. Beside a .cs file goes
    a .csg for cryoSPARC's Import Result Group. With --run the subset is what
    `select` would choose by the same options.

    Example: cryodrgn-pipeline export results/import --run results/run_8d --cluster 0,3 -o open.star
    """
    from cryodrgn_pipeline.errors import ConfigError
    from cryodrgn_pipeline.exporting import export_particles
    from cryodrgn_pipeline.landscape.select import select_particles

    wanted = selection(cluster, range_, where, outline, [subset] if subset else [], no_junk, invert)
    chosen: Path | NDArray[Any] | None = subset
    if run is not None:
        chosen, _ = select_particles(run, wanted)
    elif cluster or range_ or where or outline or no_junk or invert:
        raise ConfigError("--cluster, --range, --where, --outline, --no-junk and --invert need --run RUN")
    for path in export_particles(import_dir, output, chosen).files:
        typer.echo(path)


@app.command("simulate", rich_help_panel=DATA)
def simulate_verb(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; replaced when whole.")],
    box_size: Annotated[int, typer.Option(help="Box in pixels, even.")] = 32,
    particles: Annotated[int, typer.Option(help="How many particles.")] = 2000,
    pixel_size: Annotated[float, typer.Option(help="Pixel size in Å.")] = 6.0,
    snr: Annotated[
        float, typer.Option(help="Variance of the signal over that of the noise, per pixel.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Same seed and options, same bytes.")] = 0,
    motion: Annotated[str, typer.Option(help="What the arm does: hinge, twist, slide or none.")] = "hinge",
    motion_range: Annotated[float, typer.Option(help="Whole range: degrees, or Å for slide.")] = 90.0,
    occupancy: Annotated[float, typer.Option(help="Share of particles that have the subunit.")] = 0.6,
    orientations: Annotated[str, typer.Option(help="uniform or preferred.")] = "uniform",
    shift_percent: Annotated[float, typer.Option(help="Largest shift, in percent of the box.")] = 6.0,
    defocus_min: Annotated[float, typer.Option(help="Smallest defocus in µm.")] = 0.6,
    defocus_max: Annotated[float, typer.Option(help="Largest defocus in µm.")] = 3.0,
    astigmatism: Annotated[float, typer.Option(help="Spread of the astigmatism in Å.")] = 400.0,
    phase_shift: Annotated[float, typer.Option(help="Phase plate, degrees.")] = 0.0,
    b_factor: Annotated[float, typer.Option(help="Envelope of the images in Å².")] = 100.0,
    noise_colour: Annotated[
        float, typer.Option(help="Excess of noise power at low frequency; 0 is white, 3 is strong.")
    ] = 0.0,
    contrast_spread: Annotated[float, typer.Option(help="Spread of the contrast among particles.")] = 0.0,
    junk: Annotated[float, typer.Option(help="Share of particles that are debris.")] = 0.0,
    pose_error: Annotated[float, typer.Option(help="Error of the written rotations, degrees.")] = 0.0,
    shift_error: Annotated[float, typer.Option(help="Error of the written shifts, Å.")] = 0.0,
    optics_groups: Annotated[int, typer.Option(help="Number of optics groups.")] = 2,
    pixel_size_spread: Annotated[
        float, typer.Option(help="The last group's pixel is larger by this fraction, the others between.")
    ] = 0.0,
    particle_diameter: Annotated[
        float | None, typer.Option(help="In Å; 0.62 of the box if not given.")
    ] = None,
    structure_seed: Annotated[int, typer.Option(help="Places the atoms within the domains.")] = 0,
    structure: Annotated[
        Path | None, typer.Option(help="PDB file: this atomic model in place of the made-up molecule.")
    ] = None,
    hinge_chain: Annotated[
        str | None,
        typer.Option(help="With --structure: what moves, such as B or A:1385-1760; default half of it."),
    ] = None,
    absent_chain: Annotated[
        str | None, typer.Option(help="With --structure: the subunit that may be absent; default one end.")
    ] = None,
    stacks: Annotated[int, typer.Option(help="Number of image stacks.")] = 2,
    states: Annotated[int, typer.Option(help="Truth volumes along the motion.")] = 21,
    species: Annotated[
        int, typer.Option(help="A mixture of so many distinct species, in place of motion and occupancy.")
    ] = 0,
    dark_on_light: Annotated[
        bool, typer.Option("--dark-on-light", help="Write dark particles (.cs blob/sign = -1).")
    ] = False,
) -> None:
    """Make a particle set with known answers, as RELION and as cryoSPARC would hand it over.

    A molecule whose arm moves continuously and whose subunit is there or not (made up, or an atomic model),
    or a mixture of distinct species, seen from all sides through a CTF and noise. Writes particles.star,
    particles.cs, stacks/, consensus.mrc and truth/.

    Example: cryodrgn-pipeline simulate --particles 4000 --snr 0.2 -o simulated
    """
    from cryodrgn_pipeline.errors import ConfigError
    from cryodrgn_pipeline.simulate import Settings, simulate

    try:
        settings = Settings(
            box_size=box_size,
            particles=particles,
            pixel_size_a=pixel_size,
            particle_diameter_a=particle_diameter,
            snr=snr,
            seed=seed,
            structure_seed=structure_seed,
            structure=None if structure is None else str(structure),
            hinge_chain=hinge_chain,
            absent_chain=absent_chain,
            motion=motion,
            motion_range=motion_range,
            occupancy=occupancy,
            orientations=orientations,
            shift_percent=shift_percent,
            defocus_min_um=defocus_min,
            defocus_max_um=defocus_max,
            astigmatism_a=astigmatism,
            phase_shift_deg=phase_shift,
            b_factor_a2=b_factor,
            noise_colour=noise_colour,
            contrast_spread=contrast_spread,
            junk=junk,
            pose_error_deg=pose_error,
            shift_error_a=shift_error,
            optics_groups=optics_groups,
            pixel_size_spread=pixel_size_spread,
            stacks=stacks,
            states=states,
            species=species,
            dark_on_light=dark_on_light,
        )
    except ValueError as error:
        raise ConfigError(f"simulate: {error}") from error
    simulate(settings, output)
    typer.echo(output / "particles.star")
    typer.echo(output / "particles.cs")


@app.command("preprocess", rich_help_panel=DATA)
def preprocess_verb(
    import_dir: Annotated[Path, typer.Argument(help="Folder that import wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write: the stack.")],
    box_size: Annotated[int, typer.Option(help="Even box in pixels to Fourier-crop to.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32, or float16 for half the disk.")] = "float32",
    window: Annotated[bool, typer.Option(help="Fade the corners of the box out.")] = True,
    window_radius: Annotated[
        float,
        typer.Option(
            "--window-radius", "--window-inner", help="The window is 1 inside this fraction of half the box"
        ),
    ] = 0.85,
    window_falloff: Annotated[
        float,
        typer.Option("--window-falloff", "--window-outer", help="and falls linearly to 0 at this fraction."),
    ] = 0.99,
    mask_radius_a: Annotated[
        float | None,
        typer.Option(help="Circular mask of this radius in Å, soft edge: against micelles and neighbours."),
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Images read at once; default about 64 MiB.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default all there are.")] = None,
) -> None:
    """Make one stack to train on: centred, light on dark, cropped, windowed.

    Writes images.mrcs, particles.parquet, noise.parquet and stack.json. Images are neither phase-flipped nor
    whitened. A stack of the same particles and options that is there already is kept.

    Example: cryodrgn-pipeline preprocess imported --box-size 128 -o stack_128
    """
    from cryodrgn_pipeline.preprocess import PreprocessSettings, preprocess

    settings = PreprocessSettings(
        box_size_px=box_size,
        dtype=dtype,
        window=window,
        window_radius=window_radius,
        window_falloff=window_falloff,
        mask_radius_a=mask_radius_a,
    )
    stack = preprocess(import_dir, output, settings, chunk_size=chunk_size, threads=threads)
    typer.echo(stack.path)


@app.command("phase-flip", rich_help_panel=DATA)
def phase_flip_verb(
    import_dir: Annotated[Path, typer.Argument(help="Folder that import wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Stack to write: .mrcs.")],
    box_size: Annotated[
        int | None, typer.Option(help="Even box in pixels to Fourier-crop to; default the original.")
    ] = None,
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Images read at once; default about 64 MiB.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default all there are.")] = None,
) -> None:
    """Write the original images with their phases flipped by the sign of the CTF.

    One float32 stack in the order of the particle table. Nothing else is done to them. Training does not need
    it: it flips by itself.

    Example: cryodrgn-pipeline phase-flip imported -o flipped.mrcs
    """
    from cryodrgn_pipeline.phase_flip import phase_flip

    phase_flip(import_dir, output, box_size_px=box_size, chunk_size=chunk_size, threads=threads)
    typer.echo(output)


@app.command("consensus", rich_help_panel=DATA)
def consensus_verb(
    stack: Annotated[Path, typer.Argument(help="Folder that preprocess made.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Your consensus map of the same refinement: it judges hand and pixel size as well."
        ),
    ] = None,
    check: Annotated[
        str, typer.Option(help="Where the data contradict a convention: stop, warn, or off (no check).")
    ] = "stop",
    mask: Annotated[
        Path | None, typer.Option(help="Soft mask for the FSC, in any box; default from the map.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws half sets where the source has none.")] = 0,
    processes: Processes = 1,
    nodes: Nodes = 1,
) -> None:
    """Reconstruct the consensus map in two halves, and check the conventions against the data.

    Writes map.mrc, half1.mrc, half2.mrc, mask.mrc, fsc.parquet and consensus.json. The check tries rotations
    transposed, shifts negated or in another unit, contrast inverted and (with --reference) the other hand and
    pixel size; where the data clearly disagree it exits with code 3 and names the line that mends it.
    --nodes share the images; the check is made on the first one.

    Example: cryodrgn-pipeline consensus stack_128 --reference run_class001.mrc -o consensus
    """
    from cryodrgn_pipeline.consensus import consensus
    from cryodrgn_pipeline.errors import ConfigError

    if check not in ("stop", "warn", "off"):
        raise ConfigError(f"--check must be stop, warn or off, not {check}")
    in_processes(processes, nodes)
    import torch

    from cryodrgn_pipeline.devices import use_threads
    from cryodrgn_pipeline.ranks import joined

    use_threads(None)
    with joined(torch.device("cpu")) as ranks:
        consensus(stack, output, reference=reference, check=check, mask=mask, seed=seed, ranks=ranks)
    say(output)
