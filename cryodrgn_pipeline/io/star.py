"""STAR files of RELION: find the blocks, read the wanted columns, write rows back as they stood.

Particle tables have millions of rows. The blocks are found in a memory map and their rows go through pandas'
C parser, the wanted columns only: 1,000,000 x 30 take a third of `starfile.read`'s time and a quarter of its
memory (benchmarks/import_speed.py). Small tables are written by starfile.
"""

from __future__ import annotations

import io
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.atomic import replacing

if TYPE_CHECKING:
    import pyarrow as pa

COPY_BYTES = 1 << 20
EXAMPLES = 3
BLANK = ord(" ")
"""Bytes up to this one separate values."""

NUMBER_WORDS = ["nan", "NaN", "NAN", "-nan", "<NA>", "NA", "null", "None"]
VALUES = re.compile(r"""\"[^\"]*\"|'[^']*'|\S+""")
BLOCK = re.compile(rb"^[ \t]*data_(\S*)[ \t]*\r?$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class StarBlock:
    """One `data_` block: its columns, and where the text of its rows begins and ends in the file.

    `values` holds the one row of a block that is no loop, and is None for a loop.
    """

    name: str
    columns: tuple[str, ...]
    values: Mapping[str, str] | None
    start: int
    stop: int


class StarTable:
    """The wanted columns of one block, text as Arrow strings and numbers as float64."""

    def __init__(self, path: Path, block: StarBlock, columns: Mapping[str, Any], rows: int) -> None:
        self.path, self.block, self._columns, self.rows = path, block, columns, rows

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column as `(rows,)` float64.

        Raises
        ------
        InputFormatError
            If some rows hold no finite number; the message counts them and shows the first.
        """
        column = self._columns[name]
        if column.dtype.kind in "iuf":
            values: NDArray[np.float64] = column.to_numpy(dtype=np.float64)
        else:
            import pandas as pd

            values = np.asarray(pd.to_numeric(column, errors="coerce"), dtype=np.float64)
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            shown = ", ".join(f"row {row + 1} ({column.iloc[row]})" for row in wrong[:EXAMPLES])
            raise InputFormatError(
                f"{self.path}: column {name} of data_{self.block.name} has no finite number in {len(wrong)} "
                f"of {self.rows} rows: {shown}. Remove these particles or mend the values"
            )
        return values

    def integers(self, name: str) -> NDArray[np.int64]:
        """A column as `(rows,)` int64; an `InputFormatError` where a number is not whole."""
        values = self.numbers(name)
        wrong = np.flatnonzero(values != np.rint(values))
        if len(wrong):
            raise InputFormatError(
                f"{self.path}: column {name} must hold whole numbers, but {len(wrong)} of {self.rows} rows "
                f"do not, first row {wrong[0] + 1} ({values[wrong[0]]})"
            )
        return values.astype(np.int64)

    def text(self, name: str) -> pa.Array:
        """A column as Arrow strings, exactly as written (`00007` stays `00007`)."""
        import pyarrow as pa

        array = pa.array(self._columns[name]).cast(pa.string())
        return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def scan_blocks(path: Path) -> list[StarBlock]:
    """The blocks of a STAR file, without reading their rows.

    Raises
    ------
    InputFormatError
        If the file is missing, empty or holds no `data_` block.
    """
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise InputFormatError(f"{path} is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                heads = list(_heads(content))
                ends = [*(start for start, _, _ in heads), len(content)][1:]
                blocks = [
                    _block(path, content, head[2], head[1], end)
                    for head, end in zip(heads, ends, strict=False)
                ]
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputFormatError(f"{path}: no such STAR file") from error
    except UnicodeDecodeError as error:
        raise InputFormatError(f"{path}: not a STAR file (its header is not text)") from error
    if not blocks:
        raise InputFormatError(f"{path}: not a STAR file: no line starts a data_ block")
    return blocks


def _heads(content: mmap.mmap) -> Iterator[tuple[int, int, str]]:
    """(start of the data_ line, start of what follows, name) of each block."""
    position = 0
    while (found := content.find(b"data_", position)) >= 0:
        line = content.rfind(b"\n", 0, found) + 1
        end = content.find(b"\n", found)
        end = len(content) if end < 0 else end
        match = BLOCK.match(content[line:end]) if found - line < 80 else None
        if match:
            yield line, min(end + 1, len(content)), match.group(1).decode()
        position = found + 5


def _block(path: Path, content: mmap.mmap, name: str, begin: int, end: int) -> StarBlock:
    columns: list[str] = []
    values: dict[str, str] = {}
    loop, position = False, begin
    while position < end:
        newline = content.find(b"\n", position, end)
        after = end if newline < 0 else newline + 1
        line = content[position:after].strip()
        if line == b"loop_":
            loop = True
        elif line.startswith(b"_"):
            label, *rest = VALUES.findall(line.decode())
            columns.append(label.removeprefix("_"))
            if not loop:
                if not rest:
                    raise InputFormatError(f"{path}: {label} in data_{name} has no value")
                values[columns[-1]] = rest[0].strip("\"'")
        elif line and not line.startswith(b"#"):
            break
        position = after
    repeated = sorted({column for column in columns if columns.count(column) > 1})
    if repeated:
        raise InputFormatError(f"{path}: data_{name} has the column {repeated[0]} more than once")
    stop = _last_row_end(content, position, end)
    return StarBlock(
        name=name, columns=tuple(columns), values=None if loop else values, start=position, stop=stop
    )


def _last_row_end(content: mmap.mmap, start: int, end: int) -> int:
    """Where the rows end: comments and blank lines before the next block are not rows."""
    stop = end
    while stop > start:
        line_start = max(start, content.rfind(b"\n", start, stop - 1) + 1)
        line = content[line_start:stop].strip()
        if line and not line.startswith(b"#"):
            return stop
        stop = line_start
    return start


def read_table(path: Path, block: StarBlock, text: Sequence[str], numbers: Sequence[str]) -> StarTable:
    """Read the wanted columns of a block; those it lacks are left out.

    Parameters
    ----------
    path, block
        The file, and one of its `scan_blocks`.
    text, numbers
        Columns to read as text, and as numbers.

    Raises
    ------
    InputFormatError
        If a row has too many or too few values, or the text is not UTF-8.
    """
    import pandas as pd

    text = [name for name in text if name in block.columns]
    numbers = [name for name in numbers if name in block.columns]
    if block.values is not None:
        frame = pd.DataFrame({name: [block.values[name]] for name in [*text, *numbers]}, dtype=str)
        return StarTable(path, block, {name: frame[name] for name in [*text, *numbers]}, 1)
    if block.start == block.stop:
        raise InputFormatError(f"{path}: data_{block.name} has no rows")
    try:
        with _Region(path, block.start, block.stop) as region:
            frame = pd.read_csv(
                io.BufferedReader(region, COPY_BYTES),
                sep=r"\s+",
                engine="c",
                header=None,
                index_col=False,
                names=block.columns,
                usecols=[*text, *numbers],
                dtype=dict.fromkeys(text, str),
                keep_default_na=False,
                na_values=dict.fromkeys(numbers, NUMBER_WORDS),
                low_memory=False,
            )
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputFormatError(f"{path}: the rows of data_{block.name} cannot be read: {error}") from error
    _check_row_lengths(path, block, len(frame))
    return StarTable(path, block, {name: frame[name] for name in [*text, *numbers]}, len(frame))


def _check_row_lengths(path: Path, block: StarBlock, rows: int) -> None:
    """Count the values: pandas, told which columns to use, passes over rows that are too long or short."""
    width, values = len(block.columns), 0
    with _Region(path, block.start, block.stop) as region:
        reader = io.BufferedReader(region, COPY_BYTES)
        while piece := reader.read(COPY_BYTES):
            blank = np.frombuffer(piece + reader.readline(), dtype=np.uint8) <= BLANK
            values += int(not blank[0]) + int(np.count_nonzero(blank[:-1] > blank[1:]))
    if values == rows * width:
        return
    with _Region(path, block.start, block.stop) as region:
        lines = (line for line in io.BufferedReader(region) if line.strip())
        counts = np.array([len(_words(line)) for line in lines])
    wrong = np.flatnonzero(counts != width)
    if len(wrong):
        raise InputFormatError(
            f"{path}: {len(wrong)} of the {len(counts)} rows of data_{block.name} do not have one value for "
            f"each of the {width} columns, first row {wrong[0] + 1} with {counts[wrong[0]]} values: the file "
            "may be truncated"
        )


def _words(line: bytes) -> list[str]:
    text = line.decode(errors="replace")
    return re.findall(r'"[^"]*"|\S+', text) if '"' in text else text.split()


class _Region(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, path: Path, start: int, stop: int) -> None:
        self._file = path.open("rb")
        self._file.seek(start)
        self._left = stop - start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._left]
        count = self._file.readinto(view)
        self._left -= count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def write_masked(path: Path, masks: Mapping[str, NDArray[np.bool_]], output: Path) -> None:
    """Copy a STAR file, atomically, with only some rows of some blocks; everything else byte for byte.

    Parameters
    ----------
    path
        The file to copy.
    masks
        By block name, `(rows,)`: which rows stay.
    output
        The file to make or replace.
    """
    blocks = [block for block in scan_blocks(path) if block.name in masks and block.values is None]
    with path.open("rb") as source, replacing(output) as temporary, temporary.open("wb") as target:
        for block in blocks:
            _copy(source, target, block.start - source.tell())
            keep = iter(masks[block.name])
            while source.tell() < block.stop:
                line = source.readline()
                if not line.strip() or line.lstrip().startswith(b"#") or next(keep):
                    target.write(line)
        _copy(source, target, path.stat().st_size - source.tell())


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    while count > 0 and (piece := source.read(min(count, COPY_BYTES))):
        target.write(piece)
        count -= len(piece)


def write_tables(tables: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """Write `{block: {column: values}}` as a STAR file, atomically, numbers with all their digits.

    Raises
    ------
    ValueError
        If a number is not finite: RELION's parser fails on it.
    """
    import pandas as pd
    import starfile

    frames = {}
    for name, columns in tables.items():
        frames[name] = pd.DataFrame(dict(columns))
        for column, values in columns.items():
            if np.asarray(values).dtype.kind == "f" and not np.isfinite(values).all():
                raise ValueError(f"{column} of data_{name} holds a number that is not finite")
    with replacing(output) as temporary:
        starfile.write(frames, temporary, float_format="%.12g", overwrite=True)
