"""What a run says in a few plain words: the headline numbers and one sentence per finding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cryodrgn_pipeline.progress import duration
from cryodrgn_pipeline.report.collect import Gathered
from cryodrgn_pipeline.report.figures import steps_word, training_curves
from cryodrgn_pipeline.report.headline import Headline
from cryodrgn_pipeline.report.subspace import components_headline, subspace_findings

# A latent dimension whose posterior means vary less than this holds nothing (Burda et al. 2016, sec. 5.2).
ACTIVE_VARIANCE = 0.01
VERDICTS = {
    "consistent": ("consistent", "good", "As read, the particles agree with their images."),
    "contradicted": (
        "contradicted",
        "bad",
        "The images contradict a convention the particles were read with.",
    ),
    "not_determinable": ("not determinable", "open", "These images cannot decide it; that is no failure."),
    "not_tested": ("not tested", "open", "The check was switched off."),
}


def verdict_of(check: dict[str, Any]) -> tuple[str, str, str]:
    """A convention verdict in words: label, tone (good, bad, open) and what it means."""
    verdict = str(check.get("verdict", "not_tested"))
    return VERDICTS.get(verdict, (verdict.replace("_", " "), "open", ""))


def remedy_of(test: dict[str, Any]) -> str:
    """The line of config.yaml that mends a contradicted convention, with the section it belongs in."""
    section, option = test.get("remedy_section") or "", test.get("import_option")
    return f"{section} {test.get('remedy') or ''}".strip() + (f" (import {option})" if option else "")


def headlines(gathered: Gathered) -> list[Headline]:
    """The numbers of the first screen, as far as they are known."""
    found = []
    consensus = gathered.consensus.summary if gathered.consensus else {}
    stack = gathered.stack or {}
    manifest = gathered.manifest or {}
    n = len(gathered.latents) if gathered.latents else manifest.get("n_particles", stack.get("n_particles"))
    if n is not None:
        of_all = stack.get("n_particles")
        subset = f"subset of {of_all:,}" if of_all and of_all > n else ""
        found.append(Headline(name="particles", value=f"{n:,}", below=subset))
    box, pixel = (
        next((source[key] for source in (stack, consensus, manifest) if source.get(key)), None)
        for key in ("box_size_px", "pixel_size_a")
    )
    if box and pixel:
        below = f"{pixel:.4g} Å/px, Nyquist {2 * pixel:.3g} Å"
        found.append(Headline(name="box", value=f"{box} px", below=below))
    if consensus:
        at = consensus.get("resolution_fsc0143_a")
        half = consensus.get("resolution_fsc05_a")
        below = f"FSC 0.5 at {half:.3g} Å" if half else "FSC 0.143"
        if at and pixel and at < 2.02 * pixel:
            below = "limited by the pixel size"
        value = f"{at:.3g} Å" if at else "none"
        found.append(Headline(name="consensus resolution", value=value, below=below))
        label, tone, _ = verdict_of(consensus.get("convention_check", {}))
        found.append(Headline(name="convention check", value=label, tone=tone))
    if gathered.metrics:
        seconds = manifest.get("training_seconds")
        spent = f"in {duration(seconds)}" if isinstance(seconds, int | float) else ""
        steps = str(gathered.metrics[-1]["epoch"])
        below = f"{spent} on {manifest.get('device', '?')}"
        found.append(Headline(name=f"{steps_word(gathered)}s", value=steps, below=below))
    if gathered.is_subspace:
        found.append(components_headline(manifest))
    elif gathered.latents:
        active = active_dimensions(gathered)
        total = gathered.latents.z.shape[1]
        tone = "bad" if active == 0 else ""
        found.append(
            Headline(name="latent dimensions", value=str(total), below=f"{active} in use", tone=tone)
        )
    return found


def active_dimensions(gathered: Gathered) -> int:
    """How many latent dimensions carry anything."""
    if gathered.latents is None:
        return 0
    return int((gathered.latents.z.astype(np.float64).var(axis=0) > ACTIVE_VARIANCE).sum())


def findings(gathered: Gathered) -> list[tuple[str, str]]:
    """(tone, sentence) for each thing worth knowing first."""
    found: list[tuple[str, str]] = []
    if gathered.consensus is not None:
        check = gathered.consensus.summary.get("convention_check", {})
        label, tone, meaning = verdict_of(check)
        open_ones = [test for test in check.get("tests", []) if test.get("verdict") == "not_determinable"]
        if open_ones and label == "consistent":
            meaning += (
                f" Not determinable: {', '.join(test['name'].replace('_', ' ') for test in open_ones)}."
            )
        found.append((tone, f"Conventions: {label}. {meaning}"))
        remedies = [remedy_of(test) for test in check.get("tests", []) if test.get("remedy")]
        found += [("bad", f"In config.yaml: {remedy}") for remedy in remedies]
    if gathered.metrics:
        found += [] if gathered.is_subspace else [training_verdict(gathered.metrics)]
    if gathered.is_subspace:
        found += subspace_findings(gathered.manifest or {}, gathered.metrics)
    if gathered.latents is not None:
        found += _latent_findings(gathered)
    return found + _outside_findings(gathered)


def _outside_findings(gathered: Gathered) -> list[tuple[str, str]]:
    found = []
    for volumes in gathered.volumes:
        n = sum(volumes.is_outside(row) for row in range(len(volumes.paths)))
        if n:
            found.append(
                (
                    "open",
                    f"Volumes: {n} of {len(volumes.paths)} maps of “{volumes.title}” lie outside the region "
                    "of particles: the model drew them without data. They are marked.",
                )
            )
    return found


def training_verdict(metrics: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Whether the held-out loss still falls, has levelled off, or rises again, judged on its last fifth."""
    epochs, values = training_curves(metrics, "held_out_reconstruction")
    whose = "held-out"
    if len(values) < 2:
        epochs, values = training_curves(metrics, "reconstruction")
        whose = "training"
    if len(values) < 5:
        return "open", f"Training: {len(metrics)} epochs are too few to judge whether the loss has settled."
    best = int(np.argmin(values))
    window = max(2, len(values) // 5)
    drop = values[0] - min(values)
    if drop <= 0:
        return "bad", f"Training: the {whose} loss never fell below that of the first epoch."
    if values[-1] - values[best] > 0.05 * drop and best < len(values) - window:
        return "bad", (
            f"Training: the {whose} loss was lowest in epoch {epochs[best]} and has risen since; "
            "fewer epochs or more particles would fit less noise."
        )
    recent = (values[-1 - window] - values[-1]) / drop
    if recent > 0.05:
        return "open", (
            f"Training: the {whose} loss still fell over the last {window} epochs "
            f"({100 * recent:.0f} % of its whole fall); more epochs may help."
        )
    return "good", f"Training: the {whose} loss has levelled off."


def _latent_findings(gathered: Gathered) -> list[tuple[str, str]]:
    found = []
    active, total = active_dimensions(gathered), gathered.latents.z.shape[1] if gathered.latents else 0
    if gathered.is_subspace:
        pass  # its number of components is said with the evidence for it
    elif active == 0:
        found.append(("bad", "Latent: collapsed; every particle has the same z, so all volumes are alike."))
    elif active < total:
        found.append(
            ("open", f"Latent: {active} of {total} dimensions carry information; the others are idle.")
        )
    analysis = gathered.analysis
    if analysis is not None:
        shares = analysis.get("explained_variance_ratio", [])[:2]
        if shares and active:
            words = " and ".join(f"{100 * share:.0f} %" for share in shares)
            found.append(("", f"Latent variance along the first principal components: {words}."))
        n_junk, n = analysis.get("n_junk", 0), analysis.get("n_particles", 1)
        limit = analysis.get("settings", {}).get("junk_threshold", 5)
        tone = "open" if n_junk > 0.05 * n else ""
        evidence = gathered.latents is not None and gathered.latents.log_evidence is not None
        sentence = (
            f"Outliers: {n_junk:,} of {n:,} particles ({100 * n_junk / n:.1f} %) have a "
            f"{'low evidence or a ' if evidence else ''}high loss or |z|, more than {limit:g} robust "
            f"standard deviations from the median.{' Look at them first.' if n_junk else ''}"
        )
        found.append((tone, sentence))
    return found
