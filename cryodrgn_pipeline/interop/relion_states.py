"""What RELION takes back from a finished workflow: a particle file, a map and half maps for each cluster."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.config.models import Subset
from cryodrgn_pipeline.exporting import export_particles
from cryodrgn_pipeline.io.atomic import replacing
from cryodrgn_pipeline.io.runs import read_columns
from cryodrgn_pipeline.landscape.select import Selection, run_columns, select_particles

OURS = re.compile(r"cluster_\d{3}(_half[12])?\.(star|mrc)|(without_junk|subset)\.star")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Files of one selection of particles; `maps`: none, or the map, followed by half maps if it has any."""

    particles: Path
    maps: tuple[Path, ...] = ()


def write_states(
    results: Path, run: Path, output: Path, subset: Subset | None, check: Callable[[], None]
) -> list[State]:
    """Write `cluster_000.star` and `.mrc`, …, `without_junk.star`, `subset.star`; older ones are removed.

    Parameters
    ----------
    results
        The dataset's folder of a finished workflow, which holds `import`.
    run
        The folder of its run.
    output
        Where the files go.
    subset
        One more choice of particles, for `subset.star`.
    check
        Called before each file; may raise to end it.
    """
    states = []
    for name, ids in _selections(run, subset):
        check()
        particles = output / f"{name}.star"
        export_particles(results / "import", particles, ids)
        states.append(State(particles=particles, maps=_maps(run, name, output)))
    written = {path.name for state in states for path in (state.particles, *state.maps)}
    for path in output.iterdir():
        if OURS.fullmatch(path.name) and path.name not in written:
            path.unlink()
    return states


def _selections(run: Path, subset: Subset | None) -> Iterator[tuple[str, NDArray[Any]]]:
    columns = run_columns(run)
    ids, clusters, junk = (columns[name] for name in ("particle_id", "cluster", "junk"))
    for cluster in np.unique(clusters):
        yield f"cluster_{cluster:03d}", ids[clusters == cluster]
    if 0 < junk.sum() < len(junk):
        yield "without_junk", ids[~junk.astype(bool)]
    if subset is not None:
        selection = Selection(
            clusters=tuple(subset.clusters),
            ranges=tuple(subset.ranges),
            conditions=(subset.where,) if subset.where else (),
            no_junk=subset.without_junk,
            invert=subset.invert,
        )
        yield "subset", select_particles(run, selection)[0]


def _maps(run: Path, name: str, output: Path) -> tuple[Path, ...]:
    """The map at a cluster's centre, which has the cluster's number, under the cluster's name."""
    folder = run / "volumes" / "centers"
    if not name.startswith("cluster_") or not folder.is_dir():
        return ()
    table = read_columns(folder / "volumes.parquet", "run the workflow again")
    row = int(name.removeprefix("cluster_"))
    sources = {"": "path", "_half1": "half1_path", "_half2": "half2_path"}
    placed = []
    for suffix, column in sources.items():
        if column in table:
            placed.append(output / f"{name}{suffix}.mrc")
            _place(folder / str(table[column][row]), placed[-1])
    return tuple(placed)


def _place(source: Path, target: Path) -> None:
    """The same file under another name, without a second copy on the disk where the system allows that."""
    with replacing(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
