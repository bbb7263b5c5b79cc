"""Id files: one particle id per line, the way every subset travels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.atomic import replacing

EXAMPLES = 5


def write_ids(path: Path, particle_id: NDArray[Any]) -> None:
    """Write ids, one per line, atomically."""
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{i}\n" for i in particle_id), encoding="utf-8")


def read_ids(path: Path, like: NDArray[Any]) -> NDArray[Any]:
    """The ids of an id file as the kind of id that `like` holds (uint64 or str), each once.

    Blank lines are passed over. Raises `InputFormatError` when the file is missing, empty or no text, or
    names something else than cryoSPARC uids where those are needed.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()  # spreadsheets put a mark in front
    except FileNotFoundError:
        raise InputFormatError(f"{path}: no such id file; `select` writes one") from None
    except UnicodeDecodeError as error:
        raise InputFormatError(f"{path}: not a text file with one particle id per line") from error
    words = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not words:
        raise InputFormatError(f"{path}: names no particle; expected one particle id per line")
    if like.dtype.kind != "u":
        return np.array(words, dtype=object)
    wrong = [word for word in words if not (word.isdecimal() and int(word) < 2**64)]
    if wrong:
        raise InputFormatError(
            f"{path}: {len(wrong)} of {len(words)} lines are no cryoSPARC uid, such as {wrong[0][:60]!r}; "
            f"the ids of these particles are numbers such as {like[0]}"
        )
    return np.array([int(word) for word in words], dtype=np.uint64)


def read_id_rows(path: Path, known: NDArray[Any], where: str) -> NDArray[np.int64]:
    """The rows of `known`, `(N,)` ids, that an id file names, ascending.

    Raises `InputFormatError` as `read_ids` does, and when an id is not in `known`, which `where` names.
    """
    wanted = dict.fromkeys(read_ids(path, known).tolist())
    rows = [row for row, identity in enumerate(known.tolist()) if identity in wanted]
    if len(rows) < len(wanted):
        there = set(known.tolist())
        unknown = [identity for identity in wanted if identity not in there]
        examples = ", ".join(str(identity) for identity in unknown[:EXAMPLES])
        raise InputFormatError(
            f"{path}: {len(unknown)} of {len(wanted)} ids are not among the {len(known)} particles of "
            f"{where}, such as {examples}; is it a subset of another data set?"
        )
    return np.array(rows, dtype=np.int64)
