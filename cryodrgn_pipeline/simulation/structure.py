"""An atomic model as the molecule of a simulated set: read, coarse-grained, with a hinge and a subunit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.simulation.phantom import ARM, ARM_SUBUNIT, BODY, SUBUNIT, Phantom

Array = NDArray[np.float64]

ATOMIC_NUMBER = {
    **{"C": 6, "N": 7, "O": 8, "F": 9, "NA": 11, "MG": 12, "P": 15, "S": 16, "CL": 17, "K": 19, "CA": 20},
    **{"MN": 25, "FE": 26, "CO": 27, "NI": 28, "CU": 29, "ZN": 30, "SE": 34, "BR": 35, "I": 53},
}
HYDROGEN = ("H", "D")
FIRST_PLACES = (" ", "A", "1")
COARSE_SIGMA_A = 1.5  # from here on a residue is no larger than the blur of its atoms
BOUNDARY_A = 12.0
SUBUNIT_SHARE = 0.2
LARGEST_RADIUS = 0.425  # of the box: where the window of `preprocess` begins to fade
SELECTION = re.compile(r"(?P<chain>\w)(:(?P<first>-?\d+)-(?P<last>-?\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Atoms:
    """`A` heavy atoms, or residues in their place.

    `position_a` `(A, 3)` in Å; `weight` `(A,)` atomic numbers, or their sum; `chain` `(A,)` one letter each;
    `residue` `(A,)` residue numbers; `group` `(A,)` counts the residues through all chains from 0.
    """

    position_a: Array
    weight: Array
    chain: NDArray[np.str_]
    residue: NDArray[np.int64]
    group: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.weight)


def read_pdb(path: Path) -> Atoms:
    """Heavy atoms of the ATOM records of a PDB file's first model; of alternate places the first.

    Raises
    ------
    InputFormatError
        If the file is missing, a record cannot be read, or there is no atom.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputFormatError(f"{path}: cannot be read as a PDB file ({error.strerror})") from error
    position, weight, chain, residue, names = [], [], [], [], []
    for number, line in enumerate(lines, 1):
        if line.startswith("ENDMDL"):
            break
        if not line.startswith("ATOM  ") or line[16:17] not in FIRST_PLACES:
            continue
        element = (line[76:78].strip() or line[12:14].strip(" 0123456789")).upper()
        if element in HYDROGEN:
            continue
        try:
            weight.append(ATOMIC_NUMBER[element])
            position.append([float(line[start : start + 8]) for start in (30, 38, 46)])
            residue.append(int(line[22:26]))
        except (KeyError, ValueError) as error:
            raise InputFormatError(
                f"{path}, line {number}: an ATOM record with a known element, coordinates and a residue "
                f"number in the columns of the PDB format is expected; found {line.rstrip()!r}"
            ) from error
        chain.append(line[21])
        names.append(line[21:27])
    if not weight:
        raise InputFormatError(f"{path}: no ATOM record of a heavy atom in this PDB file")
    changes = np.array([False, *(one != other for one, other in pairwise(names))])
    return Atoms(
        position_a=np.array(position),
        weight=np.array(weight, dtype=np.float64),
        chain=np.array(chain),
        residue=np.array(residue, dtype=np.int64),
        group=np.cumsum(changes).astype(np.int64),
    )


def coarse_grained(atoms: Atoms) -> Atoms:
    """One point per residue: the centre of its heavy atoms by atomic number, and their sum."""
    weight: Array = np.bincount(atoms.group, weights=atoms.weight).astype(np.float64)
    centre = [np.bincount(atoms.group, weights=atoms.weight * atoms.position_a[:, axis]) for axis in range(3)]
    first = np.searchsorted(atoms.group, np.arange(len(weight)))
    return Atoms(
        position_a=np.stack(centre, axis=1) / weight[:, None],
        weight=weight,
        chain=atoms.chain[first],
        residue=atoms.residue[first],
        group=np.arange(len(weight), dtype=np.int64),
    )


def chosen(atoms: Atoms, selection: str) -> NDArray[np.bool_]:
    """Atoms `(A,)` of chains or of stretches of them: `C`, `A:1385-1760`, or several with commas between.

    Raises
    ------
    ConfigError
        If the words cannot be read, or choose no atom or all of them.
    """
    picked = np.zeros(len(atoms), dtype=bool)
    for word in selection.split(","):
        match = SELECTION.fullmatch(word.strip())
        if match is None:
            raise ConfigError(f"simulate: {word!r} is no chain; expected such as C, or A:1385-1760")
        part = atoms.chain == match["chain"]
        if match["first"] is not None:
            part &= (atoms.residue >= int(match["first"])) & (atoms.residue <= int(match["last"]))
        if not part.any():
            chains = ", ".join(sorted(set(atoms.chain.tolist())))
            raise ConfigError(f"simulate: {word} names no atom of the structure; its chains are {chains}")
        picked |= part
    if picked.all():
        raise ConfigError(f"simulate: {selection} is the whole structure; choose a part of it")
    return picked


