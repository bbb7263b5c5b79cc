"""MRC images and maps: headers checked against file lengths, stacks read and written lazily.

Stacks are read by position (`preadv`) and not through a mapping: the resident memory of a run stays flat
however many images pass, and a file that shrinks meanwhile gives an error instead of killing the process.
"""

from __future__ import annotations

import logging
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from mrcfile.dtypes import HEADER_DTYPE
from numpy.typing import NDArray

from cryodrgn_pipeline import __version__
from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.atomic import replacing

log = logging.getLogger(__name__)

HEADER_BYTES = 1024
DTYPE_OF_MODE = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
MODE_OF_DTYPE = {"float32": 2, "float16": 12}
LITTLE_ENDIAN_STAMP = (0x44, 0x41, 0, 0)
LARGEST_PLAUSIBLE_MODE = 127
GAP_BYTES, RUN_BYTES = 2**20, 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class MrcHeader:
    """What a reader needs from an MRC header; `voxel_size_a` is 0 where the header does not tell it."""

    n_images: int
    ny: int
    nx: int
    mode: int
    dtype: np.dtype[Any]
    voxel_size_a: float
    data_offset: int

    @property
    def image_bytes(self) -> int:
        """Bytes of one image on disk."""
        return self.ny * self.nx * self.dtype.itemsize


