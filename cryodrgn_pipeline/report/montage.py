"""Maps as pictures: central slices and projections along x, y and z, all of a set on one grey scale."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.io.mrc import read_volume

TILE_PX = 128
GAP_PX = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """What is kept of a map of `D³` voxels for drawing, in the map's own density units.

    `slices` and `projections` (3, D, D) float32: across and along z, y, x, rows from top to bottom with the
    second coordinate upwards as ChimeraX shows it; projections are means along the axis. `sigma_level` is
    the map's mean plus three standard deviations, a contour level to start from.
    """

    box_size_px: int
    pixel_size_a: float
    slices: NDArray[np.float32]
    projections: NDArray[np.float32]
    sigma_level: float


def read_views(path: Path) -> Views:
    """Read a map and keep its central slices and projections.

    Raises
    ------
    InputFormatError
        If the file is missing or no map.
    """
    density, pixel_size_a = read_volume(path)
    centre = [size // 2 for size in density.shape]
    cuts = [density[centre[0]], density[:, centre[1]], density[:, :, centre[2]]]
    sums = [density.mean(axis=axis) for axis in range(3)]
    side = max(density.shape)
    return Views(
        box_size_px=side,
        pixel_size_a=pixel_size_a,
        slices=np.stack([_square(cut, side) for cut in cuts]),
        projections=np.stack([_square(total, side) for total in sums]),
        sigma_level=float(density.mean() + 3.0 * density.std(dtype=np.float64)),
    )


def _square(image: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """The image turned upright, in a square of `side` pixels."""
    framed = np.zeros((side, side), dtype=np.float32)
    framed[: image.shape[0], : image.shape[1]] = image
    return framed[::-1]


def grey_range(images: Sequence[NDArray[np.float32]]) -> tuple[float, float]:
    """One grey scale for several images: their 0.5th and 99.8th percentile, in density units."""
    values = np.concatenate([np.asarray(image).ravel() for image in images])
    low, high = (float(x) for x in np.percentile(values, (0.5, 99.8)))
    return (low, high) if high > low else (low, low + 1.0)


def grey_sheet(views: Views, slice_range: tuple[float, float], projection_range: tuple[float, float]) -> str:
    """A data URI of a PNG: slices z, y, x in the upper row, projections along z, y, x in the lower."""
    rows = [
        _joined([_grey(image, *limits) for image in images], axis=1)
        for images, limits in ((views.slices, slice_range), (views.projections, projection_range))
    ]
    return png_uri(_joined(rows, axis=0))


def grey_tile(image: NDArray[np.float32], limits: tuple[float, float]) -> str:
    """A data URI of a PNG of one image."""
    return png_uri(_grey(image, *limits))


def difference_sheet(change: NDArray[np.float32], largest: float) -> str:
    """A data URI of a PNG of three difference images `(3, D, D)`: red gained, blue lost, white unchanged."""
    return png_uri(_joined([difference_colours(image, largest) for image in change], axis=1))


def difference_colours(image: NDArray[np.float32], largest: float) -> NDArray[np.uint8]:
    """A difference image `(D, D)` as RGB, `±largest` at the ends of the scale."""
    from matplotlib import colormaps

    scaled = _resized(np.clip(0.5 + 0.5 * image / max(largest, 1e-30), 0, 1))
    return np.asarray(colormaps["RdBu_r"](scaled, bytes=True))[..., :3]


def difference_range(changes: Sequence[NDArray[np.float32]]) -> float:
    """One scale for several difference images: the 99.8th percentile of their magnitude."""
    values = np.concatenate([np.abs(change).ravel() for change in changes])
    return float(np.percentile(values, 99.8))


def _joined(tiles: Sequence[NDArray[np.uint8]], axis: int) -> NDArray[np.uint8]:
    """Tiles side by side with a thin grey line between them."""
    shape = list(tiles[0].shape)
    shape[axis] = GAP_PX
    line = np.full(shape, 128, dtype=np.uint8)
    pieces = [piece for tile in tiles for piece in (line, tile)][1:]
    return np.concatenate(pieces, axis=axis)


def _grey(image: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    scaled = np.clip((image - low) / (high - low), 0, 1)
    return np.asarray(np.rint(_resized(scaled.astype(np.float32)) * 255), dtype=np.uint8)


def _resized(image: NDArray[np.floating]) -> NDArray[np.float32]:
    """Every tile has one size, so that sheets of different boxes line up."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.float32))
    resized = picture.resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(resized, dtype=np.float32), 0, 1)


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """A PNG of grey `(h, w)` or RGB `(h, w, 3)` pixels as a data URI."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