def principal_coordinates(position_a: Array, weight: Array) -> tuple[Array, Array]:
    """Coordinates `(A, 3)` along the principal axes, longest first, and the axes as rows `(3, 3)`.

    Each axis points to where the heavier tail lies, so that equal atoms give equal axes everywhere.
    """
    about = position_a - np.average(position_a, axis=0, weights=weight)
    _, axes = np.linalg.eigh((about * weight[:, None]).T @ about)
    along = about @ axes[:, ::-1]
    skew = np.sign((weight[:, None] * along**3).sum(axis=0))
    skew[skew == 0] = 1.0
    return along * skew, axes[:, ::-1].T * skew[:, None]


def hinge_of(position_a: Array, weight: Array, moves: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Pivot `(3,)` in Å and unit axis `(3,)` of a hinge between the moving atoms and the others.

    The pivot is the middle of the boundary. The axis is the thinnest principal axis, made perpendicular to
    the line from the pivot to the moving part, which therefore swings in the plane of the two longer ones.
    """
    from scipy.spatial import cKDTree

    arm, body = position_a[moves], position_a[~moves]
    to_body, to_arm = cKDTree(body).query(arm)[0], cKDTree(arm).query(body)[0]
    near = max(BOUNDARY_A, 1.5 * float(to_body.min()))
    pivot = np.concatenate([arm[to_body <= near], body[to_arm <= near]]).mean(axis=0)
    lever = np.average(arm, axis=0, weights=weight[moves]) - pivot
    lever /= np.linalg.norm(lever)
    thin = principal_coordinates(position_a, weight)[1][2]
    axis = thin - (thin @ lever) * lever
    return pivot, axis / np.linalg.norm(axis)


def structure_phantom(
    atoms: Atoms,
    *,
    sigma_a: float,
    box_a: float,
    motion: str = "hinge",
    motion_range: float = 90.0,
    hinge_chain: str | None = None,
    absent_chain: str | None = None,
) -> Phantom:
    """The molecule of an atomic model, centred.

    Parameters
    ----------
    atoms
        As `read_pdb` gives them; where `sigma_a` is 1.5 Å or more, residues take their place.
    sigma_a
        Standard deviation of one atom's density in Å.
    box_a
        Side of the box in Å, which must hold every state within the window of the images.
    motion, motion_range
        `hinge` or `none`, and the whole range in degrees.
    hinge_chain
        What moves (see `chosen`); without it the half beyond the median of the longest principal axis.
    absent_chain
        What may be absent; without it the fifth of the mass at one end of the second principal axis.

    Raises
    ------
    ConfigError
        If the structure does not fit the box, or a selection does not fit the structure.
    """
    if motion not in ("hinge", "none"):
        raise ConfigError(f"simulate: a structure can hinge or not move (--motion none), not {motion}")
    if sigma_a >= COARSE_SIGMA_A:
        atoms = coarse_grained(atoms)
    weight = atoms.weight
    position = atoms.position_a - np.average(atoms.position_a, axis=0, weights=weight)
    along, _ = principal_coordinates(position, weight)
    moves = along[:, 0] > np.median(along[:, 0]) if hinge_chain is None else chosen(atoms, hinge_chain)
    if absent_chain is None:
        outward = np.argsort(-along[:, 1], kind="stable")
        absent = np.zeros(len(atoms), dtype=bool)
        absent[outward[np.cumsum(weight[outward]) <= SUBUNIT_SHARE * weight.sum()]] = True
    else:
        absent = chosen(atoms, absent_chain)
    pivot, axis = hinge_of(position, weight, moves)
    phantom = Phantom(
        position_a=position,
        weight=weight,
        domain=np.where(absent, np.where(moves, ARM_SUBUNIT, SUBUNIT), np.where(moves, ARM, BODY)),
        sigma_a=sigma_a,
        motion=motion,
        motion_range=motion_range,
        pivot_a=pivot,
        axis=axis,
    )
    swept, _ = phantom.states(np.linspace(0, 1, 19), np.ones(19))
    radius_a = float(np.linalg.norm(swept, axis=-1).max())
    if radius_a > LARGEST_RADIUS * box_a:
        raise ConfigError(
            f"simulate: the structure reaches {radius_a:.0f} Å from its centre, and a box of {box_a:.0f} Å "
            f"holds {LARGEST_RADIUS * box_a:.0f} Å; raise --box-size or --pixel-size, or lower --motion-range"
        )
    return phantom
