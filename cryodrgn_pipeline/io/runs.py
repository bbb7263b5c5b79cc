"""A run folder's tables and manifests: latent.parquet, metrics.jsonl and any table by column."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.atomic import replacing

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latents:
    """Where each of N particles lies in the latent, as training left it (no unit anywhere).

    `particle_id` (N,) uint64 or str; `z` (N, J) and `std` (N, J) float32: posterior mean and standard
    deviation; `loss` (N,) float32 or None; `log_evidence` (N,) and `contrast` (N,) float32, of a subspace
    run, or None; `held_out` (N,) bool or None.
    """

    particle_id: NDArray[Any]
    z: NDArray[np.float32]
    std: NDArray[np.float32] | None = None
    loss: NDArray[np.float32] | None = None
    log_evidence: NDArray[np.float32] | None = None
    contrast: NDArray[np.float32] | None = None
    held_out: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.particle_id)


def read_latents(run: Path) -> Latents:
    """Read RUN/latent.parquet.

    Parameters
    ----------
    run
        A folder that `train` wrote, or its latent.parquet.

    Raises
    ------
    InputFormatError
        If the table is missing, empty, lacks a column, repeats an id or holds a z that is not finite.
    """
    return latents_of(read_latent_columns(run), _latent_table(run))


def read_latent_columns(run: Path) -> Columns:
    """Read RUN/latent.parquet as it stands; an `InputFormatError` if it is missing or damaged."""
    return read_columns(_latent_table(run), "train a model with `cryodrgn-pipeline train STACK -o RUN`")


def latents_of(columns: Columns, path: Path) -> Latents:
    """Columns of the latent table at `path` as latents, checked as by `read_latents`."""
    names = numbered(columns, "z_")
    if "particle_id" not in columns or not names:
        raise InputFormatError(
            f"{path}: columns particle_id and z_0, z_1, … expected, found {', '.join(columns) or 'none'}"
        )
    ids = columns["particle_id"]
    if len(ids) == 0:
        raise InputFormatError(f"{path}: no rows, at least one particle expected")
    repeated = len(ids) - len(set(ids.tolist()))  # np.unique would sort the texts
    if repeated:
        raise InputFormatError(f"{path}: column particle_id repeats in {repeated} of {len(ids)} rows")
    z = stacked(columns, names)
    bad = int((~np.isfinite(z)).any(axis=1).sum())
    if bad:
        raise InputFormatError(
            f"{path}: {names[0]} … {names[-1]} are not finite in {bad} of {len(z)} rows; "
            "the training diverged or the file is damaged: train again (a lower learning rate may help)"
        )
    std = numbered(columns, "std_")
    return Latents(
        particle_id=ids,
        z=z,
        std=stacked(columns, std) if std else None,
        **{
            name: columns[name].astype(np.float32)
            for name in ("loss", "log_evidence", "contrast")
            if name in columns
        },
        held_out=columns["held_out"].astype(bool) if "held_out" in columns else None,
    )


def read_covariances(run: Path, rows: NDArray[np.int64] | None = None) -> NDArray[np.float32] | None:
    """The posterior covariance of particles, from the columns std_j and cov_j_k of RUN/latent.parquet.

    Parameters
    ----------
    run
        A folder that `train` wrote, or its latent.parquet.
    rows
        `(R,)` rows of the table; all when None.

    Returns
    -------
    covariances
        `(R, J, J)` float32, no unit; 0 off the diagonal where a run has no cov_j_k. None without std_j.
    """
    import pyarrow.parquet as pq

    path = _latent_table(run)
    names = pq.read_schema(path).names
    std = numbered(dict.fromkeys(names), "std_")
    if not std:
        return None
    crossed = [found for name in names if (found := re.fullmatch(r"cov_(\d+)_(\d+)", name))]
    table = pq.read_table(path, columns=[*std, *(found.group(0) for found in crossed)])
    table = table if rows is None else table.take(rows)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    covariances = np.zeros((len(table), len(std), len(std)), dtype=np.float32)
    for j, name in enumerate(std):
        covariances[:, j, j] = columns[name] ** 2
    for found in crossed:
        j, k = int(found.group(1)), int(found.group(2))
        covariances[:, j, k] = covariances[:, k, j] = columns[found.group(0)]
    return covariances


def _latent_table(run: Path) -> Path:
    return Path(run) / "latent.parquet" if Path(run).is_dir() else Path(run)


def read_columns(path: Path, cure: str) -> Columns:
    """Read a Parquet table as one array per column, nulls in number columns as NaN.

    Raises
    ------
    InputFormatError
        If the file is missing (the message ends with `cure`) or is no Parquet table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise InputFormatError(f"{path}: no such file; {cure}")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise InputFormatError(f"{path}: not a readable Parquet table ({error}); {cure}") from error
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def write_columns(path: Path, columns: Mapping[str, NDArray[Any] | Sequence[str]]) -> None:
    """Write arrays of equal length as a Parquet table, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {name: pa.array(values) for name, values in columns.items()}
    with replacing(Path(path)) as temporary:
        pq.write_table(pa.table(arrays), temporary, compression="zstd")


def write_z(path: Path, z: NDArray[np.floating]) -> None:
    """Write latent points `(M, J)` as the z.csv that `volumes --z` reads: header z_0,z_1,…, one per row."""
    with replacing(Path(path)) as temporary:
        header = ",".join(f"z_{i}" for i in range(z.shape[1]))
        np.savetxt(temporary, z, fmt="%.8g", delimiter=",", header=header, comments="", encoding="utf-8")


def read_z(path: Path) -> NDArray[np.float64]:
    """Read a z.csv as `(M, J)`.

    Raises
    ------
    InputFormatError
        If the file is missing or is no table of finite numbers under the header z_0,z_1,….
    """
    path = Path(path)
    if not path.is_file():
        raise InputFormatError(f"{path}: no such file; a table with the header z_0,z_1,… expected")
    header, *rows = path.read_text(encoding="utf-8-sig").split("\n")  # spreadsheets put a mark in front
    names = header.strip().split(",")
    if names != [f"z_{i}" for i in range(len(names))]:
        raise InputFormatError(f"{path}: header z_0,z_1,… expected, found {header.strip()[:80]!r}")
    try:
        values = [[float(word) for word in row.split(",")] for row in rows if row.strip()]
        z = np.array(values, dtype=np.float64).reshape(len(values), len(names))
    except ValueError as error:
        raise InputFormatError(f"{path}: {len(names)} numbers a row expected ({error})") from error
    if not (len(z) and np.isfinite(z).all()):
        raise InputFormatError(f"{path}: at least one row of {len(names)} finite numbers expected")
    return z


def write_metrics(run: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write RUN/metrics.jsonl, one record an epoch, atomically."""
    with replacing(Path(run) / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The epochs of RUN/metrics.jsonl in order, one record each; of a repeated epoch the last one counts.

    Raises
    ------
    InputFormatError
        If a line is no JSON object; a last line cut short by a killed job is passed over.
    """
    path = Path(run) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    epochs: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise InputFormatError(f"{path}: line {number} of {len(lines)} is no JSON ({error})") from error
        if record.get("kind", "epoch") == "epoch" and "epoch" in record:
            epochs[int(record["epoch"])] = record
    return [epochs[epoch] for epoch in sorted(epochs)]


def read_json(path: Path, cure: str = "") -> dict[str, Any]:
    """Read a JSON object; errors end with `cure`.

    Raises
    ------
    InputFormatError
        If the file is missing or holds something else.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputFormatError(f"{path}: no such file{cure and f'; {cure}'}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputFormatError(f"{path}: not JSON ({error}){cure and f'; {cure}'}") from error
    if not isinstance(content, dict):
        raise InputFormatError(f"{path}: a JSON object expected, found {type(content).__name__}")
    return content


def keep_foreign_files(old: Path, new: Path, ours: Collection[str]) -> None:
    """Copy what the user put beside our outputs into the folder that is about to replace theirs.

    Parameters
    ----------
    old, new
        The folder to be replaced (it may be missing) and the one that takes its place.
    ours
        Name patterns of our own files; they are not carried over.
    """
    for path in sorted(old.iterdir()) if old.is_dir() else []:
        if any(fnmatch(path.name, pattern) for pattern in ours):
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name, symlinks=True)
        else:
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def numbered(columns: Mapping[str, Any], prefix: str) -> list[str]:
    """The columns `prefix0`, `prefix1`, … in the order of their numbers."""
    found = [name for name in columns if re.fullmatch(re.escape(prefix) + r"\d+", name)]
    return sorted(found, key=lambda name: int(name.removeprefix(prefix)))


def stacked(columns: Mapping[str, NDArray[Any]], names: Sequence[str]) -> NDArray[np.float32]:
    """The named columns as one `(N, len(names))` float32 array."""
    return np.stack([np.asarray(columns[name], dtype=np.float32) for name in names], axis=1)
