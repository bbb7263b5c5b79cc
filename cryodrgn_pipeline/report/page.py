"""One self-contained page from a run folder: text, tables, interactive plots and pictures, all inside."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from cryodrgn_pipeline import __version__
from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.atomic import replacing, replacing_directory
from cryodrgn_pipeline.io.runs import keep_foreign_files
from cryodrgn_pipeline.report.chimerax import consensus_script, path_script, states_script
from cryodrgn_pipeline.report.collect import Gathered, VolumeSet, gather
from cryodrgn_pipeline.report.figures import (
    changes_along,
    cluster_colours,
    view_ranges,
    write_figures,
)
from cryodrgn_pipeline.report.montage import (
    difference_range,
    difference_sheet,
    grey_sheet,
    grey_tile,
)
from cryodrgn_pipeline.report.plots import plot_data, script_json
from cryodrgn_pipeline.report.rows import shown_rows
from cryodrgn_pipeline.report.summary import findings, headlines, verdict_of
from cryodrgn_pipeline.report.tables import (
    check_rows,
    cluster_table,
    file_table,
    flattened,
    particles_near,
    volume_table,
)

log = logging.getLogger(__name__)

OURS = ("*.png", "*.cxc")
DUST_PX = 5.0
GLANCE_MAPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRequest:
    """What to report on: a run, the folders beside it, and where the page goes (RUN/report.html if None)."""

    run: Path
    consensus: Path | None = None
    volumes: tuple[Path, ...] = ()
    import_dir: Path | None = None
    stack: Path | None = None
    output: Path | None = None
    title: str | None = None


def write_report(request: ReportRequest) -> Path:
    """Write the page, and its figures and ChimeraX scripts into RUN/report; returns the page's path.

    What is not there is said on the page in a sentence.

    Raises
    ------
    InputFormatError
        If a folder that was named lacks its files, or a file is damaged.
    """
    names = [Path(folder).resolve().name for folder in request.volumes]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise InputFormatError(f"--volumes: two folders are named {repeated.pop()!r}; names keep them apart")
    gathered = gather(request.run, request.consensus, request.volumes, request.import_dir, request.stack)
    page = request.output or request.run / "report.html"
    with replacing_directory(request.run / "report") as folder:
        keep_foreign_files(request.run / "report", folder, OURS)
        scripts = _write_scripts(gathered, folder, request.run / "report")
        figures = write_figures(gathered, folder)
    title = request.title or gathered.run.resolve().name
    text = render(gathered, page, title, scripts, figures)
    with replacing(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    log.info("report of %.1f MB: %s", len(text.encode()) / 1e6, page)
    return page


def render(gathered: Gathered, page: Path, title: str, scripts: dict[str, str], figures: list[str]) -> str:
    """The page as HTML. All text from files is escaped; nothing is fetched when it opens."""
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    here = files("cryodrgn_pipeline.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((here / "template.html.j2").read_text(encoding="utf-8"))
    check = gathered.consensus.summary.get("convention_check", {}) if gathered.consensus else None
    data = plot_data(gathered)
    return template.render(
        title=title,
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        run=str(gathered.run),
        style=(here / "style.css").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        code=(here / "page.js").read_text(encoding="utf-8"),
        data=script_json(data),
        has=set(data),
        has_kld=bool(data.get("loss", {}).get("kld")),
        has_ellipses="uncertainty" in data.get("latent", {}),
        has_hover=bool(data.get("latent", {}).get("uncertainty", {}).get("particles")),
        is_subspace=gathered.is_subspace,
        headlines=headlines(gathered),
        findings=findings(gathered),
        verdict=None if check is None else verdict_of(check),
        tests=[] if check is None else check_rows(check),
        labels={verdict: verdict_of({"verdict": verdict}) for verdict in _verdicts(check)},
        glance=_glance(gathered),
        manifests=_manifests(gathered),
        warnings=_warnings(gathered),
        consensus_sheet=_consensus_sheet(gathered),
        sets=[_set_context(volumes, gathered) for volumes in gathered.volumes],
        clusters=cluster_table(gathered),
        n_particles=len(gathered.latents) if gathered.latents else 0,
        n_shown=len(shown_rows(len(gathered.latents))) if gathered.latents else 0,
        file_rows=file_table(gathered, page, scripts, figures),
        scripts=scripts,
    )  # fmt: skip


def _verdicts(check: dict[str, Any] | None) -> set[str]:
    return {str(test.get("verdict", "")) for test in (check or {}).get("tests", [])}


def _glance(gathered: Gathered) -> dict[str, Any] | None:
    """A few maps along the first path (or of the first set), seen where they differ most."""
    if not gathered.volumes:
        return None
    along_pc1 = [volumes for volumes in gathered.volumes if volumes.title.endswith("principal component 1")]
    paths = [volumes for volumes in gathered.volumes if volumes.is_path]
    volumes = (along_pc1 or paths or list(gathered.volumes))[0]
    stack = np.stack([view.projections for view in volumes.views])
    axis = int(stack.var(axis=0).sum(axis=(1, 2)).argmax())
    chosen = np.linspace(0, len(stack) - 1, min(GLANCE_MAPS, len(stack))).round().astype(int)
    limits = view_ranges(volumes.views)[1]
    tiles = [
        (
            f"{volumes.drawn[i]:03d}" + (" (outside)" if volumes.is_outside(volumes.drawn[i]) else ""),
            grey_tile(stack[i, axis], limits),
        )
        for i in chosen
    ]
    change = None
    if len(stack) > 1 and volumes.is_path:
        last = stack[-1, axis] - stack[0, axis]
        change = difference_sheet(last[None], difference_range([last]))
    return {"title": volumes.title, "axis": "zyx"[axis], "tiles": tiles, "change": change}


def _consensus_sheet(gathered: Gathered) -> str | None:
    views = gathered.consensus.views if gathered.consensus else None
    return None if views is None else grey_sheet(views, *view_ranges([views]))


def _set_context(volumes: VolumeSet, gathered: Gathered) -> dict[str, Any]:
    ranges = view_ranges(volumes.views)
    near = particles_near(volumes, gathered)
    counts = [""] * len(volumes.paths) if near is None else [f"{n:,} particles nearest" for n in near[0]]
    sheets = [
        (volumes.paths[row], counts[row], volumes.is_outside(row), grey_sheet(view, *ranges))
        for row, view in zip(volumes.drawn, volumes.views, strict=True)
    ]
    changes = changes_along(volumes) if volumes.is_path else []
    largest = difference_range(changes) if changes else 0.0
    return {
        "name": volumes.name,
        "title": volumes.title,
        "total": len(volumes.paths),
        "sheets": sheets,
        "first": volumes.paths[0],
        "changes": [
            (volumes.paths[row], difference_sheet(change, largest))
            for row, change in zip(volumes.drawn[1:], changes, strict=False)
        ],
        "table": volume_table(volumes, near),
    }


def _manifests(gathered: Gathered) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(title, file, rows) of each record of what was run."""
    known: list[tuple[str, str, dict[str, Any] | None]] = [
        ("Training", "run.json", gathered.manifest),
        ("Analysis", "analysis/analysis.json", gathered.analysis),
        ("Consensus", "consensus.json", _without_check(gathered)),
        ("Stack", "stack.json", gathered.stack),
        ("Import", "import.json", gathered.imported),
    ]
    return [(title, name, list(flattened(content))) for title, name, content in known if content]


