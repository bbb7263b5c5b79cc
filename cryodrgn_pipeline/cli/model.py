"""The verbs that make and use a model: train, volumes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryodrgn_pipeline.cli._app import MODEL, Nodes, Processes, app, in_processes, say
from cryodrgn_pipeline.errors import ConfigError


@app.command("train", rich_help_panel=MODEL)
def train(
    stack: Annotated[Path, typer.Argument(help="Stack folder that preprocess wrote.")],
    run: Annotated[Path, typer.Option("-o", "--output", help="Run folder to write.")],
    method: Annotated[
        str, typer.Option(help="Model: vae (nonlinear), or subspace (linear, in minutes).")
    ] = "vae",
    encoder: Annotated[
        str, typer.Option(help="What the vae's encoder reads: subspace (posterior in it) or image.")
    ] = "subspace",
    decoder: Annotated[
        str,
        typer.Option(
            help="What the vae draws with: kernel or basis (maps in the subspace, weighed by a kernel's "
            "functions or by a network), or mlp (a coordinate network)."
        ),
    ] = "kernel",
    latent_dim: Annotated[int, typer.Option(min=1, help="Size of z.")] = 8,
    subset: Annotated[
        Path | None, typer.Option(help="Use only these particles: a file of ids, one a line.")
    ] = None,
    learn_from: Annotated[
        int,
        typer.Option(min=1, help="Particles that subspace and maps are learnt from at most; all are placed."),
    ] = 200_000,
    epochs: Annotated[int, typer.Option(help="Passes over the particles.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Images per update.")] = 16,
    learning_rate: Annotated[
        str, typer.Option(help="Adam's learning rate; auto: 1e-4 at a batch of 16, growing with its root.")
    ] = "auto",
    beta: Annotated[
        str,
        typer.Option(
            help="Weight of the KL divergence; auto: 1/latent-dim, or 2 where the subspace is the start."
        ),
    ] = "auto",
    loss: Annotated[
        str, typer.Option(help="Noise in the loss: white, or whitened (spectrum of each optics group).")
    ] = "white",
    encoder_layers: Annotated[int, typer.Option(min=1)] = 3,
    encoder_width: Annotated[int, typer.Option(min=1)] = 1024,
    encoder_type: Annotated[str, typer.Option(help="resid or mlp.")] = "resid",
    decoder_layers: Annotated[int, typer.Option(min=1)] = 3,
    decoder_width: Annotated[int, typer.Option(min=1)] = 1024,
    decoder_type: Annotated[str, typer.Option(help="resid or mlp.")] = "resid",
    positional_encoding: Annotated[str, typer.Option(help="gaussian or geometric.")] = "gaussian",
    domain: Annotated[
        str, typer.Option(help="What the decoder gives: fourier (re, im) or hartley.")
    ] = "fourier",
    mask_radius: Annotated[
        float, typer.Option(help="Disc of frequencies on which the loss is taken, as a fraction of Nyquist.")
    ] = 1.0,
    encoder_mask_radius: Annotated[
        float | None,
        typer.Option(help="Disc of frequencies that the encoder reads; default: that of the loss."),
    ] = None,
    encoder_input: Annotated[
        str, typer.Option(help="aligned: images turned so that the in-plane angle is 0; image: as they are.")
    ] = "aligned",
    encoder_filter: Annotated[
        str, typer.Option(help="What undoes the CTF before the encoder reads: phase-flip or wiener.")
    ] = "phase-flip",
    coordinate_fraction: Annotated[
        float,
        typer.Option(
            help="Share of the frequencies, drawn anew for each update, on which the loss is taken."
        ),
    ] = 1.0,
    frequency_marching: Annotated[
        int,
        typer.Option(
            help="Epochs over which the disc of the loss grows from a quarter of its radius; 0: none."
        ),
    ] = 0,
    held_out_fraction: Annotated[
        float, typer.Option(help="Share of the particles that only measure.")
    ] = 0.05,
    checkpoint_every_epochs: Annotated[int, typer.Option()] = 5,
    checkpoint_every_minutes: Annotated[float, typer.Option()] = 15.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    lazy: Annotated[
        bool | None,
        typer.Option(
            "--lazy/--in-memory", help="Read images as needed, or hold them; default: by free memory."
        ),
    ] = None,
    amp: Annotated[
        bool | None, typer.Option("--amp/--no-amp", help="Mixed precision; default: on a GPU only.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads, shared by the processes of a node; default: all.")
    ] = None,
    processes: Processes = 1,
    nodes: Nodes = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's checkpoints where they fit.")
    ] = False,
) -> None:
    """Learn a latent coordinate per particle and a decoder of volumes from it.

    Writes latent.parquet, model.safetensors, metrics.jsonl and run.json into the run folder. SIGTERM saves a
    checkpoint and ends; the same command with --resume goes on, to the same result.

    The subspace and the default model take --latent-dim, --subset, --learn-from, --seed, --device and
    --threads; --decoder basis also --held-out-fraction. With --encoder image or --decoder mlp the model is
    trained epoch by epoch. Then --encoder-… is for --encoder image; --decoder-…, --positional-encoding,
    --domain, --mask-radius, --loss, --coordinate-fraction and --frequency-marching are for --decoder mlp.

    Several --processes and --nodes give the same model: they share the images of each pass or batch.

    Example: cryodrgn-pipeline train stack_128 -o runs/first
    """
    expected = {
        "method": ("vae", "subspace"),
        "encoder": ("subspace", "image"),
        "decoder": ("kernel", "basis", "mlp"),
    }
    for name, value in (("method", method), ("encoder", encoder), ("decoder", decoder)):
        if value not in expected[name]:
            raise ConfigError(f"--{name} {value}: expected {' or '.join(expected[name])}")
    if method == "vae" and (encoder, decoder) == ("image", "kernel"):
        raise ConfigError(
            "--encoder image goes with --decoder basis or mlp: a kernel's functions are those of the place "
            "in the subspace (--encoder subspace)"
        )
    in_processes(processes, nodes)
    if method == "subspace" or (encoder == "subspace" and decoder != "mlp"):
        from cryodrgn_pipeline.devices import choose_device
        from cryodrgn_pipeline.ranks import joined
        from cryodrgn_pipeline.subspace.run import SubspaceRequest, train_subspace

        chosen = choose_device(device)
        request = SubspaceRequest(
            stack=stack,
            run=run,
            subset=subset,
            latent_dim=latent_dim,
            learn_from=learn_from,
            decoder="linear" if method == "subspace" else decoder,
            held_out_fraction=held_out_fraction,
            seed=seed,
            threads=threads,
            checkpoint_every_minutes=checkpoint_every_minutes,
            resume=resume,
            device=chosen.type,
        )
        with joined(chosen) as ranks:
            train_subspace(request, ranks)
        say(run / "latent.parquet")
        return
    from cryodrgn_pipeline.models.vae import VaeConfig
    from cryodrgn_pipeline.stack import read_stack_info
    from cryodrgn_pipeline.training.run import TrainingRequest, train_vae
    from cryodrgn_pipeline.training.settings import TrainingSettings

    settings = TrainingSettings(
        learn_from=learn_from,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=_auto_or_number("--learning-rate", learning_rate),
        beta=_auto_or_number("--beta", beta),
        coordinate_fraction=coordinate_fraction,
        frequency_marching=frequency_marching,
        held_out_fraction=held_out_fraction,
        checkpoint_every_epochs=checkpoint_every_epochs,
        checkpoint_every_minutes=checkpoint_every_minutes,
        seed=seed,
        device=device,
        in_memory=None if lazy is None else not lazy,
        amp=amp,
        threads=threads,
    )
    try:
        model = VaeConfig(
            box_size_px=int(read_stack_info(stack)["box_size_px"]),
            latent_dim=latent_dim,
            encoder_width=encoder_width,
            encoder_layers=encoder_layers,
            encoder_type=encoder_type,
            decoder_width=decoder_width,
            decoder_layers=decoder_layers,
            decoder_type=decoder_type,
            positional_encoding=positional_encoding,
            domain=domain,
            mask_radius=mask_radius,
            encoder_mask_radius=encoder_mask_radius,
            encoder_input=encoder_input,
            encoder_filter=encoder_filter,
            loss=loss,
            encoder=encoder,
            decoder=decoder,
            seed=seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    train_vae(
        TrainingRequest(stack=stack, run=run, subset=subset, model=model, settings=settings, resume=resume)
    )
    say(run / "latent.parquet")


def _auto_or_number(option: str, given: str) -> float | None:
    """The number; None for auto."""
    if given == "auto":
        return None
    try:
        return float(given)
    except ValueError:
        raise ConfigError(f"{option} {given}: expected auto or a number") from None


@app.command("encode", rich_help_panel=MODEL)
def encode(
    run: Annotated[Path, typer.Argument(help="Run folder that train wrote.")],
    stack: Annotated[Path, typer.Argument(help="Stack folder of other particles of the same kind.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    subset: Annotated[
        Path | None, typer.Option(help="Only these particles: a file of ids, one a line.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all.")] = None,
) -> None:
    """Place particles of another stack in the latent space of a trained model, without training.

    Writes latent.parquet with the columns of train, a copy of the model and run.json: a folder that analyze,
    volumes, select and report read. The images may have another grey scale and other noise; they need poses
    in the same frame, and the box of the model in pixels.

    Example: cryodrgn-pipeline encode runs/first stack_new_128 -o runs/first_new
    """
    from cryodrgn_pipeline.devices import choose_device, use_threads
    from cryodrgn_pipeline.encoding import EncodeRequest
    from cryodrgn_pipeline.encoding import encode as place

    use_threads(threads)
    place(EncodeRequest(run=run, stack=stack, subset=subset, output=output), choose_device(device))
    typer.echo(output / "latent.parquet")


@app.command("volumes", rich_help_panel=MODEL)
def volumes(
    run: Annotated[Path, typer.Argument(help="Run folder that train wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    z: Annotated[
        Path | None, typer.Option("--z", "--traversal", help="csv with header z_0,z_1,…: one volume per row.")
    ] = None,
    kmeans: Annotated[int | None, typer.Option(min=1, help="At this many k-means centres.")] = None,
    ids: Annotated[
        Path | None, typer.Option(help="One volume, at the mean latent of these particles.")
    ] = None,
    pc: Annotated[int | None, typer.Option(help="Along this principal component, from 1.")] = None,
    n: Annotated[int, typer.Option("-n", min=2, help="Number of volumes along --pc.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of --kmeans.")] = 0,
    source: Annotated[str, typer.Option(help="Where density comes from: decoder or particles.")] = "decoder",
    stack: Annotated[
        Path | None,
        typer.Option(help="With particles: another stack of them, such as one of the full box."),
    ] = None,
    memory_gb: Annotated[
        float | None,
        typer.Option(min=0, help="With particles: memory to use, GiB; default: 60 % of what is available."),
    ] = None,
    independent_halves: Annotated[
        bool,
        typer.Option(
            "--independent-halves",
            help="With particles: half maps from a subspace of each half set's own, for a gold-standard FSC.",
        ),
    ] = False,
    box_size: Annotated[int | None, typer.Option(help="Decode on a coarser grid of this box, px.")] = None,
    low_pass_a: Annotated[float | None, typer.Option(help="Remove detail finer than this, Å.")] = None,
    flip_hand: Annotated[bool, typer.Option("--flip-hand", help="Mirror the maps.")] = False,
    crop_px: Annotated[int | None, typer.Option(help="Cut the maps to this box in real space, px.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all.")] = None,
    processes: Processes = 1,
    nodes: Nodes = 1,
) -> None:
    """Draw volumes at points of the latent space.

    Writes vol_000.mrc … and volumes.parquet with the latent of each. A decoder draws a map at any z, right or
    wrong: stay where particles are. From particles: the images near each point correct the model's map, and
    half maps (in halves/) with their FSC say how far to trust it; --ids takes these particles' images.
    --nodes share the images (the first one draws what a decoder draws); memory and threads are those of each.

    Example: cryodrgn-pipeline volumes runs/first --kmeans 20 --source particles -o runs/first/volumes
    """
    if source not in ("decoder", "particles"):
        raise ConfigError(f"--source {source}: expected decoder or particles")
    if source == "particles" and box_size is not None:
        raise ConfigError(
            f"--box-size {box_size}: volumes from particles have the box of their stack; cut them with "
            "--crop-px, or name a stack of another box with --stack"
        )
    given = {"--stack": stack, "--memory-gb": memory_gb, "--independent-halves": independent_halves or None}
    for name, value in given.items():
        if source == "decoder" and value is not None:
            raise ConfigError(f"{name}: a decoder reads no images; give it with --source particles")
    if independent_halves and ids is not None:
        raise ConfigError(
            "--independent-halves: a list of ids was chosen with both half sets, so nothing makes its half "
            "maps independent; give points of the latent space (--z, --kmeans, --pc)"
        )
    in_processes(processes, nodes)
    from cryodrgn_pipeline.devices import choose_device, use_threads
    from cryodrgn_pipeline.ranks import joined
    from cryodrgn_pipeline.volumes import MapOptions, decode_volumes, latents_for

    use_threads(threads)
    latents = latents_for(run, z_table=z, kmeans=kmeans, ids=ids, pc=pc, n=n, seed=seed)
    options = MapOptions(box_size_px=box_size, low_pass_a=low_pass_a, flip_hand=flip_hand, crop_px=crop_px)
    chosen, paths = choose_device(device), []
    with joined(chosen) as ranks:
        if source == "particles":
            from cryodrgn_pipeline.particle_volumes import ParticleVolumes, particle_volumes

            request = ParticleVolumes(
                run=run,
                targets=latents,
                ids=ids,
                stack=stack,
                options=options,
                memory_gb=memory_gb,
                independent_halves=independent_halves,
            )
            paths = particle_volumes(request, output, chosen, ranks)
        elif ranks.leads:
            paths = decode_volumes(run, latents, output, options, chosen)
    for path in paths:
        say(path)
