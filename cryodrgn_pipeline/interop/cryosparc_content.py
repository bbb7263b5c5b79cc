"""What of a run goes to cryoSPARC: latent coordinates, groups of particles, maps, images; and its digest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.io.ids import read_id_rows
from cryodrgn_pipeline.io.manifest import digest
from cryodrgn_pipeline.io.mrc import read_header
from cryodrgn_pipeline.io.runs import numbered, read_columns, read_latents, stacked

ALL_PARTICLES = "particles"
IMAGES = {  # files of RUN/report → captions
    "latent_pca.png": "latent space, principal components",
    "latent_umap.png": "latent space, UMAP",
    "loss.png": "training",
    "fsc.png": "Fourier shell correlation of the consensus half maps",
    "montage.png": "volumes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """An output of particles: its name and title in cryoSPARC, and `(n,)` rows of the latent table."""

    name: str
    title: str
    rows: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """An output of one map; `halves` are its two half maps where they are independent."""

    name: str
    title: str
    path: Path
    halves: tuple[Path, Path] | None
    box_size_px: int
    voxel_size_a: float

    @property
    def files(self) -> tuple[Path, ...]:
        """The map, and its half maps if any."""
        return (self.path, *(self.halves or ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """All that a push sends: `uid` `(N,)`, `z` `(N, J)`, groups of rows, maps, images with captions.

    `import_maps`: maps by cryoSPARC's own import job instead of outputs of the external job.
    """

    run: Path
    uid: NDArray[np.uint64]
    z: NDArray[np.float32]
    groups: tuple[Group, ...]
    states: tuple[State, ...]
    images: tuple[tuple[Path, str], ...]
    import_maps: bool

    def output_names(self) -> list[str]:
        """The outputs that the external job is to have."""
        states = () if self.import_maps else self.states
        return [*(group.name for group in self.groups), *(state.name for state in states)]

    def digest(self) -> str:
        """Changes with everything that would look different in cryoSPARC."""
        return digest(
            {
                "uid": hashlib.sha256(np.ascontiguousarray(self.uid).tobytes()).hexdigest(),
                "z": [*self.z.shape, hashlib.sha256(np.ascontiguousarray(self.z).tobytes()).hexdigest()],
                "groups": [
                    [group.name, group.title, hashlib.sha256(group.rows.tobytes()).hexdigest()]
                    for group in self.groups
                ],
                "states": [
                    [state.name, state.title, *(_file_digest(path) for path in state.files)]
                    for state in self.states
                ],
                "import_maps": self.import_maps,
                "images": [[caption, _file_digest(path)] for path, caption in self.images],
            }
        )


def gather(
    run: Path,
    volumes: tuple[Path, ...],
    subsets: Mapping[str, Path],
    *,
    clusters: bool = True,
    import_maps: bool = False,
) -> Content:
    """Read what is to be pushed of a run, and check it.

    Parameters
    ----------
    run
        Folder that `train` wrote, of particles with cryoSPARC's uids.
    volumes
        Folders that `volumes` wrote.
    subsets
        Id files by name: one output of particles each.
    clusters
        One output of particles for each cluster of RUN/analysis, if that is there.
    import_maps
        Maps by cryoSPARC's own import job.

    Raises
    ------
    InputFormatError
        If a table is missing or damaged, an id is unknown, or the particles are not cryoSPARC's.
    ConfigError
        If two outputs would have the same name.
    """
    latents = read_latents(run)
    uid = latents.particle_id
    if uid.dtype.kind != "u":
        raise InputFormatError(
            f"{run}: its particles are {uid[0]!r} and the like, not uids of cryoSPARC: the run was not made "
            "from a .cs file, so that nothing in cryoSPARC corresponds to them"
        )
    groups = [Group(name=ALL_PARTICLES, title="All particles", rows=np.arange(len(uid)))]
    if clusters and (run / "analysis" / "particles.parquet").is_file():
        groups += _clusters(run, uid)
    for name, path in subsets.items():
        rows = read_id_rows(path, uid, f"the run {run}")
        groups.append(Group(name=f"{ALL_PARTICLES}_{_plain(name)}", title=f"Subset {name}", rows=rows))
    states = [state for folder in volumes for state in _states(folder)]
    images = [(run / "report" / file, caption) for file, caption in IMAGES.items()]
    content = Content(
        run=run,
        uid=uid,
        z=latents.z,
        groups=tuple(groups),
        states=tuple(states),
        images=tuple(image for image in images if image[0].is_file()),
        import_maps=import_maps,
    )
    names = content.output_names()
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"{', '.join(repeated)}: outputs of cryoSPARC must differ in name; rename a subset")
    return content


def _clusters(run: Path, uid: NDArray[np.uint64]) -> list[Group]:
    path = run / "analysis" / "particles.parquet"
    table = read_columns(path, f"run `cryodrgn-pipeline analyze {run}` again")
    if not np.array_equal(table.get("particle_id", np.empty(0)), uid):
        raise InputFormatError(
            f"{path}: not the particles of latent.parquet; run `cryodrgn-pipeline analyze {run}` again"
        )
    label = table["cluster"]
    return [
        Group(
            name=f"{ALL_PARTICLES}_cluster_{number}",
            title=f"Cluster {number}",
            rows=np.flatnonzero(label == number),
        )
        for number in np.unique(label)
    ]


def _states(folder: Path) -> list[State]:
    table = read_columns(folder / "volumes.parquet", "make it with `cryodrgn-pipeline volumes`")
    z = stacked(table, numbered(table, "z_"))
    states = []
    for row, name in enumerate(table["path"]):
        path = folder / str(name)
        header = read_header(path)
        if not header.n_images == header.ny == header.nx or header.voxel_size_a == 0:
            raise InputFormatError(f"{path}: a cube with a voxel size expected")
        independent = "fsc_independent" in table and bool(table["fsc_independent"][row])
        halves = tuple(folder / str(table[f"half{half}_path"][row]) for half in (1, 2)) if independent else ()
        states.append(
            State(
                name=f"volume_{_plain(folder.name)}_{row:03d}",
                title=f"{folder.name} {row}: z {' '.join(f'{value:.2f}' for value in z[row])}"
                + _resolution(table, row),
                path=path,
                halves=(halves[0], halves[1]) if halves else None,
                box_size_px=header.nx,
                voxel_size_a=header.voxel_size_a,
            )
        )
    return states


def _resolution(table: Mapping[str, NDArray[Any]], row: int) -> str:
    value = float(table["resolution_fsc0143_a"][row]) if "resolution_fsc0143_a" in table else np.nan
    optimistic = "fsc_independent" in table and not table["fsc_independent"][row]
    return f", {value:.1f} Å{' (optimistic)' if optimistic else ''}" if np.isfinite(value) else ""


def _plain(name: str) -> str:
    """A name with only what cryoSPARC allows in the name of an output."""
    return re.sub(r"[^0-9A-Za-z_]", "_", name)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
