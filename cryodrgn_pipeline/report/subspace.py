"""What a run without a network says: how many components the images support, and how surely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cryodrgn_pipeline.report.headline import Headline

SETTLED_SHARE = 0.02
NOISE_SHARE = 0.05


def components_headline(manifest: Mapping[str, Any]) -> Headline:
    """How many components of how many tried are kept."""
    kept, tried = _counts(manifest)
    return Headline(
        name="components",
        value=f"{kept} of {tried}",
        below="supported by held-out images" if kept else "none above noise",
        tone="" if kept else "bad",
    )


def subspace_findings(
    manifest: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """(tone, sentence) on the number of components, the iterations, contrast and images like noise."""
    found = [_components_finding(manifest), *_settled_finding(metrics)]
    noise, n = manifest.get("noise_images") or 0, manifest.get("n_particles") or 0
    if noise and n:
        tone = "open" if noise > NOISE_SHARE * n else ""
        found.append((tone, f"Images: {noise:,} of {n:,} are likelier noise alone than the particle."))
    poses = manifest.get("pose_offsets") or {}
    if poses.get("corrected"):
        found.append(
            (
                "open",
                f"Poses: shifts seem off by {poses['shift_spread_a']:.1f} Å along each axis; poses were "
                "corrected for this model, which changes the log evidence of an image by "
                f"{_gain(poses['held_out_gain'])}. Another refinement may pay.",
            )
        )
    spread = manifest.get("contrast_spread")
    if spread:
        found.append(("", f"Contrast: it spreads by {100 * spread:.1f} % among the particles."))
    return found


def _counts(manifest: Mapping[str, Any]) -> tuple[int, int]:
    kept = int(manifest.get("components") or 0)
    tried = (manifest.get("settings") or {}).get("max_components")
    return kept, int(tried or len(manifest.get("held_out_gain") or ()) or kept)


def _components_finding(manifest: Mapping[str, Any]) -> tuple[str, str]:
    kept, tried = _counts(manifest)
    gains = manifest.get("held_out_gain") or []
    if kept == 0:
        best = f" (the first changes the log evidence of an image by {_gain(gains[0])})" if gains else ""
        return "bad", (
            f"Components: none of {tried} is above noise{best}. Every particle has the same z and all "
            "volumes are the mean map: these images show no heterogeneity that a linear model can hold on to."
        )
    words = f"Components: {kept} of {tried} components are supported by held-out images."
    if len(gains) >= kept:
        words += f" The last one kept adds {_gain(gains[kept - 1])} to the log evidence of an image"
        words += f", the next {_gain(gains[kept])}." if len(gains) > kept else "."
    if kept == tried:
        more = " (--latent-dim)" if manifest.get("method") == "subspace" else ""
        return "open", words + f" All that were tried are kept: more may be there{more}."
    return "good", words


def _gain(gain: Mapping[str, float]) -> str:
    return f"{gain['mean']:.2f} ± {gain['standard_error']:.2f}"


def _settled_finding(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Whether the evidence still changed in the last iteration at the finest level."""
    evidence = [record.get("evidence") for record in metrics]
    known = [float(value) for value in evidence if value is not None]
    if len(known) < 2 or len(known) < len(evidence) or metrics[-1]["level_px"] != metrics[-2]["level_px"]:
        return []
    change, rise = known[-1] - known[-2], max(known) - min(known)
    if abs(change) <= SETTLED_SHARE * rise:
        return [("good", "Training: the log evidence has settled.")]
    return [
        ("open", f"Training: the log evidence still changed by {change:.2g} an image in the last iteration.")
    ]
