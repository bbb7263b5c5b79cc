"""The verbs of this part of the command line: analyze, select, report, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cryodrgn_pipeline.cli._app import RESULTS, app
from cryodrgn_pipeline.cli._choice import (
    Cluster,
    Invert,
    NoJunk,
    Outline,
    Range,
    Where,
    integers,
    selection,
)
from cryodrgn_pipeline.errors import ConfigError

Run = Annotated[Path, typer.Argument(help="Folder that train wrote.", show_default=False)]


@app.command("analyze", rich_help_panel=RESULTS)
def analyze(
    run: Run,
    clusters: Annotated[
        str,
        typer.Option(
            help="Number of k-means clusters; auto: distinct groups where particles fall into such, else 20."
        ),
    ] = "auto",
    pcs: Annotated[int, typer.Option(help="Principal components to make traversals along.")] = 2,
    points: Annotated[int, typer.Option(help="Points per traversal.")] = 10,
    snap: Annotated[
        bool,
        typer.Option("--snap/--no-snap", help="Move traversal points along PCs to the nearest particles."),
    ] = False,
    through: Annotated[
        str | None,
        typer.Option(
            help="Clusters that the direct and graph traversals pass, such as 0,7,12; "
            "the two farthest apart when not given."
        ),
    ] = None,
    umap: Annotated[bool, typer.Option("--umap/--no-umap", help="Compute a UMAP.")] = True,
    umap_max: Annotated[
        int, typer.Option(help="Particles to fit the UMAP to; the others are placed among them.")
    ] = 200_000,
    junk_threshold: Annotated[
        float,
        typer.Option(
            help="Robust standard deviations of evidence, loss or |z| beyond which a particle is flagged."
        ),
    ] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of k-means and UMAP.")] = 0,
) -> None:
    """Embed, cluster and score a run's particles, and lay paths through its latent.

    Writes RUN/analysis: particles.parquet (cluster, junk_score, junk, pc_1 …,
    umap_1, umap_2), centers.csv, traversal_pc1.csv …, traversal_direct.csv (a
    straight line), traversal_graph.csv (a path that stays among the particles) and
    analysis.json. The .csv files are what `volumes --z` reads.

    Example: cryodrgn-pipeline analyze results/run_8d --clusters 20
    """
    from cryodrgn_pipeline.landscape.analysis import AnalysisSettings, analyze_run

    settings = AnalysisSettings(
        clusters=_cluster_count(clusters),
        pcs=pcs,
        points=points,
        snap=snap,
        through=None if through is None else integers("--through", through),
        umap=umap,
        umap_fit_at_most=umap_max,
        junk_threshold=junk_threshold,
        seed=seed,
    )
    analyze_run(run, settings)
    typer.echo(run / "analysis")


@app.command("select", rich_help_panel=RESULTS)
def select(
    run: Run,
    output: Annotated[Path, typer.Option("-o", "--output", help="Id file to write.", show_default=False)],
    cluster: Cluster = None,
    range_: Range = None,
    where: Where = None,
    outline: Outline = None,
    ids: Annotated[
        list[Path] | None, typer.Option(help="Keep only ids listed in this file.", show_default=False)
    ] = None,
    no_junk: NoJunk = False,
    invert: Invert = False,
) -> None:
    """Choose particles by cluster, range, condition or outline; write their ids.

    All given conditions must hold. Columns: z_0 …, std_0 …, norm (|z|), loss,
    held_out, and after `analyze` cluster, junk_score, junk, pc_1 …, umap_1 and
    umap_2. The id file, one id per line, feeds `train --subset` and `export`.

    Example: cryodrgn-pipeline select results/run_8d --cluster 0,3 -o open.txt
    """
    from cryodrgn_pipeline.io.ids import write_ids
    from cryodrgn_pipeline.landscape.select import select_particles

    wanted = selection(cluster, range_, where, outline, ids, no_junk, invert)
    chosen, total = select_particles(run, wanted)
    write_ids(output, chosen)
    typer.echo(f"{len(chosen)} of {total} particles: {output}")


@app.command("report", rich_help_panel=RESULTS)
def report(
    run: Run,
    consensus: Annotated[
        Path | None, typer.Option(help="Folder that consensus wrote.", show_default=False)
    ] = None,
    volumes: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder that volumes wrote. Repeatable; those in RUN/volumes when not given.",
            show_default=False,
        ),
    ] = None,
    import_dir: Annotated[
        Path | None, typer.Option(help="Folder that import wrote.", show_default=False)
    ] = None,
    stack: Annotated[
        Path | None,
        typer.Option(
            help="Folder that preprocess wrote; the one run.json names when not given.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Page to write; RUN/report.html when not given.", show_default=False
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.", show_default=False)] = None,
) -> None:
    """Write one HTML page on a run that opens offline, with PNGs and ChimeraX scripts.

    The page shows what was run, the convention check, FSC, loss curves, the latent
    space (interactive), the volumes and where all files lie. RUN/report gets each
    figure as PNG and .cxc scripts. What is missing is left out with a sentence.

    Example: cryodrgn-pipeline report results/run_8d --consensus results/consensus
    """
    from cryodrgn_pipeline.report.page import ReportRequest, report_volumes_beside, write_report

    request = ReportRequest(
        run=run,
        consensus=consensus,
        volumes=tuple(volumes or report_volumes_beside(run)),
        import_dir=import_dir,
        stack=stack,
        output=output,
        title=title,
    )
    typer.echo(write_report(request))


def _cluster_count(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise ConfigError(f"--clusters {text!r}: auto or a whole number expected, such as 20")
    return int(text)


@app.command("evaluate", rich_help_panel=RESULTS)
def evaluate_verb(
    truth: Annotated[
        Path, typer.Option(help="Truth folder of a simulated set (or the set's folder).", show_default=False)
    ],
    volumes: Annotated[
        Path | None, typer.Argument(help="Folder that volumes wrote.", show_default=False)
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Score this run's latent; match volumes by z.", show_default=False)
    ] = None,
    particles: Annotated[
        Path | None, typer.Option(help="One particle id per volume, in order.", show_default=False)
    ] = None,
    stack: Annotated[
        Path | None,
        typer.Option(help="The set's stack: adds consensus, oracle and headroom.", show_default=False),
    ] = None,
    write_points: Annotated[
        Path | None,
        typer.Option(
            help="Write the z of 100 evenly spaced particles of the run, for `volumes --z`.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Default: metrics.json in VOLUMES; RUN/evaluation.json without volumes."
        ),
    ] = None,
) -> None:
    """Score volumes and latents against a known truth.

    Volumes: FSC-AUC (CryoBench's definition) against the true state of each volume's particle, unmasked,
    within the union of the states, and within what moves; with --stack also of the consensus, of an oracle
    that is told the true states, and the headroom between them. Latents: 20-NN R² of the true coordinates,
    leakage of viewing direction and defocus, and for discrete states the ARI of the clusters of `analyze`.

    Example: cryodrgn-pipeline evaluate runs/first/volumes --truth simulated/truth --run runs/first
    """
    from cryodrgn_pipeline.evaluate import evaluate, sample_points
    from cryodrgn_pipeline.io.atomic import write_json
    from cryodrgn_pipeline.io.runs import write_z

    if volumes is None and run is None:
        raise ConfigError("nothing to evaluate: name a folder of volumes, --run RUN, or both")
    if stack is not None and volumes is None:
        raise ConfigError("--stack needs a folder of volumes, whose headroom it tells")
    if write_points is not None:
        if run is None:
            raise ConfigError("--write-points needs --run RUN: it takes the points from that run's latent")
        write_z(write_points, sample_points(run, truth)[1])
    metrics = evaluate(volumes, truth, run=run, particles=particles, stack=stack)
    if output is None:
        output = volumes / "metrics.json" if volumes is not None else (run or Path()) / "evaluation.json"
    write_json(output, metrics)
    for name, value in metrics.get("fsc_auc", {}).items():
        typer.echo(f"FSC-AUC {name:9} {value:.3f}  (ceiling {metrics['ceiling']:.3f}, {metrics['compared']})")
    if metrics.get("headroom") is not None:
        ends = (metrics["references"][name]["moving"] for name in ("consensus", "oracle"))
        typer.echo(
            "headroom {:.2f}  (moving mask: consensus {:.3f}, oracle {:.3f})".format(
                metrics["headroom"], *ends
            )
        )
    for name, value in metrics.get("latent", {}).get("ari", {}).items():
        typer.echo(f"ARI of clusters and {name}  {value:.3f}")
    if (area := metrics.get("latent", {}).get("junk_roc_auc")) is not None:
        typer.echo(f"junk told by its score, ROC-AUC  {area:.3f}")
    for name, value in metrics.get("latent", {}).get("r2", {}).items():
        typer.echo(f"R2 of {name} from z  {value:.3f}")
    for name, value in metrics.get("latent", {}).get("leakage", {}).items():
        typer.echo(f"leakage of {name}  {value:.3f}")
    typer.echo(output)
