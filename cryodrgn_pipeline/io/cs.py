"""cryoSPARC .cs files: both encodings read, passthrough files joined by uid, subsets written."""

from __future__ import annotations

import datetime
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.atomic import replacing

if TYPE_CHECKING:
    import pyarrow as pa

NUMPY_MAGIC = b"\x93NUMPY"
CSDAT_MAGIC = b"\x95CSDAT"
EXAMPLES = 3
GROUP_DESCRIPTION = "Particles chosen with cryodrgn-pipeline"
NUMBERED_SLOTS = {"alignments_class_": "alignments3D", "components_mode_": "components"}
"""Slots of several in one file, such as alignments_class_0, and what kind each is."""


def load_dataset(path: Path) -> Any:
    """Read a .cs file of either encoding into a `cryosparc.dataset.Dataset`.

    Raises
    ------
    InputFormatError
        If the file is missing, truncated or no .cs file, or holds no particle.
    """
    from cryosparc.dataset import Dataset
    from cryosparc.errors import DatasetLoadError

    try:
        with path.open("rb") as file:
            magic = file.read(len(CSDAT_MAGIC))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputFormatError(f"{path}: no such .cs file") from error
    if magic not in (NUMPY_MAGIC, CSDAT_MAGIC):
        raise InputFormatError(f"{path}: not a .cs file (it starts with {magic!r})")
    try:
        if magic == CSDAT_MAGIC:
            refuse_truncated_csdat(path, Dataset.inspect(path))
        dataset = Dataset.load(path)
    except DatasetLoadError as error:
        raise InputFormatError(
            f"{path}: cannot be read, the file may be truncated ({error.__cause__})"
        ) from error
    if not len(dataset):
        raise InputFormatError(f"{path} holds no particles")
    return dataset


def refuse_truncated_csdat(path: Path, header: Any) -> None:
    """Walk over the columns' lengths: cryosparc-tools 5.0.3 crashes, or cuts strings, on a truncated file.

    Raises
    ------
    InputFormatError
        If the file ends before a column does; `header` is what `Dataset.inspect` says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(len(CSDAT_MAGIC))
        lengths = [None] if header["length"] == 0 else [None, *header["dtype"]]  # first the header itself
        for _ in lengths:
            word = file.read(4)
            if len(word) == 4:
                file.seek(struct.unpack("<I", word)[0], os.SEEK_CUR)
            if len(word) < 4 or file.tell() > size:
                raise InputFormatError(
                    f"{path} is truncated: {size} bytes end within a column; copy it again"
                )
        has_text = any(field[1] == "|O" for field in header["dtype"]) and header["length"]
        if has_text and (file.tell() == size or _last_byte(path) != b"\0"):
            raise InputFormatError(f"{path} is truncated: its {size} bytes end within the texts")


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


class CsTable:
    """A .cs file and its passthrough files as one table, in the order of the first, joined by uid."""

    def __init__(self, path: Path, passthrough: Sequence[Path] = ()) -> None:
        """Read and join; an `InputFormatError` where uids repeat or a passthrough lacks some."""
        self.path = path
        main = load_dataset(path)
        self.uid = _unique_uids(path, main)
        self._parts: list[tuple[Path, Any, NDArray[np.int64] | None]] = [(path, main, None)]
        for other in passthrough:
            dataset = load_dataset(other)
            self._parts.append((other, dataset, _matching_rows(path, self.uid, other, dataset)))
        self._where: dict[str, int] = {}
        for number, (_, dataset, _) in enumerate(self._parts):
            for name in dataset.fields(exclude_uid=True):
                self._where.setdefault(name, number)

    def __len__(self) -> int:
        return len(self.uid)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def fields(self) -> list[str]:
        """All columns but uid, of the file and its passthroughs."""
        return list(self._where)

    def column(self, name: str) -> NDArray[Any]:
        """A column `(rows, ...)` as stored, text as Python strings."""
        _, dataset, rows = self._parts[self._where[name]]
        values = np.asarray(dataset[name])
        return values if rows is None else values[rows]

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column as `(rows, ...)` float64; an `InputFormatError` counts rows that hold no finite number."""
        stored = self.column(name)
        values = stored.astype(np.float64)
        wrong = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if len(wrong):
            file = self._parts[self._where[name]][0]
            shown = ", ".join(
                f"row {row + 1} ({stored[row]}, uid {self.uid[row]})" for row in wrong[:EXAMPLES]
            )
            raise InputFormatError(
                f"{file}: column {name} has no finite number in {len(wrong)} of {len(values)} rows: {shown}. "
                "Remove these particles or mend the values"
            )
        return values

    def integers(self, name: str) -> NDArray[np.int64]:
        """A column of counts as `(rows, ...)` int64."""
        return self.column(name).astype(np.int64)

    def text(self, name: str) -> pa.DictionaryArray:
        """A text column as dictionary-encoded Arrow strings."""
        import pyarrow as pa

        return pa.array(self.column(name).astype(object), type=pa.string()).dictionary_encode()


