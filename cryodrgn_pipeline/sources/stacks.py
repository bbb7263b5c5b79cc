"""Find the image files that a particle table names, and check that they are the ones it means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.mrc import MrcHeader, read_header
from cryodrgn_pipeline.progress import progress
from cryodrgn_pipeline.sources.cryosparc import EXPORTED
from cryodrgn_pipeline.sources.draft import Draft

EXAMPLES = 3
SAME_PIXEL_SIZE = 0.01
RELION_STACK_TYPE = ":mrcs"


@dataclass(frozen=True, slots=True, kw_only=True)
class StackFile:
    """An image file: its path in the source, where it was found, its number of images, size and time."""

    source_path: str
    path: Path
    images: int
    size_bytes: int
    mtime_ns: int


def find_stacks(draft: Draft, datadir: Path | None) -> tuple[Path, ...]:
    """Where each of the draft's stacks lies, as absolute paths (links are not followed).

    A path is tried below `datadir`, below the working directory, and below the table's folder and its
    parents; a cryoSPARC path with a leading `>` below the .cs file's own folder first. Files that lie
    directly in `datadir` are found as well, if their names differ.

    Raises
    ------
    InputFormatError
        If some are nowhere; the message lists what was tried.
    """
    table_folder = draft.path.resolve().parent
    bases = [*([datadir] if datadir else []), Path.cwd(), table_folder, *table_folder.parents]
    names = Counter(Path(plain_path(path)).name for path in draft.stack_paths)
    found: list[Path] = []
    missing: list[str] = []
    tried: list[Path] = []
    for source_path in draft.stack_paths:
        plain = plain_path(source_path)
        candidates = [base / plain for base in bases]
        if source_path.startswith(EXPORTED):
            candidates.insert(0, table_folder / plain)
        if datadir and names[Path(plain).name] == 1:
            candidates.insert(1, datadir / Path(plain).name)
        candidates = list(dict.fromkeys(Path.absolute(candidate) for candidate in candidates))
        place = next((candidate for candidate in candidates if candidate.is_file()), None)
        if place is not None:
            found.append(place)
            continue
        tried = tried or candidates
        missing.append(source_path)
        if not found and len(missing) == EXAMPLES:
            break  # the whole project lies elsewhere: a million more look-ups tell nothing new
    if missing:
        some = "the" if not found else f"{len(missing)} of the"
        raise InputFormatError(
            f"{draft.path}: {some} {len(draft.stack_paths)} image files that it names are not found, such as "
            f"{missing[0]}; tried {', '.join(str(path) for path in tried)}. Name the folder that the paths "
            "are relative to (RELION's or cryoSPARC's project folder) with --datadir, or import without the "
            "images with --metadata-only"
        )
    return tuple(found)


def plain_path(source_path: str) -> str:
    """The path without cryoSPARC's leading `>` (exported) and RELION's trailing `:mrcs` (read as a stack)."""
    return source_path.removeprefix(EXPORTED).removesuffix(RELION_STACK_TYPE)


def check_stacks(draft: Draft, places: Sequence[Path]) -> list[StackFile]:
    """Check image numbers, boxes and file lengths against the table; a missing box is taken from the headers.

    Raises
    ------
    InputFormatError
        If a stack is truncated, not square, of another box, or has fewer images than the table names.
    """
    n_stacks = len(places)
    last = np.full(n_stacks, -1)
    np.maximum.at(last, draft.stack, draft.index)
    files: list[StackFile] = []
    headers: list[MrcHeader] = []
    with progress("checking image files", n_stacks, "files") as advance:
        for number, place in enumerate(places):
            header = read_header(place)
            if last[number] >= header.n_images:
                raise InputFormatError(
                    f"{place} holds {header.n_images} images, but {draft.path} names image "
                    f"{last[number] + 1} of it; is it the right file?"
                )
            if header.ny != header.nx:
                raise InputFormatError(f"{place}: images must be square, found {header.ny} x {header.nx} px")
            status = place.stat()
            files.append(
                StackFile(
                    source_path=draft.stack_paths[number],
                    path=place,
                    images=header.n_images,
                    size_bytes=status.st_size,
                    mtime_ns=status.st_mtime_ns,
                )
            )
            headers.append(header)
            advance(1)
    _check_box(draft, places, headers)
    _compare_pixel_sizes(draft, headers)
    return files


def _check_box(draft: Draft, places: Sequence[Path], headers: Sequence[MrcHeader]) -> None:
    header_box = np.array([header.nx for header in headers], dtype=np.float64)[draft.stack]
    if "box_size_px" not in draft.columns:
        draft.put("box_size_px", header_box, "image file header")
        return
    wrong = np.flatnonzero(draft.columns["box_size_px"] != header_box)
    if len(wrong):
        row = wrong[0]
        raise InputFormatError(
            f"{draft.path}: {len(wrong)} of {len(draft)} rows have box_size_px "
            f"({draft.origins['box_size_px']}) unlike their image file, first row {row + 1}: "
            f"{draft.columns['box_size_px'][row]:.0f} px, but {places[draft.stack[row]]} has "
            f"{header_box[row]:.0f} px"
        )


def _compare_pixel_sizes(draft: Draft, headers: Sequence[MrcHeader]) -> None:
    """Say which pixel size is used where table and headers differ; 0 and 1 Å in a header mean "not set"."""
    if "pixel_size_a" not in draft.columns or not len(draft):
        return
    origin = draft.origins["pixel_size_a"]
    table = draft.columns["pixel_size_a"]
    header = np.array([header.voxel_size_a for header in headers])[draft.stack]
    told = (header > 0) & (header != 1)
    differs = np.flatnonzero(told & (np.abs(header / table - 1) > SAME_PIXEL_SIZE))
    if len(differs):
        row = differs[0]
        draft.warnings.append(
            f"pixel size: using {table[row]:.5g} A from {origin}, but the image headers of {len(differs)} of "
            f"{len(draft)} particles say {header[row]:.5g} A; if those are right: --set "
            f"pixel_size_a={header[row]:.5g}"
        )
    elif origin.startswith("rlnDetectorPixelSize"):
        says = (
            f"the image headers say the same ({header[told][0]:.5g} A)"
            if told.any()
            else ("the image headers do not tell it, so check that the magnification is calibrated")
        )
        draft.notes.append(f"pixel size: {table[0]:.5g} A from {origin}; {says}")
