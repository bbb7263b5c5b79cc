"""Every trap of RELION and cryoSPARC particle files is imported right, refused with its cure, or recorded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from particle_files import (
    OPTICS,
    alignment_columns,
    cs_columns,
    loop_block,
    particle_columns,
    write_cryosparc,
    write_relion,
    write_stack,
)

from cryodrgn_pipeline.conventions import Remedies
from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.importing import ImportOptions, import_particles
from cryodrgn_pipeline.io.imported import read_info
from cryodrgn_pipeline.io.tables import read_particles
from cryodrgn_pipeline.particles import UNKNOWN_BOX, ParticleSet


def imported(source: Path, *assignments: str, **options: Any) -> ParticleSet:
    """Import without images, and read back what was written."""
    options.setdefault("metadata_only", True)
    folder = source.parent / "import"
    import_particles(source, folder, ImportOptions(assignments=assignments, **options))
    return read_particles(folder)


def info_of(source: Path) -> dict[str, Any]:
    return read_info(source.parent / "import")


# ── Fixtures from real packages ──


def check_expected(particles: ParticleSet, expected: Path) -> None:
    with np.load(expected) as file:
        rotation, shift, ctf = file["rotation"], file["shift_box_fraction"], file["ctf"].astype(float)
    poses, optics, defocus = particles.require_poses("the test"), particles.optics, particles.ctf
    np.testing.assert_allclose(poses.rotation, rotation, atol=2e-6)
    box = ctf[:, :1]
    np.testing.assert_allclose(poses.shift_a / optics.pixel_size_a[:, None], shift * box, atol=1e-4)
    ours = [
        *(optics.pixel_size_a, defocus.defocus_u_a, defocus.defocus_v_a, defocus.defocus_angle_deg),
        *(optics.voltage_kv, optics.cs_mm, optics.amplitude_contrast, defocus.phase_shift_deg),
    ]
    np.testing.assert_allclose(np.stack(ours, axis=1), ctf[:, 1:], rtol=1e-5)


def test_a_relion_3_0_refinement_gives_the_expected_poses_and_ctf(shared_data: Path, tmp_path: Path) -> None:
    options = ImportOptions(metadata_only=True, assignments=("amplitude_contrast=0.1", "box_size_px=300"))
    particles = import_particles(shared_data / "relion30_pfcrt.star", tmp_path, options)
    check_expected(particles, shared_data / "expected_relion30_pfcrt.npz")
    assert particles.particle_id[0] == "000001@Extract/job012/FinalRefinement-OriginalParticles-PfCRT.mrcs"
    np.testing.assert_array_equal(particles.half_set, [2, 1, 2, 2, 2])
    np.testing.assert_array_equal(particles.optics.box_size_px, 300)


def test_a_cryosparc_refinement_gives_the_expected_poses_and_ctf(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "cryosparc_p12_j24_first100.cs"
    particles = import_particles(source, tmp_path, ImportOptions(metadata_only=True))
    check_expected(particles, shared_data / "expected_cryosparc_p12_j24_first100.npz")
    assert particles.particle_id.dtype == np.uint64
    assert int(particles.particle_id[0]) == 15494748553812943456
    assert set(particles.contrast_sign) == {-1}
    np.testing.assert_array_equal(particles.half_set[:2], [2, 1])


def test_star_and_cs_of_the_same_images_give_the_same_ctf(shared_data: Path, tmp_path: Path) -> None:
    star, cs = (
        import_particles(shared_data / f"empiar_10076_7.{kind}", tmp_path / kind) for kind in ("star", "cs")
    )
    for name in ("defocus_u_a", "defocus_v_a", "defocus_angle_deg", "phase_shift_deg"):
        np.testing.assert_allclose(getattr(star.ctf, name), getattr(cs.ctf, name), rtol=2e-6)
    for name in ("pixel_size_a", "voltage_kv", "cs_mm", "amplitude_contrast", "box_size_px"):
        np.testing.assert_allclose(getattr(star.optics, name), getattr(cs.optics, name), rtol=2e-6)
    assert star.images.stack_paths == cs.images.stack_paths
    np.testing.assert_array_equal(star.images.index, cs.images.index)


def test_particles_without_poses_are_imported_and_refused_where_poses_are_needed(
    shared_data: Path, tmp_path: Path
) -> None:
    for kind in ("star", "cs"):
        particles = import_particles(shared_data / f"empiar_10076_7.{kind}", tmp_path / kind)
        assert particles.poses is None
        with pytest.raises(InputFormatError, match="no poses: train needs a rotation"):
            particles.require_poses("train")


def test_a_relion_3_1_refinement_is_found_with_its_images(shared_data: Path, tmp_path: Path) -> None:
    particles = import_particles(shared_data / "relion31.star", tmp_path)
    assert particles.images.stack_paths == (str((shared_data / "relion31.mrcs").resolve()),)
    np.testing.assert_array_equal(particles.images.index, np.arange(5))
    np.testing.assert_allclose(particles.ctf.defocus_u_a[0], 13108.082418, rtol=1e-12)
    np.testing.assert_allclose(particles.require_poses("").shift_a[0], [0.019324, -0.64686], rtol=1e-12)
    np.testing.assert_allclose(particles.optics.pixel_size_a, 2.806)
    stack = read_info(tmp_path)["image_stacks"][0]
    assert stack["size_bytes"] == 1311744
    assert stack["mtime_ns"] == (shared_data / "relion31.mrcs").stat().st_mtime_ns


# ── RELION ──


def test_origins_in_angstrom_win_over_origins_in_pixels(tmp_path: Path) -> None:
    columns = particle_columns() | {"rlnOriginX": [100] * 4, "rlnOriginY": [100] * 4}
    poses = imported(write_relion(tmp_path / "p.star", columns)).require_poses("")
    np.testing.assert_array_equal(poses.shift_a[:, 0], columns["rlnOriginXAngst"])
    np.testing.assert_array_equal(poses.shift_a[:, 1], columns["rlnOriginYAngst"])


def relion_3_0(tmp_path: Path, **changes: Sequence[Any]) -> Path:
    columns = particle_columns()
    for name in ("rlnOpticsGroup", "rlnOriginXAngst", "rlnOriginYAngst"):
        del columns[name]
    columns |= {"rlnVoltage": [300] * 4, "rlnSphericalAberration": [2.7] * 4}
    columns |= {"rlnAmplitudeContrast": [0.1] * 4, "rlnDetectorPixelSize": [5] * 4}
    columns |= {"rlnMagnification": [40000] * 4, "rlnOriginX": [1, 2, 3, 4], "rlnOriginY": [-1, 0, 1, 0.5]}
    return write_relion(tmp_path / "p.star", columns | changes, optics=None)


def test_a_relion_3_0_pixel_is_detector_pixel_over_magnification(tmp_path: Path) -> None:
    particles = imported(relion_3_0(tmp_path))
    np.testing.assert_allclose(particles.optics.pixel_size_a, 1.25)
    np.testing.assert_allclose(particles.require_poses("").shift_a[:, 0], [1.25, 2.5, 3.75, 5])
    np.testing.assert_allclose(particles.require_poses("").shift_a[:, 1], [-1.25, 0, 1.25, 0.625])
    np.testing.assert_array_equal(particles.optics.optics_group, 1)


def test_origins_in_pixels_follow_an_overridden_pixel_size(tmp_path: Path) -> None:
    particles = imported(relion_3_0(tmp_path), "pixel_size_a=2")
    np.testing.assert_array_equal(particles.optics.pixel_size_a, 2)
    np.testing.assert_array_equal(particles.require_poses("").shift_a[:, 0], [2, 4, 6, 8])


def test_origins_in_pixels_of_unknown_size_ask_for_the_pixel_size_alone(tmp_path: Path) -> None:
    optics = {name: values for name, values in OPTICS.items() if name != "rlnImagePixelSize"}
    columns = particle_columns()
    columns |= {"rlnOriginX": columns.pop("rlnOriginXAngst"), "rlnOriginY": columns.pop("rlnOriginYAngst")}
    path = write_relion(tmp_path / "p.star", columns, optics)
    with pytest.raises(InputFormatError, match="--set pixel_size_a=") as error:
        imported(path)
    assert "--set shift" not in str(error.value)  # advice to set them would throw the origins away
    shift = imported(path, "pixel_size_a=2").require_poses("").shift_a
    np.testing.assert_allclose(shift[:, 0], 2 * np.array(columns["rlnOriginX"]))


def test_a_nominal_magnification_is_said_when_the_images_disagree(tmp_path: Path) -> None:
    source = relion_3_0(tmp_path)
    write_stack(tmp_path / "stack.mrcs", voxel_size_a=1.31)
    imported(source, metadata_only=False)
    (warning,) = info_of(source)["warnings"]
    assert "using 1.25 A from rlnDetectorPixelSize/rlnMagnification" in warning
    assert "--set pixel_size_a=1.31" in warning
    imported(source, "pixel_size_a=1.31", metadata_only=False)
    assert info_of(source)["warnings"] == []


def test_an_agreeing_header_is_said_as_well(tmp_path: Path) -> None:
    source = relion_3_0(tmp_path)
    write_stack(tmp_path / "stack.mrcs", voxel_size_a=1.25)
    imported(source, metadata_only=False)
    assert any("headers say the same" in note for note in info_of(source)["notes"])


def test_pixel_size_and_box_follow_each_rows_optics_group_in_either_block_order(tmp_path: Path) -> None:
    optics = {name: values * 2 for name, values in OPTICS.items()}
    optics |= {"rlnOpticsGroup": [7, 3], "rlnImagePixelSize": [1.24, 1.25], "rlnImageSize": [256, 300]}
    columns = particle_columns() | {"rlnOpticsGroup": [3, 7, 7, 3]}
    path = tmp_path / "p.star"
    for blocks in (
        (("optics", optics), ("particles", columns)),
        (("particles", columns), ("optics", optics)),
    ):
        path.write_text("".join(loop_block(*block) for block in blocks))
        particles = imported(path)
        np.testing.assert_array_equal(particles.optics.pixel_size_a, [1.25, 1.24, 1.24, 1.25])
        np.testing.assert_array_equal(particles.optics.box_size_px, [300, 256, 256, 300])
        np.testing.assert_array_equal(particles.optics.optics_group, [3, 7, 7, 3])


def test_origins_in_pixels_use_each_rows_own_pixel_size(tmp_path: Path) -> None:
    optics = {name: values * 2 for name, values in OPTICS.items()}
    optics |= {"rlnOpticsGroup": [1, 2], "rlnImagePixelSize": [1.0, 2.0]}
    columns = particle_columns() | {"rlnOpticsGroup": [1, 2, 2, 1]}
    columns |= {"rlnOriginX": columns.pop("rlnOriginXAngst"), "rlnOriginY": columns.pop("rlnOriginYAngst")}
    poses = imported(write_relion(tmp_path / "p.star", columns, optics)).require_poses("")
    np.testing.assert_allclose(poses.shift_a[:, 0], np.array(columns["rlnOriginX"]) * [1, 2, 2, 1])


def test_an_optics_block_of_one_group_need_not_be_a_loop(tmp_path: Path) -> None:
    path = tmp_path / "p.star"
    optics = "data_optics\n\n" + "".join(f"_{name} {values[0]}\n" for name, values in OPTICS.items())
    path.write_text(optics + loop_block("particles", particle_columns()))
    np.testing.assert_array_equal(imported(path).optics.voltage_kv, 300)


def test_particles_of_an_unlisted_optics_group_are_refused(tmp_path: Path) -> None:
    path = write_relion(tmp_path / "p.star", particle_columns() | {"rlnOpticsGroup": [1, 2, 1, 2]})
    with pytest.raises(InputFormatError, match=r"2 of 4 particles .* first row 2 \(group 2\); it lists 1"):
        imported(path)


@pytest.mark.parametrize(
    ("label", "key"),
    [
        ("rlnAmplitudeContrast", "amplitude_contrast"),
        ("rlnVoltage", "voltage_kv"),
        ("rlnSphericalAberration", "cs_mm"),
        ("rlnImagePixelSize", "pixel_size_a"),
    ],
)
def test_what_the_ctf_needs_is_never_guessed(tmp_path: Path, label: str, key: str) -> None:
    optics = {name: values for name, values in OPTICS.items() if name != label}
    path = write_relion(tmp_path / "p.star", optics=optics)
    with pytest.raises(InputFormatError, match=rf"{label}.*--set {key}=.*config\.yaml.*set: {{{key}: "):
        imported(path)
    assert not (tmp_path / "import").exists()
    particles = imported(path, f"{key}=0.5" if key == "amplitude_contrast" else f"{key}=20")
    assert len(particles) == 4


def test_a_missing_phase_shift_is_zero(tmp_path: Path) -> None:
    particles = imported(write_relion(tmp_path / "p.star"))
    np.testing.assert_array_equal(particles.ctf.phase_shift_deg, 0)
    particles = imported(write_relion(tmp_path / "p.star", particle_columns() | {"rlnPhaseShift": [30] * 4}))
    np.testing.assert_array_equal(particles.ctf.phase_shift_deg, 30)


def test_half_sets_classes_and_micrographs_come_along(tmp_path: Path) -> None:
    columns = particle_columns() | {"rlnClassNumber": [3, 1, 2, 2]}
    particles = imported(write_relion(tmp_path / "p.star", columns))
    np.testing.assert_array_equal(particles.half_set, [1, 2, 1, 2])
    np.testing.assert_array_equal(particles.class_number, [3, 1, 2, 2])
    assert particles.micrograph is not None
    assert particles.micrograph.tolist() == ["00007", "00008", "00007", "00008"]


def test_a_class_of_a_3d_classification_can_be_chosen(tmp_path: Path) -> None:
    columns = particle_columns() | {"rlnClassNumber": [3, 1, 2, 2]}
    path = write_relion(tmp_path / "p.star", columns)
    particles = imported(path, class_number=2)
    assert particles.particle_id.tolist() == ["000003@stack.mrcs", "000004@stack.mrcs"]
    np.testing.assert_array_equal(particles.ctf.defocus_u_a, columns["rlnDefocusU"][2:])
    with pytest.raises(
        InputFormatError, match=r"no particle of class 9; there are: 1 \(1\), 2 \(2\), 3 \(1\)"
    ):
        imported(path, class_number=9)


def test_repeated_images_get_numbered_ids_and_share_a_half_set(tmp_path: Path) -> None:
    names = ["1@a.mrcs", "1@b.mrcs", "000001@a.mrcs", "2@a.mrcs", "1@a.mrcs"]
    columns = particle_columns(5) | {"rlnImageName": names, "rlnRandomSubset": [2, 1, 1, 1, 2]}
    source = write_relion(tmp_path / "p.star", columns)
    particles = imported(source)
    assert particles.particle_id.tolist() == ["1@a.mrcs", "1@b.mrcs", "1@a.mrcs#2", "2@a.mrcs", "1@a.mrcs#3"]
    np.testing.assert_array_equal(particles.half_set, [2, 1, 2, 1, 2])
    assert info_of(source)["counts"]["repeated_images"] == 2
    assert any("1 rows had another rlnRandomSubset" in warning for warning in info_of(source)["warnings"])


def test_images_are_found_by_their_number_not_by_their_row(tmp_path: Path) -> None:
    columns = particle_columns() | {"rlnImageName": ["4@b/s.mrcs", "1@a.mrcs", "000002@b/s.mrcs", "3@a.mrcs"]}
    images = imported(write_relion(tmp_path / "p.star", columns)).images
    assert [images.stack_paths[i] for i in images.stack] == ["b/s.mrcs", "a.mrcs", "b/s.mrcs", "a.mrcs"]
    np.testing.assert_array_equal(images.index, [3, 0, 1, 2])


@pytest.mark.parametrize("name", ["stack.mrcs", "0@stack.mrcs", "x@stack.mrcs", "-1@stack.mrcs"])
def test_an_image_name_that_is_no_number_at_stack_is_refused(tmp_path: Path, name: str) -> None:
    columns = particle_columns()
    columns["rlnImageName"][2] = name
    with pytest.raises(InputFormatError, match="rlnImageName"):
        imported(write_relion(tmp_path / "p.star", columns))


@pytest.mark.parametrize("column", ["rlnDefocusU", "rlnAnglePsi", "rlnOriginXAngst"])
def test_nan_in_a_used_column_is_refused_and_in_others_not(tmp_path: Path, column: str) -> None:
    path = write_relion(tmp_path / "p.star", particle_columns() | {column: [1, "nan", 2, 3]})
    with pytest.raises(InputFormatError, match=rf"column {column} .* in 1 of 4 rows: row 2 \(nan\)"):
        imported(path)
    path = write_relion(tmp_path / "p.star", particle_columns() | {"rlnAutopickFigureOfMerit": ["nan"] * 4})
    assert len(imported(path)) == 4


def test_angles_without_origins_are_refused_with_the_cure(tmp_path: Path) -> None:
    columns = particle_columns()
    del columns["rlnOriginXAngst"], columns["rlnOriginYAngst"]
    path = write_relion(tmp_path / "p.star", columns)
    with pytest.raises(InputFormatError, match="--set shift_x_a=0 --set shift_y_a=0"):
        imported(path)
    shift = imported(path, "shift_x_a=0", "shift_y_a=0").require_poses("").shift_a
    np.testing.assert_array_equal(shift, 0)


def test_only_some_of_the_angles_are_refused(tmp_path: Path) -> None:
    columns = particle_columns()
    del columns["rlnAngleTilt"]
    with pytest.raises(InputFormatError, match="not rlnAngleTilt"):
        imported(write_relion(tmp_path / "p.star", columns))


def test_angles_of_a_2d_classification_are_warned_about(tmp_path: Path) -> None:
    columns = particle_columns() | {"rlnAngleRot": [0] * 4, "rlnAngleTilt": [0] * 4}
    source = write_relion(tmp_path / "p.star", columns)
    imported(source)
    assert "2D classification" in info_of(source)["warnings"][0]


@pytest.mark.parametrize(
    "changes",
    [
        {"rlnTomoName": ["TS_01"] * 4},
        {"rlnTomoVisibleFrames": ["[1,1,0]"] * 4},
        {"rlnGroupName": ["p1", "p1", "p2", "p2"], "rlnMicrographPreExposure": [0, 3, 0, 3]},
        {"rlnGroupName": ["p1", "p1", "p2", "p2"], "rlnCtfScalefactor": [1, 0.9, 1, 0.9]},
    ],
)
def test_tilt_series_are_refused(tmp_path: Path, changes: dict[str, list[Any]]) -> None:
    with pytest.raises(InputFormatError, match="tilt"):
        imported(write_relion(tmp_path / "p.star", particle_columns() | changes))


def test_a_refusal_of_refined_b_factors_as_tilts_tells_the_way_out(tmp_path: Path) -> None:
    columns = particle_columns() | {"rlnGroupName": ["g1"] * 4, "rlnCtfBfactor": [80, 90, 80, 70]}
    with pytest.raises(InputFormatError, match="single particles, take the column rlnGroupName out"):
        imported(write_relion(tmp_path / "p.star", columns))


def test_group_names_of_micrographs_are_no_tilt_series(tmp_path: Path) -> None:
    columns = particle_columns() | {"rlnGroupName": ["g1", "g1", "g2", "g2"], "rlnCtfScalefactor": [1] * 4}
    assert len(imported(write_relion(tmp_path / "p.star", columns))) == 4


def test_ctf_premultiplied_images_are_refused(tmp_path: Path) -> None:
    optics = OPTICS | {"rlnCtfDataAreCtfPremultiplied": [1]}
    with pytest.raises(InputFormatError, match="rlnCtfDataAreCtfPremultiplied is set for 4 of 4"):
        imported(write_relion(tmp_path / "p.star", optics=optics))
    optics = OPTICS | {"rlnCtfDataAreCtfPremultiplied": [0]}
    assert len(imported(write_relion(tmp_path / "p.star", optics=optics))) == 4


def test_aberrations_that_are_not_applied_are_recorded_with_their_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("cryodrgn_pipeline"), "propagate", True)
    optics = OPTICS | {
        "rlnBeamTiltX": [0.3],
        "rlnBeamTiltY": [-0.4],
        "rlnOddZernike": ["[0.1,-7.5,0,0]"],
        "rlnEvenZernike": ["[0,0,0]"],
        "rlnMagMat00": [1.01],
        "rlnMagMat01": [0],
        "rlnMagMat10": [0],
        "rlnMagMat11": [1],
    }
    columns = particle_columns() | {"rlnCtfBfactor": [0, 80, 0, 0], "rlnCtfScalefactor": [1, 1, 0.5, 1]}
    source = write_relion(tmp_path / "p.star", columns, optics)
    imported(source)
    found = {
        item["name"]: (item["rows"], round(item["max"], 6))
        for item in info_of(source)["unapplied_aberrations"]
    }
    assert found == {
        "beam tilt in mrad (rlnBeamTiltX/Y)": (4, 0.5),
        "higher-order aberration (rlnOddZernike)": (4, 7.5),
        "anisotropic magnification (rlnMagMat00-11)": (4, 0.01),
        "B-factor in A^2 (rlnCtfBfactor)": (1, 80.0),
        "CTF scale (rlnCtfScalefactor)": (1, 0.5),
    }
    assert all(item["effect"] for item in info_of(source)["unapplied_aberrations"])
    lines = [record.getMessage() for record in caplog.records if "not applied" in record.getMessage()]
    assert len(lines) == 5
    assert any("rlnCtfBfactor) is not applied: 1 of 4 rows, up to 80; amplitudes" in line for line in lines)


def test_aberrations_are_counted_in_the_whole_file_whatever_class_is_taken(tmp_path: Path) -> None:
    optics = OPTICS | {"rlnBeamTiltX": [0.3]}
    columns = particle_columns() | {"rlnClassNumber": [1, 1, 2, 1]}
    source = write_relion(tmp_path / "p.star", columns, optics)
    assert len(imported(source, class_number=2)) == 1
    (found,) = info_of(source)["unapplied_aberrations"]
    assert (found["rows"], found["of"]) == (4, 4)


# ── cryoSPARC ──


def cryosparc(tmp_path: Path, csdat: bool = False, **changes: Any) -> Path:
    return write_cryosparc(tmp_path / "p.cs", cs_columns() | changes, csdat)


@pytest.mark.parametrize("csdat", [False, True])
def test_cryosparc_columns_arrive_in_our_units(tmp_path: Path, csdat: bool) -> None:
    columns = cs_columns()
    particles = imported(write_cryosparc(tmp_path / "p.cs", columns, csdat))
    np.testing.assert_array_equal(particles.particle_id, columns["uid"])
    angle = np.rad2deg(columns["ctf/df_angle_rad"].astype(float))
    np.testing.assert_allclose(particles.ctf.defocus_angle_deg, angle)
    np.testing.assert_allclose(particles.ctf.phase_shift_deg, 90, rtol=1e-6)
    np.testing.assert_array_equal(particles.ctf.defocus_u_a, columns["ctf/df1_A"])
    np.testing.assert_array_equal(particles.images.index, [3, 2, 1, 0])
    np.testing.assert_array_equal(particles.optics.optics_group, 3)
    np.testing.assert_array_equal(particles.contrast_sign, -1)
    np.testing.assert_array_equal(particles.half_set, [1, 2, 1, 2])


def test_shifts_are_in_pixels_of_the_alignment_not_of_the_image(tmp_path: Path) -> None:
    source = cryosparc(tmp_path, **{"alignments3D/psize_A": np.array([2.5, 2.5, 5, 1.25], dtype=np.float32)})
    shift = cs_columns()["alignments3D/shift"].astype(float)
    poses = imported(source).require_poses("")
    np.testing.assert_allclose(poses.shift_a, shift * np.array([[2.5], [2.5], [5], [1.25]]))


def test_shifts_without_a_psize_are_in_pixels_of_the_image_as_overridden(tmp_path: Path) -> None:
    columns = {name: values for name, values in cs_columns().items() if name != "alignments3D/psize_A"}
    shift = columns["alignments3D/shift"].astype(float)
    source = write_cryosparc(tmp_path / "p.cs", columns)
    np.testing.assert_allclose(imported(source).require_poses("").shift_a, 1.25 * shift)
    assert "there is no alignments3D/psize_A" in info_of(source)["warnings"][0]
    del columns["blob/psize_A"]
    source = write_cryosparc(tmp_path / "p.cs", columns)
    with pytest.raises(InputFormatError, match="--set pixel_size_a=") as error:
        imported(source)
    assert "--set shift" not in str(error.value)
    np.testing.assert_allclose(imported(source, "pixel_size_a=2").require_poses("").shift_a, 2 * shift)


def test_a_pose_of_zero_is_the_identity_not_nan(tmp_path: Path) -> None:
    poses = imported(cryosparc(tmp_path, **{"alignments3D/pose": np.zeros((4, 3), dtype=np.float32)}))
    np.testing.assert_array_equal(poses.require_poses("").rotation, np.tile(np.eye(3), (4, 1, 1)))


def test_poses_come_from_a_passthrough_in_another_order(tmp_path: Path) -> None:
    columns = cs_columns()
    whole = imported(write_cryosparc(tmp_path / "p.cs", columns))
    split = {name: values for name, values in columns.items() if not name.startswith("alignments")}
    rest = {name: values[::-1] for name, values in columns.items() if name.startswith(("uid", "align"))}
    source = write_cryosparc(tmp_path / "p.cs", split)
    other = write_cryosparc(tmp_path / "p_passthrough_particles.cs", rest)
    assert imported(source).poses is None
    joined = imported(source, passthrough=(other,))
    np.testing.assert_array_equal(joined.require_poses("").rotation, whole.require_poses("").rotation)
    np.testing.assert_array_equal(joined.half_set, whole.half_set)
    assert info_of(source)["passthrough"][0]["path"] == str(other)


def test_2d_alignments_alone_are_refused(tmp_path: Path) -> None:
    columns = cs_columns(poses=False) | {"alignments2D/pose": np.zeros(4, dtype=np.float32)}
    with pytest.raises(InputFormatError, match="3D refinement is needed") as error:
        imported(write_cryosparc(tmp_path / "p.cs", columns))
    assert error.value.exit_code == 3


def classes(tmp_path: Path) -> Path:
    posterior = np.array([[0.9, 0.05, 0.05], [0.2, 0.5, 0.3], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
    columns = cs_columns(poses=False)
    for k, name in enumerate(("0", "1", "10")):
        columns |= alignment_columns(f"alignments_class_{name}", psize_a=2.5, seed=k)
        columns[f"alignments_class_{name}/class_posterior"] = posterior[:, k].astype(np.float32)
    return write_cryosparc(tmp_path / "p.cs", columns)


def test_poses_of_several_classes_ask_for_a_choice(tmp_path: Path) -> None:
    message = r"3 classes .* --class K; there are 0 \(1 particles\), 1 \(2 particles\), 10 \(1 particles\)"
    with pytest.raises(InputFormatError, match=message):
        imported(classes(tmp_path))


def test_a_class_brings_its_own_poses_and_the_particles_it_is_most_probable_for(tmp_path: Path) -> None:
    particles = imported(classes(tmp_path), class_number=1)
    assert [int(uid) - 2**63 for uid in particles.particle_id] == [1, 2]
    shift = alignment_columns("a", seed=1)["a/shift"].astype(float)[1:3] * 2.5
    np.testing.assert_allclose(particles.require_poses("").shift_a, shift)
    np.testing.assert_array_equal(particles.images.index, [2, 1])
    np.testing.assert_array_equal(particles.class_number, [1, 1])


@pytest.mark.parametrize("number", [2, 7])
def test_a_class_that_does_not_exist_is_refused(tmp_path: Path, number: int) -> None:
    with pytest.raises(InputFormatError, match=f"no class {number}; its classes are 0, 1, 10"):
        imported(classes(tmp_path), class_number=number)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("blob/path", "--passthrough"),
        ("ctf/df1_A", r"ctf/df1_A, or add --passthrough.*--set defocus_u_a="),
        ("blob/sign", r"blob/sign.*--set contrast_sign=-1"),
        ("blob/psize_A", r"blob/psize_A.*--set pixel_size_a="),
        ("alignments3D/shift", "alignments3D/shift"),
    ],
)
def test_a_column_that_is_missing_is_named_with_its_cure(tmp_path: Path, missing: str, message: str) -> None:
    columns = {name: values for name, values in cs_columns().items() if name != missing}
    with pytest.raises(InputFormatError, match=message):
        imported(write_cryosparc(tmp_path / "p.cs", columns))


def test_oblong_images_are_refused(tmp_path: Path) -> None:
    shape = np.array([[16, 16], [16, 18], [16, 16], [16, 16]], dtype=np.uint32)
    with pytest.raises(InputFormatError, match="1 of 4 images are not"):
        imported(cryosparc(tmp_path, **{"blob/shape": shape}))


def test_cryosparc_aberrations_are_recorded(tmp_path: Path) -> None:
    tilt = np.zeros((4, 2), dtype=np.float32)
    tilt[2] = [3000, 4000]
    source = cryosparc(tmp_path, **{"ctf/tilt_A": tilt, "ctf/scale": np.ones(4, dtype=np.float32)})
    imported(source)
    (found,) = info_of(source)["unapplied_aberrations"]
    assert (found["name"], found["rows"], found["max"]) == ("beam tilt in A (ctf/tilt_A)", 1, 5000)
    assert "45 degrees" in found["effect"]


# ── Images ──


def test_images_are_looked_for_upwards_from_the_table(tmp_path: Path) -> None:
    source = tmp_path / "Refine3D" / "job012" / "run_data.star"
    source.parent.mkdir(parents=True)
    write_relion(source, particle_columns(stack="Extract/job007/s.mrcs"))
    stack = write_stack(tmp_path / "Extract" / "job007" / "s.mrcs")
    assert imported(source, metadata_only=False).images.stack_paths == (str(stack),)


def test_datadir_comes_first_then_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_relion(tmp_path / "p.star")
    beside = write_stack(tmp_path / "stack.mrcs")
    here = write_stack(tmp_path / "cwd" / "stack.mrcs")
    given = write_stack(tmp_path / "data" / "stack.mrcs")
    assert imported(source, metadata_only=False).images.stack_paths == (str(beside),)
    monkeypatch.chdir(here.parent)
    assert imported(source, metadata_only=False).images.stack_paths == (str(here),)
    found = imported(source, metadata_only=False, datadir=given.parent).images.stack_paths
    assert found == (str(given),)


def test_stacks_copied_straight_into_datadir_are_found(tmp_path: Path) -> None:
    source = write_relion(tmp_path / "p.star", particle_columns(stack="Extract/job007/s.mrcs"))
    stack = write_stack(tmp_path / "copy" / "s.mrcs")
    assert imported(source, metadata_only=False, datadir=stack.parent).images.stack_paths == (str(stack),)


def test_stacks_of_the_same_name_are_not_mixed_up(tmp_path: Path) -> None:
    columns = particle_columns() | {"rlnImageName": ["1@a/s.mrcs", "1@b/s.mrcs", "2@a/s.mrcs", "2@b/s.mrcs"]}
    source = write_relion(tmp_path / "p.star", columns)
    write_stack(tmp_path / "copy" / "s.mrcs")
    with pytest.raises(InputFormatError, match="not found"):
        imported(source, metadata_only=False, datadir=tmp_path / "copy")


def test_missing_images_are_one_error_that_lists_what_was_tried(tmp_path: Path) -> None:
    source = write_relion(tmp_path / "p.star", particle_columns(stack="Extract/s.mrcs"))
    with pytest.raises(InputFormatError, match="--datadir") as error:
        imported(source, metadata_only=False)
    for place in (tmp_path / "Extract" / "s.mrcs", tmp_path.parent / "Extract" / "s.mrcs", Path.cwd()):
        assert str(place) in str(error.value)
    assert "--metadata-only" in str(error.value)


def test_one_missing_stack_among_others_is_counted(tmp_path: Path) -> None:
    columns = particle_columns() | {"rlnImageName": ["1@a.mrcs", "1@b.mrcs", "2@a.mrcs", "1@c.mrcs"]}
    source = write_relion(tmp_path / "p.star", columns)
    write_stack(tmp_path / "a.mrcs")
    with pytest.raises(InputFormatError, match=r"2 of the 3 image files .* such as b\.mrcs"):
        imported(source, metadata_only=False)


def test_exported_cryosparc_paths_are_relative_to_the_cs_file(tmp_path: Path) -> None:
    source = cryosparc(tmp_path, **{"blob/path": np.array([">J1/stack.mrc"] * 4, dtype=object)})
    stack = write_stack(tmp_path / "J1" / "stack.mrc")
    decoy = write_stack(tmp_path / "data" / "J1" / "stack.mrc")
    particles = imported(source, metadata_only=False, datadir=decoy.parents[1])
    assert particles.images.stack_paths == (str(stack),)


def test_links_are_followed_only_when_reading(tmp_path: Path) -> None:
    stack = write_stack(tmp_path / "elsewhere" / "real.mrc")
    link = tmp_path / "J1" / "stack.mrc"
    link.parent.mkdir()
    link.symlink_to(stack)
    assert imported(cryosparc(tmp_path), metadata_only=False).images.stack_paths == (str(link),)


def test_a_stack_of_another_box_is_refused(tmp_path: Path) -> None:
    source = write_relion(tmp_path / "p.star")
    write_stack(tmp_path / "stack.mrcs", box=32)
    with pytest.raises(
        InputFormatError, match=r"4 of 4 rows .* first row 1: 16 px, but .*stack\.mrcs has 32 px"
    ):
        imported(source, metadata_only=False)


def test_a_stack_with_too_few_images_is_refused(tmp_path: Path) -> None:
    source = write_relion(tmp_path / "p.star")
    write_stack(tmp_path / "stack.mrcs", n=3)
    with pytest.raises(InputFormatError, match=r"holds 3 images, but .* names image 4"):
        imported(source, metadata_only=False)


def test_a_truncated_stack_is_refused(tmp_path: Path) -> None:
    source = write_relion(tmp_path / "p.star")
    stack = write_stack(tmp_path / "stack.mrcs")
    stack.write_bytes(stack.read_bytes()[:-100])
    with pytest.raises(InputFormatError, match=r"stack\.mrcs is truncated: .* 5120 bytes, the file has 5020"):
        imported(source, metadata_only=False)


def test_the_box_comes_from_the_images_where_the_table_lacks_it(tmp_path: Path) -> None:
    source = relion_3_0(tmp_path)
    np.testing.assert_array_equal(imported(source).optics.box_size_px, UNKNOWN_BOX)
    write_stack(tmp_path / "stack.mrcs")
    np.testing.assert_array_equal(imported(source, metadata_only=False).optics.box_size_px, 16)


# ── Options and records ──


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pixel_size=1.2", "did you mean pixel_size_a.*keys are pixel_size_a, box_size_px"),
        ("particle_id=1", "no such key"),
        ("voltage_kv=300000", r"kV \(300, not 300000\)"),
        ("voltage_kv", "voltage_kv=VALUE"),
        ("cs_mm=two", "mm"),
        ("contrast_sign=0", "light on dark"),
        ("pixel_size_a=nan", "Å per pixel"),
    ],
)
def test_wrong_overrides_are_usage_errors(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        imported(write_relion(tmp_path / "p.star"), text)
    assert error.value.exit_code == 2


def test_overrides_replace_the_source_and_are_recorded(tmp_path: Path) -> None:
    source = write_relion(tmp_path / "p.star")
    particles = imported(source, "voltage_kv=200", "contrast_sign=-1")
    np.testing.assert_array_equal(particles.optics.voltage_kv, 200)
    np.testing.assert_array_equal(particles.contrast_sign, -1)
    assert info_of(source)["overrides"] == {"voltage_kv": 200, "contrast_sign": -1}
    assert info_of(source)["columns"]["voltage_kv"] == "--set"


@pytest.mark.parametrize(
    ("column", "value"), [("rlnVoltage", 300000), ("rlnImagePixelSize", 0), ("rlnAmplitudeContrast", 10)]
)
def test_a_source_in_the_wrong_unit_is_refused(tmp_path: Path, column: str, value: float) -> None:
    path = write_relion(tmp_path / "p.star", optics=OPTICS | {column: [value]})
    with pytest.raises(InputFormatError, match=rf"{column} gives no usable .* in 4 of 4 rows.*--set"):
        imported(path)


def test_remedies_are_applied_and_recorded(tmp_path: Path) -> None:
    source = write_relion(tmp_path / "p.star")
    plain = imported(source).require_poses("")
    remedies = Remedies(transpose_rotations=True, negate_shifts=True, shift_scale=2.0)
    mended = imported(source, remedies=remedies).require_poses("")
    np.testing.assert_array_equal(mended.rotation, plain.rotation.swapaxes(1, 2))
    np.testing.assert_array_equal(mended.shift_a, -2 * plain.shift_a)
    assert info_of(source)["conventions"] == {
        "transpose_rotations": True,
        "negate_shifts": True,
        "shift_scale": 2.0,
        "mirror_hand": False,
    }


def test_the_record_identifies_the_source(tmp_path: Path) -> None:
    source = write_relion(tmp_path / "p.star")
    imported(source)
    first = info_of(source)
    content = source.read_bytes()
    assert first["source"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert first["source"]["size_bytes"] == len(content)
    assert first["source"]["kind"] == "star"
    assert first["n_particles"] == 4
    imported(source)
    assert info_of(source) == first


@pytest.mark.parametrize("name", ["p.mrcs", "p.txt", "p"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputFormatError, match=r"RELION \.star or cryoSPARC \.cs"):
        imported(tmp_path / name)


def test_options_that_do_not_fit_are_usage_errors(tmp_path: Path) -> None:
    source = write_relion(tmp_path / "p.star")
    with pytest.raises(ConfigError, match="passthrough"):
        imported(source, passthrough=(source,))
    with pytest.raises(ConfigError, match="no such folder"):
        imported(source, datadir=tmp_path / "nowhere")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    from cryodrgn_pipeline.cli import main

    monkeypatch.setattr("sys.argv", ["cryodrgn-pipeline", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_line_imports_and_turns_errors_into_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_relion(tmp_path / "p.star")
    write_stack(tmp_path / "stack.mrcs")
    assert (
        run(monkeypatch, "import", source, "-o", tmp_path / "out", "--set", "cs_mm=2", "--mirror-hand") == 0
    )
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "particles.parquet")
    info = json.loads((tmp_path / "out" / "import.json").read_text())
    assert info["overrides"] == {"cs_mm": 2}
    assert info["conventions"]["mirror_hand"] is True
    assert run(monkeypatch, "import", source, "-o", tmp_path / "out", "--set", "cs=2") == 2
    assert run(monkeypatch, "import", tmp_path / "none.star", "-o", tmp_path / "out") == 3
    assert run(monkeypatch, "import", source) == 2
    error = capsys.readouterr().err
    assert "did you mean cs_mm" in error
    assert re.search(r"error: .*none\.star: no such STAR file", error)
