"""The report's tables: manifests as rows, clusters, volumes and the files with how to open them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.report.collect import Gathered, VolumeSet
from cryodrgn_pipeline.report.summary import remedy_of

LONGEST_VALUE = 400
EXTRA_HEADS = {"inside": "where particles are", "latent_density": "density of particles (median: 1)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Column heads and rows of text."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a nested manifest as (dotted name, text)."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{name}.")
        else:
            yield name, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None:
        return "—"
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + " …"


def cluster_table(gathered: Gathered) -> Table | None:
    """Per cluster: particles, share, outliers, median loss and the particle at its centre."""
    analysed, centers = gathered.analysed, gathered.centers
    if analysed is None or centers is None or gathered.latents is None:
        return None
    loss = gathered.latents.loss
    heads = ["cluster", "particles", "share", "outliers", *(["median loss"] if loss is not None else [])]
    rows = []
    for label, particle in enumerate(centers["particle_id"].tolist()):
        members = analysed["cluster"] == label
        n = int(members.sum())
        row = [
            str(label),
            f"{n:,}",
            f"{100 * n / len(members):.1f} %",
            f"{int(analysed['junk'][members].sum()):,}",
        ]
        if loss is not None:
            row.append(f"{np.nanmedian(loss[members]):.4g}" if np.isfinite(loss[members]).any() else "—")
        rows.append((*row, str(particle)))
    return Table(heads=(*heads, "particle at the centre"), rows=tuple(rows))


def volume_table(volumes: VolumeSet, nearest: tuple[NDArray[np.int64], NDArray[np.float64]] | None) -> Table:
    """Per map: z, and from `particles_near` how many particles are near, and how near the nearest is."""
    heads = ["map", *(f"z_{j}" for j in range(volumes.z.shape[1]))]
    if nearest is not None:
        heads += ["particles nearest to it", "distance to the nearest"]
    extra = [name for name, values in volumes.table.items() if values.dtype.kind in "fiub"]
    rows = []
    for i, path in enumerate(volumes.paths):
        row = [path, *(f"{value:.3f}" for value in volumes.z[i])]
        if nearest is not None:
            row += [f"{nearest[0][i]:,}", f"{nearest[1][i]:.3f}"]
        rows.append((*row, *(_cell(volumes.table[name][i].item()) for name in extra)))
    named = [EXTRA_HEADS.get(name, name) for name in extra]
    return Table(heads=(*heads, *named), rows=tuple(rows))


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else _text(value)


def particles_near(
    volumes: VolumeSet, gathered: Gathered
) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
    """`nearest_particles` of a set's maps; None where the run's latents or the maps' z are unknown."""
    if gathered.latents is None or gathered.latents.z.shape[1] != volumes.z.shape[1]:
        return None
    return nearest_particles(volumes.z, gathered.latents.z)


def nearest_particles(
    points: NDArray[np.floating], z: NDArray[np.floating]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each point `(M, J)`: how many particles `(N, J)` are nearest to it, and how near the nearest is."""
    from scipy.spatial import cKDTree

    owner = cKDTree(points).query(z)[1]
    distance = cKDTree(z).query(points)[0]
    return np.bincount(owner, minlength=len(points)).astype(np.int64), np.asarray(distance)


def check_rows(check: Mapping[str, Any]) -> list[dict[str, str]]:
    """The tests of the convention check, as text."""
    rows = []
    for test in check.get("tests", []):
        scores = [
            "—" if test.get(key) is None else f"{test[key]:.3g}"
            for key in ("score_current", "score_alternative")
        ]
        rows.append(
            {
                "name": str(test.get("name", "")).replace("_", " "),
                "verdict": str(test.get("verdict", "")),
                "statement": str(test.get("statement", "")),
                "as_read": scores[0],
                "alternative": scores[1],
                "remedy": remedy_of(test) if test.get("remedy") else "",
            }
        )
    return rows


def file_table(gathered: Gathered, page: Path, scripts: Mapping[str, str], figures: list[str]) -> Table:
    """What lies where (relative to the page) and how to open it; only what exists."""
    run, base = gathered.run.resolve(), page.parent.resolve()
    read_parquet = "pandas.read_parquet(…)"
    known: list[tuple[Path, str, str]] = [
        (run / "latent.parquet", "z, its standard deviation and loss per particle", read_parquet),
        (
            run / "analysis/particles.parquet",
            "cluster, outlier score, PCA and UMAP per particle",
            read_parquet,
        ),
        (run / "analysis/centers.csv", "z of the cluster centres", "cryodrgn-pipeline volumes RUN --z …"),
    ]
    for path in sorted((run / "analysis").glob("traversal_*.csv")):
        known.append((path, "points along a path through the latent", "cryodrgn-pipeline volumes RUN --z …"))
    known += [
        (
            run / "model.safetensors",
            "weights of the model",
            "cryodrgn_pipeline.io.checkpoints.load_model(RUN)",
        ),
        (run / "metrics.jsonl", "losses per epoch", "pandas.read_json(…, lines=True)"),
        (run / "run.json", "manifest: versions, settings, checksums", "any text editor"),
    ]
    if gathered.consensus is not None:
        for name, what in (
            ("map.mrc", "consensus map"),
            ("half1.mrc", "half map"),
            ("half2.mrc", "half map"),
        ):
            known.append((gathered.consensus.folder / name, what, "ChimeraX: open …"))
    for volumes in gathered.volumes:
        known.append((volumes.folder, f"{len(volumes.paths)} maps: {volumes.title}", "ChimeraX script below"))
        known.append((volumes.folder / "volumes.parquet", "z of each map", read_parquet))
    known += [(run / "report" / name, what, f"chimerax {name}") for name, what in scripts.items()]
    known += [(run / "report" / name, "figure", "any image viewer") for name in figures]
    rows = tuple(
        (Path(os.path.relpath(path.resolve(), base)).as_posix(), what, how)
        for path, what, how in known
        if path.exists()
    )
    return Table(heads=("file", "what it is", "how to open it"), rows=rows)
