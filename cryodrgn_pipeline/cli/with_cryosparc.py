"""The verbs that talk to cryoSPARC: read-cryosparc, push, live-check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryodrgn_pipeline.cli._app import CRYOSPARC, app
from cryodrgn_pipeline.errors import ConfigError

Project = Annotated[str, typer.Option(help="Project, such as P3.", show_default=False)]
Workspace = Annotated[str, typer.Option(help="Workspace of the project, such as W1.", show_default=False)]
Job = Annotated[str, typer.Option(help="Job that the particles are from, such as J42.", show_default=False)]
ParticleOutput = Annotated[str, typer.Option("--output-name", help="Its output of particles.")]
ProjectFolder = Annotated[
    Path | None,
    typer.Option(help="Where the project's folder is mounted here, if not where cryoSPARC says."),
]


@app.command("read-cryosparc", rich_help_panel=CRYOSPARC)
def read_cryosparc_verb(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write into.")],
    project: Project,
    job: Job,
    output_name: ParticleOutput = "particles",
    volume: Annotated[
        str | None, typer.Option(help="Its output with the consensus map; none when not given.")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="Its output with a soft mask; none when not given.")
    ] = None,
    project_folder: ProjectFolder = None,
) -> None:
    """Fetch a job's particles, consensus map and mask from a running cryoSPARC as plain files.

    Writes particles.cs (all slots, joined by uid), a link `project` to the
    project's folder, cryosparc.json, and map.mrc and mask.mrc as asked. Images
    stay where they are: the project's folder must be visible on this machine.
    The client's own login or environment variables give the access.

    Example: cryodrgn-pipeline read-cryosparc --project P3 --job J42 --volume volume -o source
    """
    from cryodrgn_pipeline.interop.cryosparc_read import Source, read_job

    source = Source(
        project=project,
        job=job,
        output=output_name,
        volume=volume,
        mask=mask,
        project_folder=project_folder,
    )
    typer.echo(read_job(source, output))


@app.command("push", rich_help_panel=CRYOSPARC)
def push_verb(
    run: Annotated[Path, typer.Argument(help="Folder that train wrote.", show_default=False)],
    project: Project,
    workspace: Workspace,
    job: Job,
    output_name: ParticleOutput = "particles",
    volumes: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that volumes wrote. Repeatable.", show_default=False),
    ] = None,
    subset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE", help="An id file to make an output of. Repeatable.", show_default=False
        ),
    ] = None,
    clusters: Annotated[
        bool, typer.Option("--clusters/--no-clusters", help="One output per cluster of analyze.")
    ] = True,
    import_volumes: Annotated[
        bool,
        typer.Option(
            "--import-volumes/--no-import-volumes",
            help="Maps by cryoSPARC's own job Import 3D Volumes, queued without a lane.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for job.json and pushed.json; else RUN/cryosparc."),
    ] = None,
) -> None:
    """Put a run's results into a running cryoSPARC, as an external job beside the refinement.

    Outputs: all particles with their latent coordinates (components_mode_0 …, as
    3D Variability writes them), the particles of each cluster and subset, one
    volume per map, and the report's figures in the event log. The same command
    again does nothing, or refills the same job where the run has changed.

    Example: cryodrgn-pipeline push results/mine/all/vae --project P3 --workspace W1 --job J42
    """
    from cryodrgn_pipeline.interop.cryosparc_content import gather
    from cryodrgn_pipeline.interop.cryosparc_push import Target, push

    subsets = _named_files(subset or [])
    content = gather(run, tuple(volumes or ()), subsets, clusters=clusters, import_maps=import_volumes)
    target = Target(project=project, workspace=workspace, job=job, output=output_name)
    typer.echo(f"{project} {push(content, target, output or run / 'cryosparc')}")


@app.command("live-check", rich_help_panel=CRYOSPARC)
def live_check_verb(
    project: Project,
    workspace: Annotated[str, typer.Option(help="A scratch workspace, such as W9.", show_default=False)],
    job: Annotated[str, typer.Option(help="A refinement to connect to, such as J42.", show_default=False)],
    output_name: ParticleOutput = "particles",
) -> None:
    """Ask a running cryoSPARC whether it does all that read-cryosparc and push rely on.

    Makes one external job in the scratch workspace, fills it with made-up
    coordinates and maps, and imports the maps by a second job; delete both
    afterwards. Prints a line per question: yes; no (it works, but otherwise than
    assumed; push copes); failed (exit code 1).

    Example: cryodrgn-pipeline live-check --project P3 --workspace W9 --job J42
    """
    from cryodrgn_pipeline.interop.cryosparc_live_check import FAILED, live_check
    from cryodrgn_pipeline.interop.cryosparc_push import Target

    target = Target(project=project, workspace=workspace, job=job, output=output_name)
    uid, findings = live_check(target)
    for finding in findings:
        typer.echo(f"{finding.answer:6}  {finding.question}  {finding.seen}")
    typer.echo(f"made {project} {uid}: look at it in cryoSPARC, then delete it")
    if any(finding.answer == FAILED for finding in findings):
        raise typer.Exit(1)


def _named_files(texts: list[str]) -> dict[str, Path]:
    files = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not (name and separator and path):
            raise ConfigError(f"--subset {text!r}: NAME=FILE expected, such as open=open.txt")
        if name in files:
            raise ConfigError(f"--subset {text!r}: the name {name} is given twice")
        files[name] = Path(path)
    return files
