"""Everything a report can show, read from the run and the folders beside it; what is missing is None."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.runs import (
    Columns,
    Latents,
    numbered,
    read_columns,
    read_json,
    read_latents,
    read_metrics,
    read_z,
    stacked,
)
from cryodrgn_pipeline.report.ellipses import Uncertainty, posterior_uncertainty
from cryodrgn_pipeline.report.montage import Views, read_views

DRAWN_AT_MOST = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Consensus:
    """What `consensus` left: its summary, the FSC table by column and the map's views."""

    folder: Path
    summary: dict[str, Any]
    fsc: Columns | None
    views: Views | None


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeSet:
    """Maps of one `volumes` folder.

    `title` says what they are, `is_path` whether they follow a path; `paths` (M) and `z` (M, J) name all of
    them, `table` holds further columns of volumes.parquet; `drawn` are the rows whose `views` were kept.
    """

    folder: Path
    name: str
    title: str
    is_path: bool
    paths: tuple[str, ...]
    z: NDArray[np.float32]
    table: Columns
    drawn: tuple[int, ...]
    views: tuple[Views, ...]

    def is_outside(self, row: int) -> bool:
        """Whether a map is known to lie outside the region of particles."""
        return "inside" in self.table and not self.table["inside"][row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """The material of one report; `uncertainty` is that of an analysed run."""

    run: Path
    manifest: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    latents: Latents | None
    analysed: Columns | None
    analysis: dict[str, Any] | None
    centers: Columns | None
    uncertainty: Uncertainty | None
    consensus: Consensus | None
    volumes: tuple[VolumeSet, ...]
    imported: dict[str, Any] | None
    stack: dict[str, Any] | None

    @property
    def is_subspace(self) -> bool:
        """Whether the run was learnt by expectation maximisation, without epochs of a network."""
        known = self.manifest or {}
        return known.get("method") == "subspace" or known.get("decoder") == "kernel"


def gather(
    run: Path,
    consensus: Path | None = None,
    volumes: Sequence[Path] = (),
    import_dir: Path | None = None,
    stack: Path | None = None,
) -> Gathered:
    """Read what there is; a folder that was named must hold its files, others may lack.

    Parameters
    ----------
    run
        A folder that `train` wrote.
    consensus, import_dir, stack
        Folders of `consensus`, `import` and `preprocess`; without `stack` the one that run.json names is used
        when it is still there.
    volumes
        Folders of `volumes`.

    Raises
    ------
    InputFormatError
        If `run` is no folder, a named folder lacks its files, or a file is damaged.
    """
    run = Path(run)
    if not run.is_dir():
        raise InputFormatError(f"{run}: no such run folder; `train STACK -o RUN` makes one")
    manifest = read_json(run / "run.json") if (run / "run.json").is_file() else None
    latents = read_latents(run) if (run / "latent.parquet").is_file() else None
    if stack is None and manifest and (Path(str(manifest.get("stack"))) / "stack.json").is_file():
        stack = Path(str(manifest["stack"]))
    analysed, analysis, centers = _read_analysis(run, latents)
    uncertainty = None
    if latents is not None and analysed is not None and analysis is not None and centers is not None:
        uncertainty = posterior_uncertainty(run, latents, analysed, analysis, centers)
    return Gathered(
        run=run,
        manifest=manifest,
        metrics=read_metrics(run) if (run / "metrics.jsonl").is_file() else [],
        latents=latents,
        analysed=analysed,
        analysis=analysis,
        centers=centers,
        uncertainty=uncertainty,
        consensus=None if consensus is None else _read_consensus(Path(consensus)),
        volumes=tuple(_read_volumes(Path(folder), run, analysis) for folder in volumes),
        imported=None if import_dir is None else read_json(Path(import_dir) / "import.json"),
        stack=None if stack is None else read_json(Path(stack) / "stack.json"),
    )


def _read_analysis(
    run: Path, latents: Latents | None
) -> tuple[Columns | None, dict[str, Any] | None, Columns | None]:
    folder = run / "analysis"
    if latents is None or not (folder / "particles.parquet").is_file():
        return None, None, None
    cure = f"run `cryodrgn-pipeline analyze {run}` again"
    analysed = read_columns(folder / "particles.parquet", cure)
    if not np.array_equal(analysed.get("particle_id", np.empty(0)), latents.particle_id):
        raise InputFormatError(
            f"{folder / 'particles.parquet'}: its {len(analysed.get('particle_id', ()))} rows are not the "
            f"{len(latents)} particles of latent.parquet; {cure}"
        )
    analysis = read_json(folder / "analysis.json")
    return analysed, analysis, read_columns(folder / "centers.parquet", cure)


def _read_consensus(folder: Path) -> Consensus:
    summary = read_json(folder / "consensus.json")
    has_fsc, has_map = (folder / "fsc.parquet").is_file(), (folder / "map.mrc").is_file()
    return Consensus(
        folder=folder,
        summary=summary,
        fsc=read_columns(folder / "fsc.parquet", "run `consensus` again") if has_fsc else None,
        views=read_views(folder / "map.mrc") if has_map else None,
    )


def _read_volumes(folder: Path, run: Path, analysis: dict[str, Any] | None) -> VolumeSet:
    table = read_columns(folder / "volumes.parquet", "run `cryodrgn-pipeline volumes` again")
    names = numbered(table, "z_")
    if "path" not in table or len(table["path"]) == 0:
        raise InputFormatError(
            f"{folder / 'volumes.parquet'}: column path with a row per map expected, found {', '.join(table)}"
        )
    paths = tuple(str(path) for path in table["path"])
    z = stacked(table, names) if names else np.zeros((len(paths), 0), dtype=np.float32)
    evenly = np.linspace(0, len(paths) - 1, min(len(paths), DRAWN_AT_MOST))
    drawn = tuple(evenly.round().astype(int).tolist())
    title, is_path = _what_it_is(folder, z, run, analysis)
    return VolumeSet(
        folder=folder,
        name=folder.name,
        title=title,
        is_path=is_path,
        paths=paths,
        z=z,
        table={name: values for name, values in table.items() if name != "path" and name not in names},
        drawn=drawn,
        views=tuple(read_views(folder / paths[row]) for row in drawn),
    )


def _what_it_is(
    folder: Path, z: NDArray[np.float32], run: Path, analysis: dict[str, Any] | None
) -> tuple[str, bool]:
    """What the maps were drawn along, found by comparing their z with the paths that `analyze` wrote."""
    through = [str(label) for label in (analysis or {}).get("traversal_through", [])]
    ends = f"clusters {' → '.join(through)}" if through else "clusters"
    known = {"centers.csv": ("k-means cluster centres", False)}
    for path in sorted((run / "analysis").glob("traversal_*.csv")):
        name = path.stem.removeprefix("traversal_")
        if name.startswith("pc"):
            known[path.name] = (f"along principal component {name.removeprefix('pc')}", True)
        elif name == "graph":
            known[path.name] = (f"among the particles, {ends}", True)
        else:
            known[path.name] = (f"straight line, {ends}", True)
    for name, what in known.items():
        path = run / "analysis" / name
        if path.is_file() and z.size:
            points = read_z(path)
            if points.shape == z.shape and np.allclose(points, z, atol=1e-4):
                return what
    return folder.name, False