def _unique_uids(path: Path, dataset: Any) -> NDArray[np.uint64]:
    if "uid" not in dataset.fields():
        raise InputFormatError(f"{path}: no column uid, so its particles cannot be told apart")
    uids = _uids(dataset)
    values, counts = np.unique(uids, return_counts=True)
    repeated = values[counts > 1]
    if len(repeated):
        raise InputFormatError(
            f"{path}: uid must be unique, but {len(repeated)} uids stand for {counts[counts > 1].sum()} of "
            f"{len(uids)} rows, such as {', '.join(str(uid) for uid in repeated[:EXAMPLES])}. Remove "
            "duplicates in cryoSPARC (symmetry expansion gives each copy a uid of its own)"
        )
    return uids


def _uids(dataset: Any) -> NDArray[np.uint64]:
    uids: NDArray[np.uint64] = np.asarray(dataset["uid"]).astype(np.uint64)
    return uids


def _matching_rows(path: Path, uids: NDArray[np.uint64], other: Path, dataset: Any) -> NDArray[np.int64]:
    """For each uid of the main file, its row in the passthrough."""
    theirs = _unique_uids(other, dataset)
    order = np.argsort(theirs)
    place = np.minimum(np.searchsorted(theirs, uids, sorter=order), len(theirs) - 1)
    rows = order[place]
    missing = uids[theirs[rows] != uids]
    if len(missing):
        raise InputFormatError(
            f"{other}: lacks {len(missing)} of the {len(uids)} uids of {path}, such as "
            f"{', '.join(str(uid) for uid in missing[:EXAMPLES])}; is it the same job's passthrough file?"
        )
    return rows


def write_masked(path: Path, keep_uids: NDArray[np.uint64], output: Path) -> int:
    """Copy a .cs file, atomically, with only the rows of the given uids, in its own order.

    All columns stay; the copy is in NumPy encoding, which every version of cryoSPARC reads.

    Returns
    -------
    How many rows were written.
    """
    dataset = load_dataset(path)
    mask = np.isin(_uids(dataset), keep_uids)
    _save(dataset.mask(mask), output)
    return int(mask.sum())


def write_dataset(columns: Mapping[str, NDArray[Any]], output: Path) -> None:
    """Write columns, uid among them, as a .cs file in NumPy encoding, atomically."""
    from cryosparc.dataset import Dataset

    _save(Dataset([(name, values) for name, values in columns.items()]), output)


def write_group(files: Sequence[Path], output: Path) -> None:
    """Write the .csg that cryoSPARC's "Import Result Group" takes: which .cs file holds which slot.

    Parameters
    ----------
    files
        The .cs files of one set of particles, in the folder of `output`; the first that has a slot counts.
    output
        The `.csg` file to make or replace.
    """
    import yaml
    from cryosparc import __version__
    from cryosparc.dataset import Dataset

    slots: dict[str, dict[str, Any]] = {}
    for file in files:
        header = Dataset.inspect(file)
        for slot in sorted({field[0].partition("/")[0] for field in header["dtype"]} - {"uid"}):
            kind = NUMBERED_SLOTS.get(slot.rstrip("0123456789"), slot)
            found = {"metafile": f">{file.name}", "num_items": header["length"], "type": f"particle.{kind}"}
            slots.setdefault(slot, found)
    group = {
        "created": datetime.datetime.now(datetime.UTC).replace(tzinfo=None),
        "group": {
            "description": GROUP_DESCRIPTION,
            "name": "particles",
            "title": "Particles",
            "type": "particle",
        },
        "results": slots,
        "version": f"v{__version__}",  # of cryosparc-tools, which writes the .cs files
    }
    with replacing(output) as temporary:
        temporary.write_text(yaml.safe_dump(group), encoding="utf-8")


def _save(dataset: Any, output: Path) -> None:
    from cryosparc.dataset import NUMPY_FORMAT

    with replacing(output) as temporary:
        dataset.save(temporary, format=NUMPY_FORMAT)
