"""How many particles a dataset has, and of what box: from headers and file sizes, in milliseconds.

The workflow asks this whenever it starts, on the cluster once more in every job, so that no table is read
through: the rows of a large .star file are estimated from samples of it, to about a percent.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from cryodrgn_pipeline.config.models import Dataset
from cryodrgn_pipeline.errors import CryodrgnPipelineError

ASSUMED_PARTICLES = 300_000
ASSUMED_BOX_PX = 256
READ_WHOLE_BYTES = 4 * 2**20  # of rows that are counted
SAMPLES, SAMPLE_BYTES = 32, 64 * 1024  # of larger tables
VALUES = re.compile(rb"""\"[^\"]*\"|'[^']*'|\S+""")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSize:
    """`particles` and the box of their images before preprocessing, and where the two are known from.

    `assumed` says in words what no file told; it is empty where both numbers were found. `sampled`: the rows
    were not counted but estimated from samples.
    """

    particles: int
    box_size_px: int
    origin: str
    assumed: str = ""
    sampled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a file says; None: it does not. `stack`: one of the image files that it names."""

    particles: int | None = None
    box_size_px: int | None = None
    stack: str | None = None
    sampled: bool = False


def source_size(name: str, dataset: Dataset, results: Path, directory: Path) -> SourceSize:
    """The size of a dataset; never an error, since what is not there yet will be made by the workflow.

    Parameters
    ----------
    name, dataset
        The dataset's name and section of the configuration.
    results
        Folder of the workflow's results: a job of cryoSPARC is read into it, particles are imported into it.
    directory
        Folder that the user's paths start at.
    """
    fetched = results / name / "cryosparc" / "particles.cs"
    source = directory / dataset.particles if dataset.particles else fetched
    further = [directory / path for path in dataset.passthrough]
    folders = [directory / dataset.datadir] if dataset.datadir else []
    imported = results / name / "import" / "particles.parquet"
    found, origin = Found(), ""
    for path in (source, *further, imported):
        said = _said_by(path)
        if said.particles is not None and not origin:
            found, origin = said, str(path)
        elif found.box_size_px is None and said.box_size_px is not None:
            found = replace(found, box_size_px=said.box_size_px)
    box = found.box_size_px or _box_of_stack(found.stack, source, [*folders, directory])
    missing = [
        f"{ASSUMED_PARTICLES:,} particles" if found.particles is None else "",
        f"images of {ASSUMED_BOX_PX} px" if box is None else "",
    ]
    assumed = " and ".join(part for part in missing if part)
    return SourceSize(
        particles=ASSUMED_PARTICLES if found.particles is None else found.particles,
        box_size_px=box or ASSUMED_BOX_PX,
        origin=origin,
        assumed=f"{assumed} assumed: {source} does not tell yet" if assumed else "",
        sampled=found.sampled,
    )


def ids_in(path: Path) -> int | None:
    """How many ids a file lists, one a line; None where it is not there."""
    try:
        status = path.stat()
        return _counted_ids(path, status.st_mtime_ns, status.st_size)
    except OSError:
        return None


@lru_cache(maxsize=256)
def _counted_ids(path: Path, _mtime_ns: int, size: int) -> int:
    with path.open("rb") as file:
        return _rows_between(file, 0, size)


def _said_by(path: Path) -> Found:
    try:
        status = path.stat()
        return _read(path, status.st_mtime_ns, status.st_size)
    except OSError:
        return Found()


@lru_cache(maxsize=256)
def _read(path: Path, _mtime_ns: int, size: int) -> Found:
    """What a particle file says, remembered as long as it stays the same."""
    readers = {".star": _read_star, ".cs": _read_cs, ".parquet": _read_parquet}
    try:
        return readers[path.suffix.lower()](path, size)
    except (CryodrgnPipelineError, EOFError, ImportError, KeyError, OSError, ValueError):
        return Found()  # the import will say what is wrong with it


def _read_star(path: Path, size: int) -> Found:
    box: int | None = None
    with path.open("rb") as file:
        for columns, row, start in _first_rows(file):
            if box is None and b"_rlnImageSize" in columns:
                box = int(float(row[columns.index(b"_rlnImageSize")]))
            if b"_rlnImageName" in columns:
                image = row[columns.index(b"_rlnImageName")].decode(errors="replace")
                return Found(
                    particles=_rows_between(file, start, size),
                    box_size_px=box,
                    stack=image.partition("@")[2] or None,
                    sampled=size - start > READ_WHOLE_BYTES,
                )
    return Found()


def _first_rows(file: BinaryIO) -> Iterator[tuple[list[bytes], list[bytes], int]]:
    """Of each loop of a STAR file its columns, its first row, and where that begins."""
    columns: list[bytes] = []
    while line := file.readline():
        words = VALUES.findall(line)
        if not words or words[0].startswith(b"#"):
            continue
        if words[0].startswith((b"data_", b"loop_")):
            columns = []
        elif words[0].startswith(b"_"):
            columns.append(words[0])
        elif columns:
            if len(words) == len(columns):
                yield columns, words, file.tell() - len(line)
            columns = []  # its other rows are passed over


def _rows_between(file: BinaryIO, start: int, stop: int) -> int:
    """Lines that hold something: counted, or from their density in samples of a large file."""
    if stop - start <= READ_WHOLE_BYTES:
        file.seek(start)
        return sum(1 for line in file.read(stop - start).splitlines() if line.strip())
    lines = 0
    for number in range(SAMPLES):
        file.seek(start + number * (stop - start - SAMPLE_BYTES) // (SAMPLES - 1))
        lines += file.read(SAMPLE_BYTES).count(b"\n")
    return round(lines * (stop - start) / (SAMPLES * SAMPLE_BYTES))


def _read_cs(path: Path, _size: int) -> Found:
    with path.open("rb") as file:
        compressed = file.read(6) == b"\x95CSDAT"
    if compressed:
        from cryosparc.dataset import Dataset as Table

        from cryodrgn_pipeline.io.cs import refuse_truncated_csdat

        header = Table.inspect(path)
        refuse_truncated_csdat(path, header)
        if "blob/shape" not in {field[0] for field in header["dtype"]} or not header["length"]:
            return Found(particles=int(header["length"]))
        shape = Table.load(path, fields=["blob/shape"])["blob/shape"]
        return Found(particles=int(header["length"]), box_size_px=int(shape[0][0]))
    import numpy as np

    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    known = rows.dtype.names is not None and "blob/shape" in rows.dtype.names and len(rows)
    return Found(particles=len(rows), box_size_px=int(rows[0]["blob/shape"][0]) if known else None)


def _read_parquet(path: Path, _size: int) -> Found:
    import pyarrow.parquet as pq

    about = pq.read_metadata(path)
    column = about.schema.names.index("box_size_px")
    box = about.row_group(0).column(column).statistics if about.num_row_groups else None
    most = box.max if box is not None and box.has_min_max else None
    return Found(particles=about.num_rows, box_size_px=None if most is None else int(most))


def _box_of_stack(name: str | None, table: Path, folders: list[Path]) -> int | None:
    """The box in the header of an image file, looked for where the import will look."""
    if name is None:
        return None
    here = table.absolute().parent
    for folder in (*folders, here, *here.parents):
        path = folder / name.removesuffix(":mrcs")
        try:
            with path.open("rb") as file:
                sides = file.read(8)
            sizes = [int(struct.unpack(order, sides)[0]) for order in ("<ii", ">ii")]
            return next(nx for nx in sizes if 0 < nx < 2**16)
        except (OSError, StopIteration, struct.error):
            continue
    return None
