"""From scores to verdicts: when is an alternative clearly better, and how to say it with its remedy.

The limits were calibrated on simulated sets (see docs/convention-check.md): a false alarm stops a user's
work, so that an alternative must be better both beyond chance and by an amount that matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cryodrgn_pipeline.convention_scores import Hypothesis, Score, advantage

if TYPE_CHECKING:
    from cryodrgn_pipeline.stack import Stack

CONTRADICTED, CONSISTENT, UNDECIDED = "contradicted", "consistent", "not_determinable"

SURE = 6.0  # standard errors by which the votes must differ
MARGIN = 0.05  # of the better match: a difference that matters
SHIFT_MARGIN = 0.04  # of what the shifts bring in all, for their unit: random errors mimic too large shifts
ZOOM_MARGIN = 0.02  # relative difference of pixel sizes that matters
LARGEST_SHIFT_ERROR_A = 6.0  # a refinement's random shift errors stay below this, per axis
SKEWNESS_MARGIN = 0.5
REFERENCE_FITS = 0.7  # of the match with the particles' own map: less, and it is another map or frame

Scores = dict[Hypothesis, Score]


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """One convention: its verdict in plain words, and the config line that mends it where contradicted."""

    name: str
    verdict: str
    statement: str
    score_current: float | None = None
    score_alternative: float | None = None
    remedy: str | None = None
    section: str | None = None
    import_option: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For consensus.json."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "statement": self.statement,
            "score_current": self.score_current,
            "score_alternative": self.score_alternative,
            "remedy": self.remedy,
            "remedy_section": self.section and f"datasets: NAME: {self.section}:",
            "import_option": self.import_option,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What the import put in force: remedies are relative to it.

    `pixel_size_a` of the original images; `contrast_sign` None where it differs between particles.
    """

    pixel_size_a: float
    one_pixel_size: bool = True
    contrast_sign: float | None = 1.0
    transpose_rotations: bool = False
    negate_shifts: bool = False
    shift_scale: float = 1.0
    mirror_hand: bool = False

    @classmethod
    def of(cls, stack: Stack) -> Source:
        """What stack.json knows of the import; the stack's own pixel size where it knows nothing."""
        known = stack.info.get("source") or {}
        conventions = known.get("conventions") or {}
        return cls(
            pixel_size_a=float(known.get("pixel_size_a") or stack.pixel_size_a),
            one_pixel_size=len(np.unique(stack.particles.optics.pixel_size_a)) == 1,
            contrast_sign=known.get("contrast_sign", 1.0),
            transpose_rotations=bool(conventions.get("transpose_rotations", False)),
            negate_shifts=bool(conventions.get("negate_shifts", False)),
            shift_scale=float(conventions.get("shift_scale", 1.0)),
            mirror_hand=bool(conventions.get("mirror_hand", False)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The best hypothesis with one convention as imported against the best without."""

    current: Score
    alternative: Score
    hypothesis: Hypothesis

    @property
    def sigma(self) -> float:
        """Standard errors by which the alternative's votes are better."""
        return advantage(self.alternative, self.current)

    @property
    def gain(self) -> float:
        """Difference of the matches over the better one."""
        better = max(self.current.match, self.alternative.match, 1e-9)
        return (self.alternative.match - self.current.match) / better

    def verdict(self, margin: float, whole: float | None = None) -> str:
        """The verdict if a difference of `margin` (of `whole`, or of the better match) matters."""
        gain = self.gain
        if whole is not None:
            gain = (self.alternative.match - self.current.match) / max(whole, 1e-9)
        if self.sigma >= SURE and gain >= margin:
            return CONTRADICTED
        if self.sigma <= -SURE and gain <= -margin / 2:
            return CONSISTENT
        return UNDECIDED

    def numbers(self) -> str:
        """The evidence in words."""
        n = len(self.current.votes)
        share = float(np.mean(self.current.votes > self.alternative.votes))
        how = f"{share:.0%} of {n} particles match better as imported ({abs(self.sigma):.0f} standard errors)"
        if share < 0.5:
            how = f"{1 - share:.0%} of {n} particles match better so ({abs(self.sigma):.0f} standard errors)"
        if np.isfinite(self.current.mean_fsc):
            how += (
                f"; mean half-map FSC {self.current.mean_fsc:.2f} as imported, "
                f"{self.alternative.mean_fsc:.2f} with the change"
            )
        return how


def compare(scores: Scores, changed: Callable[[Hypothesis], bool]) -> Comparison:
    """Compare the best hypothesis for which `changed` holds with the best for which it does not."""
    kept = max((h for h in scores if not changed(h)), key=lambda h: scores[h].match)
    other = max((h for h in scores if changed(h)), key=lambda h: scores[h].match)
    return Comparison(current=scores[kept], alternative=scores[other], hypothesis=other)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judges:
    """Scores by the particles' own half maps, and by the reference where one is given and fits.

    `shift_spread_a` is the root mean square of the shifts per axis.
    """

    halves: Scores
    reference: Scores | None = None
    shift_spread_a: float = 0.0

    @staticmethod
    def shifted(hypothesis: Hypothesis) -> bool:
        """Whether any shift is applied."""
        return hypothesis.shift_factor > 0

    @staticmethod
    def unshifted(hypothesis: Hypothesis) -> bool:
        """Whether no shift is applied: the control."""
        return hypothesis.shift_factor == 0

    def as_large_as_imported(self) -> Scores:
        """The half maps' scores of shifts as large as imported, and of none."""
        return {h: score for h, score in self.halves.items() if h.shift_factor in (0, 1)}

    def looks_like_error(self, factor: float) -> bool:
        """Whether random errors of a size that refinements make could ask for shifts `factor` times as large.

        Shifts t with errors of variance e² fit best when shrunk by 1 − e²/⟨t²⟩; they never ask for more.
        """
        implied = self.shift_spread_a * math.sqrt(max(0.0, 1 - factor))
        return factor < 1 and implied < LARGEST_SHIFT_ERROR_A

    def better_without_shifts(self) -> bool:
        """Whether the images agree clearly better without the shifts, and not for their unit's sake."""
        control = compare(self.as_large_as_imported(), self.unshifted)
        best = compare(self.halves, self.unshifted)
        return control.verdict(MARGIN) == CONTRADICTED and best.sigma > -SURE / 2

    def decide(
        self,
        changed: Callable[[Hypothesis], bool],
        margin: float,
        among: Callable[[Hypothesis], bool] = lambda hypothesis: True,
        whole: Callable[[Scores], float] | None = None,
    ) -> tuple[str, Comparison, str]:
        """Verdict, the half maps' comparison, and the evidence in words; images that disagree with the
        reference are believed, since the reference may come from another refinement.
        """
        own = {h: score for h, score in self.halves.items() if among(h)}
        comparison = compare(own, changed)
        verdict = comparison.verdict(margin, whole(self.halves) if whole else None)
        words = comparison.numbers()
        if self.reference is None:
            return verdict, comparison, words
        external = {h: score for h, score in self.reference.items() if among(h)}
        against = compare(external, changed)
        by_reference = against.verdict(margin, whole(self.reference) if whole else None)
        if verdict == UNDECIDED:
            words += f"; against the reference {against.numbers()}"
            agreed = against.hypothesis if by_reference == CONTRADICTED else comparison.hypothesis
            return by_reference, replace(comparison, hypothesis=agreed), words
        if by_reference == verdict:
            words += f"; the reference says the same ({abs(against.sigma):.0f} standard errors)"
        elif by_reference != UNDECIDED:
            words += "; the reference says the opposite: is it from this refinement, and unrotated?"
        return verdict, comparison, words