def _without_check(gathered: Gathered) -> dict[str, Any] | None:
    if gathered.consensus is None:
        return None
    return {key: value for key, value in gathered.consensus.summary.items() if key != "convention_check"}


def _warnings(gathered: Gathered) -> list[str]:
    """What the steps before could not do, such as aberrations that nothing applies."""
    found = [
        f"{item.get('name')} is not applied: {item.get('rows')} particles, up to {item.get('max')}"
        + (f" ({item['effect']})" if item.get("effect") else "")
        for item in (gathered.imported or {}).get("unapplied_aberrations", [])
        if isinstance(item, dict)
    ]
    return found or [str(note) for note in (gathered.stack or {}).get("notes", [])]


def _write_scripts(gathered: Gathered, folder: Path, final: Path) -> dict[str, str]:
    """Write the .cxc files; paths are relative to `final`, where the folder will lie. Name → description."""
    scripts: dict[str, str] = {}
    texts: dict[str, str] = {}
    consensus = gathered.consensus
    if consensus is not None and consensus.views is not None:
        target = final / "consensus.cxc"
        texts[target.name] = consensus_script(
            target, consensus.folder / "map.mrc", consensus.views.sigma_level
        )
        scripts[target.name] = "opens the consensus map"
    for volumes in gathered.volumes:
        target = final / f"volumes_{volumes.name}.cxc"
        level = float(np.median([view.sigma_level for view in volumes.views]))
        dust_a = DUST_PX * volumes.views[0].pixel_size_a
        if volumes.is_path and len(volumes.paths) > 1:
            texts[target.name] = path_script(target, volumes.folder, level, dust_a)
            scripts[target.name] = f"plays the maps back and forth: {volumes.title}"
        else:
            maps = [volumes.folder / path for path in volumes.paths]
            texts[target.name] = states_script(target, maps, cluster_colours(len(maps)), level, dust_a)
            scripts[target.name] = f"opens the maps side by side: {volumes.title}"
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return scripts


def report_volumes_beside(run: Path) -> Sequence[Path]:
    """Folders of maps under RUN/volumes, in the order of their names."""
    return sorted(table.parent for table in (run / "volumes").glob("**/volumes.parquet"))
