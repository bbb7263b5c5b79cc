"""The verbs of this part of the command line: init, run, plan, demo."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cryodrgn_pipeline.cli._app import WORKFLOW, app
from cryodrgn_pipeline.errors import ConfigError


@app.command("init", rich_help_panel=WORKFLOW)
def init_verb(
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("config.yaml"),
    particles: Annotated[
        Path | None, typer.Option(help="The refinement: a RELION .star or a cryoSPARC .cs file.")
    ] = None,
    passthrough: Annotated[
        list[Path] | None,
        typer.Option(help="cryoSPARC passthrough .cs file; repeatable; one beside --particles is found."),
    ] = None,
    datadir: Annotated[Path | None, typer.Option(help="Folder the image paths are relative to.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Your own consensus map (.mrc), to check hand and pixel size too.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the dataset; else the file's name.")] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="Copy our profile slurm or local-gpu here, as NAME/config.yaml, to fill in what your site"
            " wants; the config.yaml itself is then written with --particles only."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Write a commented config.yaml for your particles: every key, its default and its unit.

    Example: cryodrgn-pipeline init --particles Refine3D/job012/run_data.star -o config.yaml
    """
    from cryodrgn_pipeline.demo import write_config
    from cryodrgn_pipeline.workflow import copy_profile

    if profile is not None:
        typer.echo(copy_profile(profile, Path(), force=force))
        if particles is None:
            return
    write_config(
        output,
        particles=particles,
        passthrough=tuple(passthrough or ()),
        datadir=datadir,
        reference=reference,
        name=name,
        force=force,
    )
    typer.echo(output)


@app.command(
    "run",
    rich_help_panel=WORKFLOW,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def run_verb(
    context: typer.Context,
    configfile: Annotated[Path, typer.Option(help="What to run.")] = Path("config.yaml"),
    cores: Annotated[
        str | None, typer.Option("-c", "--cores", help="Number of cores, or all; default: all.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="local-gpu, slurm, or a folder with a Snakemake profile of your own.")
    ] = None,
) -> None:
    """Run the whole workflow of a config.yaml, from import to report; only what a change touches runs again.

    The configuration is checked first, and every mistake in it named. All other options and targets are
    passed on to snakemake: -n shows what would be done, --directory sets where results go.

    Example: cryodrgn-pipeline run --configfile config.yaml --cores 8
    """
    from cryodrgn_pipeline.workflow import run_workflow

    raise typer.Exit(run_workflow(configfile, cores=cores, profile=profile, extra=context.args))


@app.command("plan", rich_help_panel=WORKFLOW)
def plan_verb(
    configfile: Annotated[Path, typer.Option(help="What to plan.")] = Path("config.yaml"),
    directory: Annotated[
        Path, typer.Option(help="Folder the workflow will run in; relative paths start there.")
    ] = Path(),
    json_: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Print what a workflow will need before it starts: memory, time, disk and GPUs of every job.

    Memory, time and disk are what jobs ask a cluster for; `expected` is the time without its margin.
    Nothing is run, nothing written.

    Example: cryodrgn-pipeline plan --configfile config.yaml
    """
    from cryodrgn_pipeline.planning.table import plan_workflow

    planned = plan_workflow(configfile, directory)
    if json_:
        typer.echo(json.dumps(planned.as_json(), indent=1))
        return
    for line in planned.lines():
        typer.echo(line)


@app.command("status", rich_help_panel=WORKFLOW)
def status_verb(
    configfile: Annotated[Path, typer.Option(help="What was asked for.")] = Path("config.yaml"),
    results: Annotated[
        Path | None, typer.Option(help="A folder of results instead: what is there, whatever was asked for.")
    ] = None,
    directory: Annotated[
        Path, typer.Option("-d", "--directory", help="Where the workflow runs; as of `run`.")
    ] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, one object a job.")] = False,
    watch: Annotated[
        float | None,
        typer.Option(min=1, help="Look again every so many seconds, until all is finished."),
    ] = None,
) -> None:
    """Say where each job stands: state, epoch, loss, speed, time left, last checkpoint, node.

    It reads files alone, so it works while the jobs run elsewhere, and from any machine that sees the folder.

    Example: cryodrgn-pipeline status --configfile config.yaml --watch 10
    """
    from cryodrgn_pipeline.watching.look import jobs_in, jobs_of

    if as_json and watch is not None:
        raise ConfigError("--watch goes with the table, not with --json")
    if results is not None:
        if not results.is_dir():
            raise ConfigError(f"--results {results}: no such folder")
        look = partial(jobs_in, results, results.parent / "logs")
    else:
        from cryodrgn_pipeline.config.check import load_config

        look = partial(jobs_of, load_config(configfile), directory)
    if as_json:
        typer.echo(json.dumps([job.as_json() for job in look()], indent=2))
        return
    from cryodrgn_pipeline.watching.show import show

    show(look, watch)


@app.command("demo", rich_help_panel=WORKFLOW)
def demo_verb(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for data and results.")] = Path(
        "demo"
    ),
    cores: Annotated[str, typer.Option("-c", "--cores", help="Number of cores, or all.")] = "2",
    small: Annotated[
        bool, typer.Option("--small", help="A set of a minute: shows that it runs, no more.")
    ] = False,
) -> None:
    """Simulate particles with known answers, run the whole workflow on them and say what it found.

    Example: cryodrgn-pipeline demo -o demo --cores 2
    """
    from cryodrgn_pipeline.demo import run_demo

    result = run_demo(output, cores=cores, small=small)
    if result.exit_code:
        raise typer.Exit(result.exit_code)
    typer.echo(f"report        {result.run / 'report.html'}")
    typer.echo(f"volumes       {result.run / 'volumes'}")
    typer.echo(f"latent table  {result.run / 'latent.parquet'}")
    for coordinate, r2 in result.r2.items():
        typer.echo(f"R² of the true {coordinate} from z: {r2:.2f}")
