"""ChimeraX scripts that open a run's maps as they are meant to be seen; paths relative to the script."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

HEADER = (
    "# ChimeraX script by cryodrgn-pipeline. Open in an empty session, or run `chimerax {name}`.\n"
    "# Paths are relative to this file. `volume #1 level …` raises or lowers the contour.\n"
)
LOOK = "set bgColor white\nlighting soft\ngraphics silhouettes true\n"


def consensus_script(path: Path, map_path: Path, level: float) -> str:
    """A script that opens the consensus map at a contour level (density units)."""
    return (
        HEADER.format(name=path.name)
        + f"open {_relative(map_path, path)}\n"
        + f"volume #1 style surface step 1 level {level:.5g} color #9fb4c7\n"
        + LOOK
        + "view\n"
    )


def path_script(path: Path, folder: Path, level: float, dust_a: float) -> str:
    """A script that plays the maps `vol_*.mrc` of a traversal folder back and forth as one series.

    Parameters
    ----------
    path
        Where the script will lie.
    folder
        Folder with the maps.
    level
        Contour level of all maps, density units.
    dust_a
        Blobs smaller than this are hidden, in Å.
    """
    return (
        HEADER.format(name=path.name)
        + f"open {_relative(folder / 'vol_*.mrc', path)} vseries true\n"
        + f"volume #1 style surface step 1 level {level:.5g} color #9fb4c7\n"
        + f"surface dust #1 size {dust_a:.4g}\n"
        + LOOK
        + "view\n"
        + "vseries play #1 loop true direction oscillate maxFrameRate 6\n"
    )


def states_script(
    path: Path, maps: Sequence[Path], colours: Sequence[str], level: float, dust_a: float
) -> str:
    """A script that opens separate states side by side, each in its colour (`#rrggbb`)."""
    lines = [f"open {_relative(file, path)}" for file in maps]
    lines += [
        f"volume #{i} style surface step 1 level {level:.5g} color {colour}"
        for i, colour in enumerate(colours, start=1)
    ]
    lines += [f"surface dust #1-{len(maps)} size {dust_a:.4g}", "tile" if len(maps) > 1 else "view"]
    return HEADER.format(name=path.name) + "\n".join(lines) + "\n" + LOOK


def _relative(target: Path, script: Path) -> str:
    text = Path(os.path.relpath(target.resolve(), script.parent.resolve())).as_posix()
    return f'"{text}"' if any(letter.isspace() or letter in ";#," for letter in text) else text
