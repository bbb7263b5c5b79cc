"""Id files: one particle id per line, the way every subset travels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.atomic import replacing

if TYPE_CHECKING:
    import pyarrow as pa

EXAMPLES = 5
NEVER = "\x1f"  # a separator of columns that no id holds


def write_ids(path: Path, particle_id: NDArray[Any]) -> None:
    """Write ids, one per line, atomically."""
    with replacing(path) as temporary:
        temporary.write_text("\n".join([*map(str, particle_id.tolist()), ""]), encoding="utf-8")


def read_id_rows(path: Path, known: NDArray[Any], where: str) -> NDArray[np.int64]:
    """The rows of `known`, `(N,)` ids, that an id file names, ascending.

    Raises `InputFormatError` as `read_ids` does, and when an id is not in `known`, which `where` names.
    """
    return id_rows(read_ids(path, known), known, where, str(path))


def id_rows(
    wanted: NDArray[Any] | pa.Array, known: NDArray[Any], where: str, source: str
) -> NDArray[np.int64]:
    """The rows of `known`, `(N,)` ids, that `wanted` names, ascending.

    Raises `InputFormatError` when an id is not in `known`, which `where` names; `source` names `wanted`.
    """
    import pyarrow as pa

    rows: NDArray[np.int64] = np.flatnonzero(is_in(known, wanted))
    if len(rows) < len(wanted):  # some are unknown, or named twice
        each = pa.array(wanted).unique()
        unknown = each.filter(pa.array(~is_in(each, known)))
        if len(unknown):
            examples = ", ".join(str(identity) for identity in unknown[:EXAMPLES])
            raise InputFormatError(
                f"{source}: {len(unknown)} of {len(each)} ids are not among the {len(known)} particles of "
                f"{where}, such as {examples}; is it a subset of another data set?"
            )
    return rows


def is_in(ids: NDArray[Any] | pa.Array, among: NDArray[Any] | pa.Array) -> NDArray[np.bool_]:
    """Which of `ids`, `(N,)`, are `among` others, as `(N,)` bool; `np.isin` compares texts all with all."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found: NDArray[np.bool_] = pc.is_in(pa.array(ids), pa.array(among)).to_numpy(zero_copy_only=False)
    return found


def read_ids(path: Path, like: NDArray[Any]) -> pa.Array:
    """The ids of an id file, in its order, as the kind of id that `like` holds (uint64 or str).

    Blank lines are passed over. Raises `InputFormatError` when the file is missing, empty or no text, or
    names something else than cryoSPARC uids where those are needed.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv

    words = pa.array([], pa.string())
    try:
        if Path(path).read_bytes().strip():
            lines = csv.read_csv(  # ten times as fast as Python's own lines; a mark in front is passed over
                path,
                csv.ReadOptions(column_names=["id"]),
                csv.ParseOptions(delimiter=NEVER, quote_char=False),
                csv.ConvertOptions(column_types={"id": pa.string()}, strings_can_be_null=False),
            )
            words = pc.utf8_trim_whitespace(lines["id"].combine_chunks())
    except FileNotFoundError:
        raise InputFormatError(f"{path}: no such id file; `select` writes one") from None
    except pa.ArrowInvalid as error:
        raise InputFormatError(f"{path}: not a text file with one particle id per line") from error
    words = words.filter(pc.not_equal(words, ""))
    if not len(words):
        raise InputFormatError(f"{path}: names no particle; expected one particle id per line")
    if like.dtype.kind != "u":
        return words
    try:
        if pc.all(pc.match_substring_regex(words, "^[0-9]+$")).as_py():
            return words.cast(pa.uint64())
    except pa.ArrowInvalid:  # 2^64 or more
        pass
    wrong = [word for word in words.to_pylist() if not (re.fullmatch("[0-9]+", word) and int(word) < 2**64)]
    raise InputFormatError(
        f"{path}: {len(wrong)} of {len(words)} lines are no cryoSPARC uid, such as {wrong[0][:60]!r}; "
        f"the ids of these particles are numbers such as {like[0]}"
    )
