"""The files a user would have after a refinement: RELION star, cryoSPARC .cs, image stacks, and the truth."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cryodrgn_pipeline.conventions import cryosparc_from_rotation, relion_from_rotation
from cryodrgn_pipeline.io.atomic import replacing
from cryodrgn_pipeline.simulation.particles import MICROGRAPH_SIZE_PX, Settings, SimulatedParticles

CS_REFINEMENT_BINNING = 1.25
"""cryoSPARC may refine at another pixel size than the images have; its shifts are then in those pixels."""


def write_star(path: Path, particles: SimulatedParticles) -> None:
    """Write RELION 3.1 particles: an optics table, and one row per particle with Å origins."""
    import pandas as pd
    import starfile

    reported = particles.reported
    poses = reported.require_poses("simulate")
    groups, first = np.unique(reported.optics.optics_group, return_index=True)
    optics = pd.DataFrame(
        {
            "rlnOpticsGroupName": [f"opticsGroup{group}" for group in groups],
            "rlnOpticsGroup": groups,
            "rlnMicrographOriginalPixelSize": reported.optics.pixel_size_a[first],
            "rlnVoltage": reported.optics.voltage_kv[first],
            "rlnSphericalAberration": reported.optics.cs_mm[first],
            "rlnAmplitudeContrast": reported.optics.amplitude_contrast[first],
            "rlnImagePixelSize": reported.optics.pixel_size_a[first],
            "rlnImageSize": reported.optics.box_size_px[first],
            "rlnImageDimensionality": np.full(len(groups), 2),
        }
    )
    rot, tilt, psi = relion_from_rotation(poses.rotation)
    place = np.random.default_rng(len(reported)).integers(64, MICROGRAPH_SIZE_PX - 64, (2, len(reported)))
    table = pd.DataFrame(
        {
            "rlnCoordinateX": place[0].astype(np.float64),
            "rlnCoordinateY": place[1].astype(np.float64),
            "rlnImageName": reported.particle_id,
            "rlnMicrographName": reported.micrograph,
            "rlnOpticsGroup": reported.optics.optics_group,
            "rlnDefocusU": reported.ctf.defocus_u_a,
            "rlnDefocusV": reported.ctf.defocus_v_a,
            "rlnDefocusAngle": reported.ctf.defocus_angle_deg,
            "rlnPhaseShift": reported.ctf.phase_shift_deg,
            "rlnAngleRot": rot,
            "rlnAngleTilt": tilt,
            "rlnAnglePsi": psi,
            "rlnOriginXAngst": poses.shift_a[:, 0],
            "rlnOriginYAngst": poses.shift_a[:, 1],
            "rlnRandomSubset": reported.half_set,
        }
    )
    with replacing(path) as temporary:
        blocks = {"optics": optics, "particles": table}
        text = starfile.to_string(blocks, float_format="%.9g")
        # the first line carries the time of writing, and equal seeds must give equal bytes
        temporary.write_text("# version 30001\n" + _without_comments(text), encoding="utf-8")


def _without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("#")) + "\n"


def write_cs(path: Path, particles: SimulatedParticles) -> None:
    """Write cryoSPARC refinement particles, and beside them the passthrough file in another row order."""
    reported = particles.reported
    poses = reported.require_poses("simulate")
    n = len(reported)
    pixel = reported.optics.pixel_size_a
    paths = np.array(reported.images.stack_paths, dtype="S")[reported.images.stack]
    refined_pixel = pixel * CS_REFINEMENT_BINNING
    half = np.zeros(n) if reported.half_set is None else reported.half_set - 1
    radian = np.pi / 180
    main: dict[str, tuple[str, Any]] = {
        "uid": ("<u8", particles.uid),
        "blob/path": (paths.dtype.str, paths),
        "blob/idx": ("<u4", reported.images.index),
        "blob/shape": ("<u4", np.stack([reported.optics.box_size_px] * 2, axis=1)),
        "blob/psize_A": ("<f4", pixel),
        "blob/sign": ("<f4", reported.contrast_sign),
        "ctf/type": ("S6", np.full(n, b"spline")),
        "ctf/exp_group_id": ("<u4", reported.optics.optics_group),
        "ctf/accel_kv": ("<f4", reported.optics.voltage_kv),
        "ctf/cs_mm": ("<f4", reported.optics.cs_mm),
        "ctf/amp_contrast": ("<f4", reported.optics.amplitude_contrast),
        "ctf/df1_A": ("<f4", reported.ctf.defocus_u_a),
        "ctf/df2_A": ("<f4", reported.ctf.defocus_v_a),
        "ctf/df_angle_rad": ("<f4", reported.ctf.defocus_angle_deg * radian),
        "ctf/phase_shift_rad": ("<f4", reported.ctf.phase_shift_deg * radian),
        "ctf/scale": ("<f4", np.ones(n)),
        "ctf/bfactor": ("<f4", np.zeros(n)),
        "alignments3D/split": ("<u4", half),
        "alignments3D/shift": ("<f4", poses.shift_a / refined_pixel[:, None]),
        "alignments3D/pose": ("<f4", cryosparc_from_rotation(poses.rotation)),
        "alignments3D/psize_A": ("<f4", refined_pixel),
    }
    _save_cs(path, main)
    film_names = np.zeros(n, dtype="S1") if reported.micrograph is None else reported.micrograph.astype("S")
    films, film = np.unique(film_names, return_inverse=True)
    passthrough: dict[str, tuple[str, Any]] = {
        "uid": ("<u8", particles.uid),
        "location/micrograph_uid": ("<u8", film.astype(np.uint64) + np.uint64(10**18)),
        "location/exp_group_id": ("<u4", reported.optics.optics_group),
        "location/micrograph_path": (films.dtype.str, films[film]),
    }
    shuffled = np.argsort(particles.uid)
    _save_cs(
        path.with_name(f"{path.stem}_passthrough{path.suffix}"),
        {name: (kind, values[shuffled]) for name, (kind, values) in passthrough.items()},
    )


def _save_cs(path: Path, columns: dict[str, tuple[str, Any]]) -> None:
    fields = [(name, kind, np.shape(values)[1:]) for name, (kind, values) in columns.items()]
    table = np.zeros(len(columns["uid"][1]), dtype=np.dtype(fields))
    for name, (_, values) in columns.items():
        table[name] = values
    with replacing(path) as temporary, temporary.open("wb") as out:
        np.lib.format.write_array(out, table, allow_pickle=False)


def truth_columns(particles: SimulatedParticles, settings: Settings) -> dict[str, Any]:
    """The true coordinates of the particles by name, each `(N,)`."""
    if settings.species:
        return {"species": particles.species}
    return {"motion": particles.motion, "occupancy": particles.occupancy}


def write_truth(path: Path, particles: SimulatedParticles, settings: Settings) -> None:
    """Write truth.parquet: one row per particle, in table order, with both of its ids."""
    import pandas as pd

    reported = particles.reported
    columns: dict[str, Any] = {
        "particle_id": reported.particle_id.astype(str),
        "uid": particles.uid,
        **truth_columns(particles, settings),
        "contrast": particles.contrast,
        "junk": particles.junk,
        "shift_x_a": particles.poses.shift_a[:, 0],
        "shift_y_a": particles.poses.shift_a[:, 1],
        "defocus_u_a": reported.ctf.defocus_u_a,
        "defocus_v_a": reported.ctf.defocus_v_a,
        "defocus_angle_deg": reported.ctf.defocus_angle_deg,
    }
    if not settings.species and settings.motion in ("hinge", "twist"):
        columns["motion_deg"] = (particles.motion - 0.5) * settings.motion_range
    for i in range(3):
        for j in range(3):
            columns[f"rotation_{i}{j}"] = particles.poses.rotation[:, i, j]
    with replacing(path) as temporary:
        pd.DataFrame(columns).to_parquet(temporary, index=False)


def write_description(path: Path, settings: Settings, measured: dict[str, float | str]) -> None:
    """Write simulate.json: every setting, and what was measured while the set was made."""
    from cryodrgn_pipeline import __version__
    from cryodrgn_pipeline.io.atomic import write_json

    write_json(path, {"version": __version__, "settings": asdict(settings), **measured})