def read_header(path: str | os.PathLike[str]) -> MrcHeader:
    """Read and check the header of an MRC image, stack or map.

    Parameters
    ----------
    path
        `.mrc` or `.mrcs` file of either byte order, mode 0, 1, 2, 6 or 12.

    Raises
    ------
    InputFormatError
        If there is no such file, the header makes no sense, the mode is not supported, or the file is
        shorter than its header says.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise InputFormatError(f"{path}: no such image file") from error
    if len(raw) < HEADER_BYTES:
        raise InputFormatError(
            f"{path}: {size} bytes, but an MRC header alone has {HEADER_BYTES}; the file is truncated or not "
            "an MRC file"
        )
    fields = _fields_in_either_byte_order(path, raw)
    nx, ny, nz = int(fields["nx"]), int(fields["ny"]), int(fields["nz"])
    mode = int(fields["mode"])
    if mode not in DTYPE_OF_MODE:
        supported = ", ".join(f"{known} ({np.dtype(name)})" for known, name in DTYPE_OF_MODE.items())
        raise InputFormatError(f"{path}: MRC mode {mode} is not supported; supported are {supported}")
    if min(nx, ny, nz) < 1 or int(fields["nsymbt"]) < 0:
        raise InputFormatError(
            f"{path}: the header gives {nz} images of {ny} x {nx} px; the file is damaged or not an MRC file"
        )
    columns = int(fields["mx"])
    voxel_size = float(fields["cella"]["x"]) / columns if columns > 0 else 0.0
    header = MrcHeader(
        n_images=nz,
        ny=ny,
        nx=nx,
        mode=mode,
        dtype=np.dtype(DTYPE_OF_MODE[mode]).newbyteorder(fields.dtype["nx"].byteorder),
        voxel_size_a=voxel_size if math.isfinite(voxel_size) and voxel_size > 0 else 0.0,
        data_offset=HEADER_BYTES + int(fields["nsymbt"]),
    )
    _check_length(path, header, size)
    return header


def _fields_in_either_byte_order(path: Path, raw: bytes) -> Any:
    """The header record in the byte order that makes its mode plausible (old machine stamps lie)."""
    for order in "<>":
        fields = np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order))[0]
        if 0 <= int(fields["mode"]) <= LARGEST_PLAUSIBLE_MODE and 0 < int(fields["nx"]) < 2**24:
            return fields
    raise InputFormatError(f"{path}: not an MRC file (no plausible mode and size in either byte order)")


def _check_length(path: Path, header: MrcHeader, size: int) -> None:
    needed = header.data_offset + header.n_images * header.image_bytes
    if size < needed:
        whole = max(0, size - header.data_offset) // header.image_bytes
        raise InputFormatError(
            f"{path} is truncated: its header says {header.n_images} images of {header.ny} x {header.nx} "
            f"px ({header.dtype.name}), {needed} bytes, the file has {size} bytes ({whole} whole images): "
            "copy or extract it again"
        )
    if size > needed:
        log.warning("%s: %d bytes follow the last image the header announces", path, size - needed)


class MrcImages:
    """The images of one stack, read on demand; safe to share between threads and forked processes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.header = read_header(self.path)
        self._descriptor = os.open(self.path, os.O_RDONLY)

    def __len__(self) -> int:
        return self.header.n_images

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # another process opens the file for itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        MrcImages.__init__(self, state["path"])

    def read(self, index: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Images of the given 0-based numbers, in that order (repeats allowed): `(n, ny, nx)` float32.

        Neighbouring numbers are read at once, so sorted numbers read fastest.
        """
        index = np.asarray(index, dtype=np.int64)
        out = np.empty((len(index), self.header.ny, self.header.nx), dtype=np.float32)
        self.read_into(index, out)
        return out

    def read_into(self, index: NDArray[np.integer[Any]], out: NDArray[np.float32]) -> None:
        """As `read`, into a C-contiguous `(n, ny, nx)` float32 array."""
        index = np.asarray(index, dtype=np.int64)
        n = self.header.n_images
        if len(index) == 0:
            return
        if not (index.min() >= 0 and index.max() < n):
            wrong = index[(index < 0) | (index >= n)][0]
            raise InputFormatError(f"{self.path}: image number {wrong} asked for (0-based), but it has {n}")
        starts = np.flatnonzero(np.diff(index, prepend=-2) != 1)
        for start, stop in zip(starts, np.append(starts[1:], len(index)), strict=True):
            self._read_run(int(index[start]), out[start:stop])

    def read_stored(self, index: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Images of rising 0-based numbers in the type of the file, `(n, ny, nx)`: for many, in long runs.

        Gaps of less than a MiB between images are read through: seeking costs a parallel file system more.
        """
        header = self.header
        if len(index) and not (index[0] >= 0 and index[-1] < len(self) and (np.diff(index) > 0).all()):
            raise ValueError(f"{self.path}: rising image numbers from 0 to {len(self) - 1} expected")
        out = np.empty((len(index), header.ny, header.nx), dtype=header.dtype)
        gap = 1 + GAP_BYTES // header.image_bytes
        starts = np.flatnonzero(np.diff(index, prepend=-gap - 1) > gap).tolist()
        most = max(1, RUN_BYTES // header.image_bytes)
        for start, end in pairwise([*starts, len(index)]):
            while start < end:
                first = int(index[start])
                stop = min(end, int(np.searchsorted(index, first + most)))
                count = int(index[stop - 1]) + 1 - first
                if count == stop - start:
                    self._fill(first, out[start:stop])
                else:
                    run = np.empty((count, header.ny, header.nx), dtype=header.dtype)
                    self._fill(first, run)
                    out[start:stop] = run[index[start:stop] - first]
                start = stop
        return out

    def _read_run(self, first: int, out: NDArray[np.float32]) -> None:
        same = self.header.dtype == np.dtype(np.float32)  # in the machine's own byte order
        raw = out if same else np.empty(out.shape, self.header.dtype)
        self._fill(first, raw)
        if not same:
            out[...] = raw

    def _fill(self, first: int, raw: NDArray[Any]) -> None:
        """Read neighbours from number `first` into `(n, ny, nx)` memory of the file's type."""
        header = self.header
        target = raw.view(np.uint8).data.cast("B")
        offset, done = header.data_offset + first * header.image_bytes, 0
        while done < len(target):
            count = os.preadv(self._descriptor, [target[done:]], offset + done)
            if count == 0:
                size = os.fstat(self._descriptor).st_size
                raise InputFormatError(
                    f"{self.path}: became shorter while it was read: {size} bytes are left, bytes up to "
                    f"{offset + len(target)} were asked for"
                )
            done += count

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> MrcImages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


class MrcStackWriter:
    """Write a stack front to back; the header, with true statistics, follows when it is closed.

    The number of images is fixed from the start, and `close` refuses a stack that lacks some. The file is
    written under the given name: put it in a temporary place (see `io.atomic`) and rename it when closed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_images: int,
        box_size_px: int,
        voxel_size_a: float,
        dtype: str = "float32",
        label: str = "",
    ) -> None:
        """Open `path` for `n_images` of `box_size_px`² px at `voxel_size_a` Å as float32 or float16."""
        if dtype not in MODE_OF_DTYPE:
            raise ValueError(f"stacks are written as {' or '.join(MODE_OF_DTYPE)}, not {dtype}")
        self.path = Path(path)
        self.n_images, self.box_size_px, self.voxel_size_a = n_images, box_size_px, voxel_size_a
        self.dtype, self.label = np.dtype(dtype), label
        self.written = 0
        self._sum = self._squares = 0.0
        self._lowest, self._highest = math.inf, -math.inf
        self._file = self.path.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def append(self, images: NDArray[np.float32]) -> None:
        """Write the next `(n, D, D)` images."""
        d = self.box_size_px
        if images.shape[1:] != (d, d) or self.written + len(images) > self.n_images:
            raise ValueError(f"{images.shape} does not fit {self.n_images - self.written} more of {d} px")
        stored = np.ascontiguousarray(images, dtype=self.dtype)
        flat = images.reshape(-1)
        self._lowest = min(self._lowest, float(flat.min()))
        self._highest = max(self._highest, float(flat.max()))
        self._sum += float(images.reshape(len(images), -1).sum(1).sum(dtype=np.float64))
        self._squares += sum(float(np.vdot(image, image)) for image in images)
        self._file.write(stored.data)
        self.written += len(images)

    def close(self) -> None:
        """Write the header and bring everything to the disk."""
        if self.written != self.n_images:
            raise ValueError(f"{self.path}: {self.written} of {self.n_images} images were written")
        d, n = self.box_size_px, self.n_images
        count = n * d * d
        mean = self._sum / count
        header = np.zeros((), HEADER_DTYPE)
        header["nx"], header["ny"], header["nz"] = d, d, n
        header["mx"], header["my"], header["mz"] = d, d, 1
        header["mode"] = MODE_OF_DTYPE[self.dtype.name]
        header["cella"] = (d * self.voxel_size_a, d * self.voxel_size_a, self.voxel_size_a)
        header["cellb"] = (90, 90, 90)
        header["mapc"], header["mapr"], header["maps"] = 1, 2, 3
        header["dmin"], header["dmax"] = self.dtype.type(self._lowest), self.dtype.type(self._highest)
        header["dmean"] = mean
        header["rms"] = math.sqrt(max(0.0, self._squares / count - mean**2))
        header["nversion"], header["map"] = 20141, b"MAP "
        header["machst"] = LITTLE_ENDIAN_STAMP
        header["nlabl"] = 1
        header["label"][0] = _label(self.label)
        self._file.seek(0)
        self._file.write(header.astype(HEADER_DTYPE.newbyteorder("<")).tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> MrcStackWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            with suppress(OSError):  # on a full disk what is still buffered has nowhere to go
                self._file.close()


def write_volume(
    path: str | os.PathLike[str], volume: NDArray[Any], voxel_size_a: float, label: str = ""
) -> None:
    """Write a map, atomically: float32, ispg 1, origin and nstart 0, voxel size and statistics set.

    Parameters
    ----------
    path
        `.mrc` file to write; one of that name is replaced.
    volume
        `(D, D, D)` density, index order [z, y, x].
    voxel_size_a
        Å per voxel.
    label
        What the map is, up to 50 characters; it follows the program's name and version in the header.
    """
    import mrcfile

    volume = np.ascontiguousarray(volume, dtype=np.float32)
    if volume.ndim != 3 or not voxel_size_a > 0:
        raise ValueError(f"a map has three axes and a voxel size, got {volume.shape} and {voxel_size_a} Å")
    with replacing(Path(path)) as temporary, mrcfile.new(temporary, overwrite=True) as mrc:
        mrc.set_data(volume)
        mrc.set_volume()
        mrc.voxel_size = voxel_size_a
        mrc.header.nlabl = 1
        mrc.header.label[0] = _label(label)


def read_volume(path: str | os.PathLike[str]) -> tuple[NDArray[np.float32], float]:
    """Read a map: `(nz, ny, nx)` float32 and its voxel size in Å (0 where the header does not tell it)."""
    with MrcImages(path) as images:
        return images.read(np.arange(len(images))), images.header.voxel_size_a


def _label(text: str) -> bytes:
    return f"cryodrgn_pipeline {__version__} {text}".encode("ascii", "replace")[:80]
