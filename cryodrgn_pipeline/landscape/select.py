"""The particles of a state: rows of a run's tables by cluster, range, condition, outline or id file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.io.ids import is_in, read_ids
from cryodrgn_pipeline.io.runs import Columns, latents_of, read_columns, read_latent_columns
from cryodrgn_pipeline.landscape.expression import evaluate_condition, unknown_column

ANALYSE_FIRST = "run `cryodrgn-pipeline analyze RUN` first"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is wanted; all given conditions must hold, and `invert` turns the whole around.

    `clusters` are cluster labels; `ranges` texts `COLUMN:LOW:HIGH` (inclusive, either end may be empty);
    `conditions` expressions (see `evaluate_condition`); `outlines` texts `COLUMN_X,COLUMN_Y:x,y x,y x,y …`
    (a polygon, as drawn in the report); `id_files` id files, one id per line.
    """

    clusters: tuple[int, ...] = ()
    ranges: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    outlines: tuple[str, ...] = ()
    id_files: tuple[Path, ...] = ()
    no_junk: bool = False
    invert: bool = False


def select_particles(run: Path, selection: Selection) -> tuple[NDArray[Any], int]:
    """Ids of the particles that meet a selection, in source order.

    Parameters
    ----------
    run
        A folder that `train` wrote; `analyze` adds the columns cluster, junk, pc_ and umap_.
    selection
        The conditions.

    Returns
    -------
    ids, total
        The ids chosen, and how many there were to choose from.

    Raises
    ------
    InputFormatError
        If nothing is left, saying how many particles each condition kept, or a file is damaged.
    ConfigError
        If a condition cannot be read or names an unknown column or cluster.
    """
    columns = run_columns(run)
    ids = columns["particle_id"]
    kept = np.ones(len(ids), dtype=bool)
    account = []
    for name, mask in _conditions(columns, selection):
        kept &= mask
        account.append(f"{name} keeps {int(mask.sum())}")
    if selection.invert:
        kept = ~kept
        account.append("--invert turns this around")
    if not kept.any():
        reasons = "; ".join(account) or "no condition"
        raise InputFormatError(f"{run}: none of {len(ids)} particles selected ({reasons})")
    return ids[kept], len(ids)


def run_columns(run: Path) -> Columns:
    """Everything known per particle of a run, by column name, rows in source order.

    Joined by particle_id: latent.parquet (z_, std_, loss, held_out), `norm` = |z|, and when the run was
    analysed analysis/particles.parquet (cluster, junk_score, junk, pc_, umap_ …).

    Raises
    ------
    InputFormatError
        If a table is damaged or the analysis is that of other particles.
    """
    run = Path(run)
    columns = read_latent_columns(run)
    latents = latents_of(columns, run / "latent.parquet")
    columns["norm"] = np.sqrt(np.einsum("ij,ij->i", latents.z, latents.z, dtype=np.float64))
    analysed = run / "analysis" / "particles.parquet"
    if analysed.is_file():
        more = read_columns(analysed, ANALYSE_FIRST)
        if not np.array_equal(more.get("particle_id", np.empty(0)), latents.particle_id):
            raise InputFormatError(
                f"{analysed}: {len(more.get('particle_id', ()))} rows that are not the {len(latents)} "
                f"particles of latent.parquet; the run was trained again since: {ANALYSE_FIRST}"
            )
        columns |= more
    return columns


def _conditions(columns: Columns, selection: Selection) -> list[tuple[str, NDArray[np.bool_]]]:
    masks = []
    if selection.clusters:
        masks.append((_named("--cluster", selection.clusters), _in_clusters(columns, selection.clusters)))
    masks += [(f"--range {text}", _in_range(columns, text)) for text in selection.ranges]
    masks += [(f"--where {text!r}", evaluate_condition(text, columns)) for text in selection.conditions]
    masks += [(f"--outline {text[:30]}…", _in_outline(columns, text)) for text in selection.outlines]
    for path in selection.id_files:
        ids = columns["particle_id"]
        masks.append((f"--ids {path}", is_in(ids, read_ids(path, ids))))
    if selection.no_junk:
        masks.append(("--no-junk", ~_column(columns, "junk").astype(bool)))
    return masks


def _named(option: str, values: Sequence[int]) -> str:
    return f"{option} {','.join(str(value) for value in values)}"


def _column(columns: Columns, name: str) -> NDArray[Any]:
    if name not in columns:
        raise unknown_column(name, columns)
    return columns[name]


def _number_column(columns: Columns, name: str) -> NDArray[np.float64]:
    values = _column(columns, name)
    if values.dtype.kind not in "fiub":
        raise ConfigError(f"column {name!r} holds no numbers")
    return values.astype(np.float64)


def _in_clusters(columns: Columns, clusters: Sequence[int]) -> NDArray[np.bool_]:
    labels = _column(columns, "cluster")
    unknown = sorted(set(clusters) - set(labels.tolist()))
    if unknown:
        raise ConfigError(f"--cluster: no cluster {unknown[0]}; there are {labels.min()} to {labels.max()}")
    return np.isin(labels, clusters)


def _in_range(columns: Columns, text: str) -> NDArray[np.bool_]:
    try:
        name, low, high = text.rsplit(":", 2)
        lowest = float(low) if low.strip() else -np.inf
        highest = float(high) if high.strip() else np.inf
    except ValueError as error:
        raise ConfigError(
            f"--range {text!r}: COLUMN:LOW:HIGH expected, such as z_0:-1:2 or loss::1.5"
        ) from error
    values = _number_column(columns, name.strip())
    return (values >= lowest) & (values <= highest)


def _in_outline(columns: Columns, text: str) -> NDArray[np.bool_]:
    """Even-odd rule; an edge is crossed when it spans the point's y and lies to its right."""
    try:
        names, corners = text.split(":", 1)
        across, up = (name.strip() for name in names.split(","))
        outline = np.array([[float(v) for v in corner.split(",")] for corner in corners.split()])
        if (
            outline.ndim != 2
            or outline.shape[0] < 3
            or outline.shape[1] != 2
            or not np.isfinite(outline).all()
        ):
            raise ValueError("fewer than three corners")
    except ValueError as error:
        raise ConfigError(
            f"--outline {text[:60]!r}: COLUMN_X,COLUMN_Y:x,y x,y x,y … expected, at least three corners"
        ) from error
    x, y = _number_column(columns, across), _number_column(columns, up)
    inside = np.zeros(len(x), dtype=bool)
    for (x0, y0), (x1, y1) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        if y0 != y1:
            spans = (y0 > y) != (y1 > y)
            inside ^= spans & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside
