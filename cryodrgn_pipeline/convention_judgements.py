"""The six convention tests: each asks one question and answers it with a verdict, numbers and a remedy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cryodrgn_pipeline.convention_scores import Hypothesis, Score, advantage
from cryodrgn_pipeline.convention_verdicts import (
    CONSISTENT,
    CONTRADICTED,
    MARGIN,
    SHIFT_MARGIN,
    SKEWNESS_MARGIN,
    SURE,
    UNDECIDED,
    ZOOM_MARGIN,
    Comparison,
    Judges,
    Scores,
    Source,
    Test,
    compare,
)

Cure = tuple[str, str, str]  # the section of config.yaml, its lines, and the same as options of import


def rotation_test(judges: Judges, source: Source) -> Test:
    """Are the rotations object to image, and not the reverse?"""
    verdict, comparison, evidence = judges.decide(lambda h: h.transpose, MARGIN)
    said = {
        CONTRADICTED: "the rotations are transposed (they turn images into the object's frame)",
        CONSISTENT: "the rotations are not transposed",
        UNDECIDED: "the particles do not tell the rotations from their transposes",
    }[verdict]
    cure = _switched("transpose_rotations", source.transpose_rotations)
    return _pose("rotation", verdict, f"{said}: {evidence}", comparison, cure)


def shift_sign_test(judges: Judges, source: Source) -> Test:
    """Do the shifts centre the particles, or push them away; or are the images centred without?"""
    verdict, comparison, evidence = judges.decide(lambda h: h.negate, MARGIN / 2, Judges.shifted)
    cure = _switched("negate_shifts", source.negate_shifts)
    said = {
        CONTRADICTED: "the shifts have the opposite sign (they tell where the particle is)",
        CONSISTENT: "the shifts have the right sign",
        UNDECIDED: "the particles do not tell the sign of the shifts (are they near zero?)",
    }[verdict]
    if judges.better_without_shifts():
        comparison = compare(judges.as_large_as_imported(), Judges.unshifted)
        evidence = f"without them {comparison.numbers()}"
        if judges.looks_like_error(0.0):
            verdict = UNDECIDED
            said = (
                f"the shifts ({judges.shift_spread_a:.2g} Å per axis) seem to be errors more than shifts, so "
                "that their sign cannot be told"
            )
        else:
            verdict = CONTRADICTED
            cure = ("set", "shift_x_a: 0\nshift_y_a: 0", "--set shift_x_a=0 --set shift_y_a=0")
            said = "the images are centred already, the shifts only move the particles away"
    return _pose("shift_sign", verdict, f"{said}: {evidence}", comparison, cure)


def shift_unit_test(judges: Judges, source: Source) -> Test:
    """Are the shifts in the unit they were taken for (Å or pixels, of the image or of a binned one)?"""
    p = source.pixel_size_a
    units = {p: f"pixels of {p:.4g} Å, not Å", 1 / p: f"Å, not pixels of {p:.4g} Å"}

    def gain_of_shifts(scores: Scores) -> float:
        without = max(score.match for h, score in scores.items() if h.shift_factor == 0)
        return max(score.match for score in scores.values()) - without

    def judged(among: Callable[[Hypothesis], bool]) -> tuple[str, Comparison, str]:
        return judges.decide(lambda h: h.shift_factor != 1, SHIFT_MARGIN, among, gain_of_shifts)

    verdict, comparison, evidence = judged(Judges.shifted)
    if comparison.hypothesis.shift_factor not in units and any(
        h.shift_factor in units for h in judges.halves
    ):
        # a unit mistaken is likelier than a binning: it stands unless binning is clearly better
        likelier = judged(lambda h: h.shift_factor == 1 or h.shift_factor in units)
        sure = advantage(comparison.alternative, likelier[1].alternative) >= SURE
        if likelier[0] == verdict == CONTRADICTED and not sure:
            verdict, comparison, evidence = likelier
    factor = comparison.hypothesis.shift_factor
    why = units.get(factor, "pixels of images binned otherwise than assumed")
    said = {
        CONTRADICTED: f"the shifts must be multiplied by {factor:.4g} (they are in {why})",
        CONSISTENT: f"the shifts have the right unit (next best: times {factor:.4g})",
        UNDECIDED: f"the particles do not tell the unit of the shifts (right, or times {factor:.4g})",
    }[verdict]
    if judges.better_without_shifts() or (verdict == CONTRADICTED and judges.looks_like_error(factor)):
        verdict = UNDECIDED
        said = (
            f"the particles ask for smaller shifts (times {factor:.4g} or so), but so they would if the "
            f"shifts ({judges.shift_spread_a:.2g} Å per axis) had random errors"
        )
    scale = f"{source.shift_scale * factor:.6g}"
    cure = ("conventions", f"shift_scale: {scale}", f"--shift-scale {scale}")
    return _pose("shift_unit", verdict, f"{said}: {evidence}", comparison, cure)


def _pose(name: str, verdict: str, statement: str, comparison: Comparison, cure: Cure) -> Test:
    scores = (comparison.current.mean_fsc, comparison.alternative.mean_fsc)
    return _judged(name, verdict, statement, scores, cure)


def _judged(name: str, verdict: str, statement: str, scores: tuple[float, float], cure: Cure | None) -> Test:
    section, remedy, option = cure if cure and verdict == CONTRADICTED else (None, None, None)
    return Test(
        name=name,
        verdict=verdict,
        statement=statement,
        score_current=scores[0],
        score_alternative=scores[1],
        remedy=remedy,
        section=section,
        import_option=option,
    )


def _switched(convention: str, on: bool) -> Cure:
    option = "--" + convention.replace("_", "-")
    return "conventions", f"{convention}: {str(not on).lower()}", f"(without {option})" if on else option


def contrast_test(
    skewness: float,
    error: float,
    quarters: tuple[float, ...],
    signal: float,
    source: Source,
    fits: float | None,
) -> Test:
    """Is the particle light on dark in the prepared images?

    Parameters
    ----------
    skewness, error, quarters
        Skewness of the map's voxels, its standard error, and that of the four maps of disjoint particles.
    signal
        Standard errors by which the particles' votes exceed 0.
    fits
        Mean correlation of the particles with the reference where one is given and fits.
    """
    sure = (
        abs(skewness) >= max(SKEWNESS_MARGIN, SURE * error)
        and all(np.sign(quarter) == np.sign(skewness) for quarter in quarters)
        and signal >= SURE
    )
    evidence = f"skewness of the map {skewness:+.2f} ± {error:.2f}, of four quarter maps " + ", ".join(
        f"{quarter:+.2f}" for quarter in quarters
    )
    if fits is not None:
        evidence += f"; correlation with the reference {'positive' if fits > 0 else 'negative'}"
        sure = sure and np.sign(fits) == np.sign(skewness)
    verdict = UNDECIDED if not sure else CONSISTENT if skewness > 0 else CONTRADICTED
    said = {
        CONTRADICTED: "the particles are dark on light, so that the map is negative",
        CONSISTENT: "the particles are light on dark",
        UNDECIDED: "the map does not tell light from dark",
    }[verdict]
    cure: Cure | None = None
    if source.contrast_sign is not None:
        sign = -int(source.contrast_sign)
        cure = ("set", f"contrast_sign: {sign}", f"--set contrast_sign={sign}")
    elif verdict == CONTRADICTED:
        said += " (the particles' contrast signs differ; check each part of the set)"
    return _judged("contrast", verdict, f"{said}: {evidence}", (skewness, -skewness), cure)


def hand_test(scores: Scores | None, why_not: str, source: Source) -> Test:
    """Do the poses belong to the reference, or to its mirror image?"""
    if scores is None:
        return Test(name="hand", verdict=UNDECIDED, statement=why_not)
    comparison = compare(scores, lambda h: h.mirror)
    verdict = comparison.verdict(MARGIN / 2)
    said = {
        CONTRADICTED: "the poses belong to the mirror image of the reference",
        CONSISTENT: "the poses belong to the reference's hand",
        UNDECIDED: "the reference and its mirror image fit the particles alike",
    }[verdict]
    matches = (comparison.current.match, comparison.alternative.match)
    cure = _switched("mirror_hand", source.mirror_hand)
    return _judged("hand", verdict, f"{said}: {comparison.numbers()}", matches, cure)


def pixel_size_test(scores: dict[float, Score] | None, why_not: str, source: Source) -> Test:
    """Does the reference fit at the pixel size in use, or at another within ± 10 %?"""
    if scores is None:
        return Test(name="pixel_size", verdict=UNDECIDED, statement=why_not)
    best = max(scores, key=lambda zoom: scores[zoom].match)
    sigma = advantage(scores[best], scores[1.0])
    zoom, edge = _peak(scores, best)
    off = abs(zoom - 1) > ZOOM_MARGIN and sigma >= SURE
    neighbours = [z for z in scores if abs(z - 1) > 2 * ZOOM_MARGIN]
    sharp = all(advantage(scores[z], scores[1.0]) <= -SURE for z in neighbours)
    verdict = CONTRADICTED if off else CONSISTENT if sharp else UNDECIDED
    size = source.pixel_size_a * zoom
    at = f"{'at least ' if edge else ''}{abs(zoom - 1):.1%} {'larger' if zoom > 1 else 'smaller'}"
    said = {
        CONTRADICTED: f"the reference fits best with pixels {at}: {size:.4g} Å instead of "
        f"{source.pixel_size_a:.4g} Å ({sigma:.0f} standard errors). Either the particles' pixel size is "
        "wrong or the voxel size in the reference's header",
        CONSISTENT: f"the reference fits best at {zoom:.3f} times the pixel size in use, as good as 1",
        UNDECIDED: f"the reference does not tell the pixel size (best {zoom:.3f} times that in use)",
    }[verdict]
    cure = ("set", f"pixel_size_a: {size:.4g}", f"--set pixel_size_a={size:.4g}")
    matches = (scores[1.0].match, scores[best].match)
    return _judged("pixel_size", verdict, said, matches, cure if source.one_pixel_size else None)


def _peak(scores: dict[float, Score], best: float) -> tuple[float, bool]:
    """The maximum of the parabola through the best zoom and its neighbours, and whether it is at the edge."""
    zooms = sorted(scores)
    at = zooms.index(best)
    if at in (0, len(zooms) - 1):
        return best, True
    left, middle, right = (scores[zooms[at + step]].match for step in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = 0.5 * (left - right) / bend if bend < 0 else 0.0
    return best + shift * (zooms[at + 1] - best), False


def too_few(n: int, needed: int) -> tuple[Test, ...]:
    """All tests of a set that is too small to tell anything."""
    statement = f"{n} particles are too few to tell; at least {needed} are needed"
    names = ("rotation", "shift_sign", "shift_unit", "contrast", "hand", "pixel_size")
    return tuple(Test(name=name, verdict=UNDECIDED, statement=statement) for name in names)
