"""The numbers behind the page's interactive plots, as the page carries them."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from cryodrgn_pipeline.io.runs import Columns
from cryodrgn_pipeline.report.collect import Gathered
from cryodrgn_pipeline.report.ellipses import Uncertainty, lower_triangle
from cryodrgn_pipeline.report.figures import (
    FSC_LINES,
    KLD_NAMES,
    RECONSTRUCTION_NAMES,
    axis_range,
    cluster_colours,
    contrast_histogram,
    fsc_curves,
    steps_word,
    training_curves,
)
from cryodrgn_pipeline.report.rows import row_of_centers, shown_rows

HOVERED_AT_MOST = 500_000  # numbers: about 2.7 MB of page for the ellipses of single particles


def script_json(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def _floats(values: Any) -> str:
    """Numbers as base64 of little-endian float32: small on the page, NaN allowed."""
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode("ascii")


def plot_data(gathered: Gathered) -> dict[str, Any]:
    """What each plot draws, by plot; one without material is left out."""
    data: dict[str, Any] = {}
    if gathered.consensus is not None and gathered.consensus.fsc is not None:
        curves = fsc_curves(gathered.consensus.fsc)
        data["fsc"] = {
            "curves": [
                {"name": FSC_LINES[name][0], "x": x.tolist(), "y": y.tolist(), "colour": FSC_LINES[name][1]}
                for name, (x, y) in curves.items()
            ],
            "resolution_a": gathered.consensus.summary.get("resolution_fsc0143_a"),
        }
    if gathered.metrics:
        data["loss"] = {
            "reconstruction": _curves(gathered, RECONSTRUCTION_NAMES),
            "kld": _curves(gathered, KLD_NAMES),
            "step": steps_word(gathered),
        }
    if gathered.latents is not None and gathered.latents.contrast is not None:
        counts, edges = contrast_histogram(gathered.latents.contrast)
        data["contrast"] = {"counts": counts.tolist(), "middles": ((edges[1:] + edges[:-1]) / 2).tolist()}
    if gathered.analysed is not None and gathered.centers is not None and gathered.latents is not None:
        data["latent"] = _latent_data(gathered, gathered.analysed, gathered.centers)
    return data


def _curves(gathered: Gathered, names: dict[str, str]) -> list[dict[str, Any]]:
    curves = []
    for name, label in names.items():
        epochs, values = training_curves(gathered.metrics, name)
        if epochs:
            finite = [value if np.isfinite(value) else None for value in values]
            curves.append({"name": label, "x": epochs, "y": finite})
    return curves


def _latent_data(gathered: Gathered, analysed: Columns, centers: Columns) -> dict[str, Any]:
    rows = shown_rows(len(analysed["particle_id"]))
    places = _places(gathered, analysed)
    values = places | {name: analysed[name] for name in ("cluster", "junk_score")}
    latents = gathered.latents
    if latents is not None:
        values["norm"] = np.linalg.norm(latents.z.astype(np.float64), axis=1)
        for name in ("loss", "log_evidence", "contrast"):
            column = getattr(latents, name)
            if column is not None and np.isfinite(column).any():
                values[name] = column
    at = row_of_centers(centers, analysed)
    summary = gathered.analysis or {}
    data = {
        "run": str(gathered.run),
        "axes": list(places),
        "ranges": {name: axis_range(column) for name, column in places.items()},
        "columns": {name: _floats(column[rows]) for name, column in values.items()},
        "centers": {name: [round(float(x), 5) for x in column[at]] for name, column in places.items()},
        "sizes": [int(n) for n in centers["n"]],
        "colours": cluster_colours(len(at)),
        "variance": summary.get("explained_variance_ratio", []),
        "junk_threshold": summary.get("settings", {}).get("junk_threshold", 5.0),
    }
    if gathered.uncertainty is not None:
        data["uncertainty"] = _uncertainty_data(gathered.uncertainty)
    return data


def _places(gathered: Gathered, analysed: Columns) -> Columns:
    """The columns that can be an axis: principal components, UMAP and z, idle ones left out."""
    places = {name: column for name, column in analysed.items() if name.startswith(("pc_", "umap_"))}
    if gathered.latents is not None:
        places |= {f"z_{j}": column for j, column in enumerate(gathered.latents.z.T)}
    always = ("pc_1", "pc_2")
    return {name: column for name, column in places.items() if name in always or np.ptp(column) > 0}


def _uncertainty_data(uncertainty: Uncertainty) -> dict[str, Any]:
    """Covariances as lower triangles; those of single particles only where the page stays small."""
    particles = lower_triangle(uncertainty.particles)
    return {
        "rows": {name: row.tolist() for name, row in uncertainty.rows.items()},
        "typical": lower_triangle(uncertainty.typical).tolist(),
        "centers": lower_triangle(uncertainty.centers).tolist(),
        "particles": _floats(particles) if particles.size <= HOVERED_AT_MOST else None,
    }
