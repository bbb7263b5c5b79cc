"""Id files: one particle id per line, the way every subset travels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.atomic import replacing


def write_ids(path: Path, particle_id: NDArray[Any]) -> None:
    """Write ids, one per line, atomically."""
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{i}\n" for i in particle_id), encoding="utf-8")


def read_id_rows(path: Path, known: NDArray[Any], where: str) -> NDArray[np.int64]:
    """Rows of `known` that an id file names, in the file's order.

    Parameters
    ----------
    path
        Text, one id per line; blank lines are passed over.
    known
        `(N,)` uint64 or str ids to look in.
    where
        What holds `known`, for the message.

    Raises
    ------
    InputFormatError
        When the file is missing or empty, has an id twice, or one that is not in `known`.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise InputFormatError(f"{path}: no such id file. `select` writes one.") from None
    wanted: list[Any] = [line for line in lines if line]
    if not wanted:
        raise InputFormatError(f"{path}: holds no ids. Expected one particle id per line.")
    if known.dtype.kind == "u":
        words = [word for word in wanted if not (word.isascii() and word.isdigit() and int(word) < 2**64)]
        if words:
            raise InputFormatError(
                f"{path}: {len(words)} of {len(wanted)} ids are not cryoSPARC uids, e.g. {words[0]!r}; "
                f"{where} came from a .cs file. Take the ids from this run's tables."
            )
        wanted = [int(word) for word in wanted]
    row_of = {identity: row for row, identity in enumerate(known.tolist())}
    unknown = [identity for identity in wanted if identity not in row_of]
    if unknown:
        raise InputFormatError(
            f"{path}: {len(unknown)} of {len(wanted)} ids are not in {where} ({len(known)} particles), "
            f"e.g. {unknown[0]}. Take the ids from this data set's tables."
        )
    if len(set(wanted)) < len(wanted):
        raise InputFormatError(
            f"{path}: {len(wanted) - len(set(wanted))} of {len(wanted)} ids are repeated. Remove the repeats."
        )
    return np.array([row_of[identity] for identity in wanted], dtype=np.int64)
