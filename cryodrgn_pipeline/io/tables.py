"""particles.parquet: the particle set on disk, one row per particle, the unit in every column's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import InputFormatError
from cryodrgn_pipeline.io.atomic import replacing
from cryodrgn_pipeline.particles import UNKNOWN_BOX, Ctf, ImageRef, Optics, ParticleSet, Poses

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

OPTICS_COLUMNS = (
    "optics_group",
    "pixel_size_a",
    "box_size_px",
    "voltage_kv",
    "cs_mm",
    "amplitude_contrast",
)
CTF_COLUMNS = ("phase_shift_deg", "defocus_u_a", "defocus_v_a", "defocus_angle_deg")
ROTATION_COLUMNS = tuple(f"rotation_{row}{column}" for row in range(3) for column in range(3))
SHIFT_COLUMNS = ("shift_x_a", "shift_y_a")
POSE_COLUMNS = ROTATION_COLUMNS + SHIFT_COLUMNS
REQUIRED_COLUMNS = (
    "particle_id",
    "image_path",
    "image_index",
    *OPTICS_COLUMNS,
    *CTF_COLUMNS,
    *POSE_COLUMNS,
    "contrast_sign",
)
OPTIONAL_COLUMNS = ("half_set", "micrograph", "class")


def write_particles(
    particles: ParticleSet, path: Path, extra_columns: Mapping[str, NDArray[Any]] | None = None
) -> None:
    """Write a particle set as Parquet, atomically.

    Parameters
    ----------
    particles
        The set, in canonical form.
    path
        The file to make or replace.
    extra_columns
        Further columns by name, each `(N,)`; readers fetch them with `read_extra`.
    """
    import pyarrow.parquet as pq

    table = to_table(particles)
    for name, values in (extra_columns or {}).items():
        if len(values) != len(particles):
            raise ValueError(f"extra column {name} has {len(values)} rows for {len(particles)} particles")
        table = table.append_column(name, _array(values))
    with replacing(Path(path)) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_particles(path: Path) -> ParticleSet:
    """Read a particle set that `write_particles` wrote.

    Parameters
    ----------
    path
        A particles.parquet, or a folder that holds one.

    Raises
    ------
    InputFormatError
        If the file is missing, is no Parquet, lacks a column or holds nulls where none may be.
    """
    path = _file(path)
    with _opened(path) as file:
        missing = [name for name in REQUIRED_COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise InputFormatError(
                f"{path}: {len(missing)} of the columns of a particle table are missing: "
                f"{', '.join(missing)}. Make the table with `cryodrgn-pipeline import`."
            )
        return _from_file(file, path)


def read_extra(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Read columns by name, each `(N,)`, from a particle table (or any other Parquet table).

    Raises
    ------
    InputFormatError
        If the file is missing or lacks one of the columns.
    """
    path = _file(path)
    with _opened(path) as file:
        present = file.schema_arrow.names
        missing = [name for name in names if name not in present]
        if missing:
            raise InputFormatError(f"{path}: no column {', '.join(missing)}; it has {', '.join(present)}")
        return {name: _numpy(_column(file, name)) for name in names}


def to_table(particles: ParticleSet) -> pa.Table:
    """The particle set as an Arrow table with exactly the columns of particles.parquet."""
    import pyarrow as pa

    n = len(particles)
    images, optics, ctf = particles.images, particles.optics, particles.ctf
    paths = pa.DictionaryArray.from_arrays(
        pa.array(images.stack.astype(np.int32)), pa.array(list(images.stack_paths), type=pa.string())
    )
    box = optics.box_size_px.astype(np.int64)
    columns: dict[str, pa.Array] = {
        "particle_id": _array(particles.particle_id),
        "image_path": paths.cast(pa.string()),
        "image_index": pa.array(images.index.astype(np.int64)),
    }
    columns |= {name: _array(getattr(optics, name)) for name in OPTICS_COLUMNS}
    columns["box_size_px"] = pa.array(box, mask=box == UNKNOWN_BOX)
    columns |= {name: _array(getattr(ctf, name)) for name in CTF_COLUMNS}
    if particles.poses is None:
        columns |= {name: pa.nulls(n, pa.float64()) for name in POSE_COLUMNS}
    else:
        entries = particles.poses.rotation.reshape(n, 9)
        columns |= {name: _array(entries[:, i]) for i, name in enumerate(ROTATION_COLUMNS)}
        columns |= {name: _array(particles.poses.shift_a[:, i]) for i, name in enumerate(SHIFT_COLUMNS)}
    columns["contrast_sign"] = _array(particles.contrast_sign)
    optional = (particles.half_set, particles.micrograph, particles.class_number)
    for name, values in zip(OPTIONAL_COLUMNS, optional, strict=True):
        if values is not None:
            columns[name] = _array(values)
    return pa.table(columns)


def _from_file(file: pq.ParquetFile, path: Path) -> ParticleSet:
    """One column at a time, so that the table is not held twice."""
    n = file.metadata.num_rows

    def numbers(name: str) -> NDArray[Any]:
        column = _column(file, name)
        if column.null_count:
            raise InputFormatError(
                f"{path}: column {name} has no value in {column.null_count} of {n} rows; "
                "import the particles again"
            )
        return _numpy(column)

    def optional(name: str) -> NDArray[Any] | None:
        return numbers(name) if name in file.schema_arrow.names else None

    def side_by_side(names: Sequence[str]) -> NDArray[np.float64]:
        values = np.empty((n, len(names)))
        for i, name in enumerate(names):
            values[:, i] = numbers(name)
        return values

    unposed = n > 0 and all(_column(file, name).null_count == n for name in POSE_COLUMNS)
    paths = _column(file, "image_path").combine_chunks().dictionary_encode()
    return ParticleSet(
        particle_id=numbers("particle_id"),
        images=ImageRef(
            stack_paths=tuple(paths.dictionary.to_pylist()),
            stack=paths.indices.to_numpy(zero_copy_only=False).astype(np.int64),
            index=numbers("image_index").astype(np.int64),
        ),
        optics=Optics(
            box_size_px=_numpy(_column(file, "box_size_px").fill_null(UNKNOWN_BOX)).astype(np.int64),
            **{name: numbers(name) for name in OPTICS_COLUMNS if name != "box_size_px"},
        ),
        ctf=Ctf(**{name: numbers(name) for name in CTF_COLUMNS}),
        poses=None
        if unposed
        else Poses(
            rotation=side_by_side(ROTATION_COLUMNS).reshape(-1, 3, 3), shift_a=side_by_side(SHIFT_COLUMNS)
        ),
        contrast_sign=numbers("contrast_sign"),
        half_set=optional("half_set"),
        micrograph=optional("micrograph"),
        class_number=optional("class"),
    )


def _file(path: Path) -> Path:
    path = Path(path)
    path = path / "particles.parquet" if path.is_dir() else path
    if not path.is_file():
        raise InputFormatError(
            f"{path}: no such table; `cryodrgn-pipeline import` makes it, or `preprocess` if it is a stack's"
        )
    return path


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except pa.ArrowInvalid as error:
        raise InputFormatError(f"{path}: not a readable Parquet table ({error})") from error


def _column(file: pq.ParquetFile, name: str) -> pa.ChunkedArray:
    return file.read([name])[name]


def _array(values: NDArray[Any]) -> pa.Array:
    import pyarrow as pa

    if values.dtype.kind in "OUT":
        return pa.array(values.astype(object), type=pa.string())
    return pa.array(np.ascontiguousarray(values))


def _numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    values: NDArray[Any] = column.to_numpy()
    return values if values.flags.writeable else values.copy()  # torch warns about read-only arrays
