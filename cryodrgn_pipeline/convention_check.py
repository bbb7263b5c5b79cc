"""The convention check: would the data agree better if rotations, shifts, contrast, hand or scale were meant
otherwise? On a subset at low resolution; what the data cannot tell is called so and is never a failure.

`convention_scores` measures each hypothesis, `convention_verdicts` and `convention_judgements` judge and
word it, and here they meet the stack.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryodrgn_pipeline.convention_judgements import (
    contrast_test,
    hand_test,
    pixel_size_test,
    rotation_test,
    shift_sign_test,
    shift_unit_test,
    too_few,
)
from cryodrgn_pipeline.convention_scores import (
    FOLDS,
    Ball,
    Evidence,
    Hypothesis,
    Score,
    backproject,
    score_by_halves,
    score_by_reference,
)
from cryodrgn_pipeline.convention_verdicts import REFERENCE_FITS, SURE, Judges, Scores, Source, Test
from cryodrgn_pipeline.fourier.fsc import fsc
from cryodrgn_pipeline.fourier.masks import radius_px
from cryodrgn_pipeline.fourier.slices import resample_volume, volume_grid
from cryodrgn_pipeline.fourier.transforms import half_plane
from cryodrgn_pipeline.fourier_images import FourierImages, noise_weights, stream
from cryodrgn_pipeline.half_sets import image_of_id
from cryodrgn_pipeline.progress import duration
from cryodrgn_pipeline.reconstruct import prior_from_fsc, shell_mean_weight

if TYPE_CHECKING:
    from cryodrgn_pipeline.stack import Stack

log = logging.getLogger(__name__)

MOST_PARTICLES = 3000
FEWEST_PARTICLES = 40
FINEST_A = 15.0
FEWEST_SHELLS, MOST_SHELLS = 8, 24
BINNING_FACTORS = (2.0, 0.5)
ZOOMS = tuple(round(0.90 + 0.01 * step, 2) for step in range(21))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConventionCheck:
    """All tests and what they come to together."""

    tests: tuple[Test, ...]
    n_particles: int
    resolution_a: float

    @property
    def verdict(self) -> str:
        """contradicted if one test is; else consistent if one is; else not_determinable."""
        verdicts = {test.verdict for test in self.tests}
        for verdict in ("contradicted", "consistent"):
            if verdict in verdicts:
                return verdict
        return "not_determinable"

    def message(self) -> str:
        """What is wrong and every line that mends it, where a line can."""
        wrong = [test for test in self.tests if test.verdict == "contradicted"]
        lines = ["the particles contradict the conventions they were imported with."]
        lines += [f"  {test.name}: {test.statement}" for test in wrong]
        sections: dict[str, list[str]] = {}
        for test in wrong:
            if test.section and test.remedy:
                sections.setdefault(test.section, []).extend(test.remedy.splitlines())
        if sections:
            lines.append("In config.yaml, under this dataset:")
            for section, remedies in sections.items():
                lines += [f"  {section}:", *(f"    {line}" for line in remedies)]
            options = " ".join(test.import_option for test in wrong if test.import_option)
            lines.append(f"or import again with: {options}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """For consensus.json."""
        return {
            "verdict": self.verdict,
            "n_particles": self.n_particles,
            "resolution_a": self.resolution_a,
            "tests": [test.as_json() for test in self.tests],
        }


def check_conventions(
    stack: Stack, *, reference: tuple[Tensor, float] | None = None, seed: int = 0
) -> ConventionCheck:
    """Test the conventions of a stack's particles.

    Parameters
    ----------
    reference
        The user's own map from the same refinement, `(D, D, D)`, and its voxel size in Å.
    seed
        Draws the subset and its folds.
    """
    started = time.monotonic()
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(stack))[:MOST_PARTICLES])
    box_a = stack.box_size_px * stack.pixel_size_a
    source = Source.of(stack)
    if len(rows) < FEWEST_PARTICLES:
        return ConventionCheck(
            tests=too_few(len(rows), FEWEST_PARTICLES), n_particles=len(rows), resolution_a=FINEST_A
        )
    evidence = gather(stack, rows, rng)
    check = run_tests(evidence, source, reference)
    log.info(
        "convention check: %s, from %d particles to %.3g Å, in %s",
        check.verdict.replace("_", " "),
        *(len(rows), box_a / evidence.shells, duration(time.monotonic() - started)),
    )
    return check


def shells_to_compare(box_size_px: int, box_a: float) -> int:
    """Fourier shells up to about 15 Å, but enough for a small box and not too many for a large one."""
    wanted = min(MOST_SHELLS, max(FEWEST_SHELLS, round(box_a / FINEST_A)))
    return int(min(wanted, box_size_px // 2 - 1))


def gather(stack: Stack, rows: NDArray[np.int64], rng: np.random.Generator) -> Evidence:
    """Low-frequency coefficients of the given rows, in folds that keep repeats of an image together."""
    box_a = stack.box_size_px * stack.pixel_size_a
    shells = shells_to_compare(stack.box_size_px, box_a)
    plane = half_plane(stack.box_size_px, shells)
    weight, groups = noise_weights(stack.noise, plane)
    parts = [images for _, images in stream(stack, rows, plane, groups)]
    names = ("coefficients", "ctf", "rotation", "scale", "noise_group")
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    _, image = np.unique(image_of_id(stack.particles.particle_id[rows]), return_inverse=True)
    fold = (rng.permutation(int(image.max()) + 1) % FOLDS)[image]
    return Evidence(
        images=FourierImages(plane=plane, **columns),
        shift_a=torch.from_numpy(stack.applied_shift_a[rows].astype(np.float32)),
        noise_weight=weight,
        fold=torch.from_numpy(fold),
        box_size_px=2 * (shells + 1),
        box_a=box_a,
    )


def shift_factors(source_pixel_size_a: float) -> tuple[float, ...]:
    """What shifts in a wrong unit need: × p, × 1/p (Å taken for px or the reverse), × 2, × ½ (binning)."""
    p = source_pixel_size_a
    factors = [p, 1 / p] if abs(p - 1) > 0.05 else []
    for factor in BINNING_FACTORS:
        if all(abs(np.log(factor / other)) > 0.1 for other in factors):
            factors.append(factor)
    return tuple(factors)


def run_tests(evidence: Evidence, source: Source, reference: tuple[Tensor, float] | None) -> ConventionCheck:
    """Score every hypothesis and judge.

    All combinations are tried, since two errors at once (say rotations and shifts) may hide each other.
    """
    factors = (1.0, *shift_factors(source.pixel_size_a))
    shifts = [(negate, factor) for factor in factors for negate in (False, True)] + [(False, 0.0)]
    poses = [
        Hypothesis(transpose=transpose, negate=negate, shift_factor=factor)
        for transpose, (negate, factor) in itertools.product((False, True), shifts)
    ]
    ball = Ball(evidence)
    halves = {pose: score_by_halves(evidence, pose, ball) for pose in poses}
    best = max(poses, key=lambda pose: halves[pose].match)
    by_reference = zooms = None
    fits: float | None = None
    why_not = "needs your own consensus map of the same refinement (--reference; config.yaml: `reference:`)"
    if reference is not None:
        by_reference, zooms = _score_by_reference(evidence, poses, reference)
        fits, why_not = _fit(by_reference, zooms, halves[best])
        if fits is None:
            by_reference = zooms = None
    spread = float(evidence.shift_a.square().mean().sqrt())
    judges = Judges(halves=halves, reference=by_reference, shift_spread_a=spread)
    skewness, error, quarters = skewness_of_quarters(evidence, best)
    tests = (
        rotation_test(judges, source),
        shift_sign_test(judges, source),
        shift_unit_test(judges, source),
        contrast_test(skewness, error, quarters, halves[best].signal, source, fits),
        hand_test(by_reference, why_not, source),
        pixel_size_test(zooms, why_not, source),
    )
    return ConventionCheck(
        tests=tests, n_particles=len(evidence), resolution_a=evidence.box_a / evidence.shells
    )


def _score_by_reference(
    evidence: Evidence, poses: list[Hypothesis], reference: tuple[Tensor, float]
) -> tuple[Scores, dict[float, Score]]:
    """Votes for the reference under every pose hypothesis in both hands, and of the best at every zoom.

    Votes are counted positive for the sign of contrast that fits better.
    """
    d = evidence.box_size_px
    grid = volume_grid(resample_volume(*reference, d, evidence.box_a / d)).to(torch.complex64)
    hypotheses = [replace(pose, mirror=mirror) for pose in poses for mirror in (False, True)]
    scores = {h: score_by_reference(evidence, h, grid) for h in hypotheses}
    best = max(scores, key=lambda h: abs(scores[h].match))
    sign = float(np.sign(scores[best].match))
    zoomed = {zoom: score_by_reference(evidence, replace(best, zoom=zoom), grid) for zoom in ZOOMS}
    return (
        {h: score.times(sign) for h, score in scores.items()},
        {zoom: score.times(sign) for zoom, score in zoomed.items()},
    )


def _fit(by_reference: Scores, zooms: dict[float, Score], own: Score) -> tuple[float | None, str]:
    """The signed match of the particles with the reference, or None and why it cannot judge."""
    best = max([*by_reference.values(), *zooms.values()], key=lambda score: score.match)
    if own.signal < SURE:
        return None, "the particles hold too little signal to be compared with the reference"
    if best.match < REFERENCE_FITS * own.match:
        return None, (
            f"the reference fits the particles under no convention (mean match {best.match:.2f}, that of a "
            f"map of the particles themselves {own.match:.2f}): it must be the map of the same refinement, "
            "neither rotated nor shifted"
        )
    return best.sign * best.match, ""


def skewness_of_quarters(evidence: Evidence, pose: Hypothesis) -> tuple[float, float, tuple[float, ...]]:
    """Skewness of the low-resolution map, its jackknife error, and that of the four folds' own maps."""
    sums = backproject(evidence, evidence.under(pose))
    everything = list(range(FOLDS))
    curve = fsc(sums.map([0, 1]), sums.map([2, 3]))
    prior = prior_from_fsc(curve, shell_mean_weight(sums.weight(everything), evidence.box_size_px))
    inside = radius_px(evidence.box_size_px) < 0.45 * evidence.box_size_px

    def skewness(folds: list[int]) -> float:
        values = sums.map(folds, prior)[inside].double()
        values = values - values.mean()
        return float((values**3).mean() / (values**2).mean().clamp(min=1e-30) ** 1.5)

    without = np.array([skewness([fold for fold in everything if fold != left]) for left in everything])
    error = np.sqrt((FOLDS - 1) / FOLDS * ((without - without.mean()) ** 2).sum())
    return skewness(everything), float(error), tuple(skewness([fold]) for fold in everything)
