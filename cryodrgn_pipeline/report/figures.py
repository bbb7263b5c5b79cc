"""The report's figures as PNG files, for slides and for Snakemake's own report; drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.io.atomic import replacing
from cryodrgn_pipeline.io.runs import Columns
from cryodrgn_pipeline.report.collect import Consensus, Gathered, VolumeSet
from cryodrgn_pipeline.report.ellipses import Uncertainty, ellipse
from cryodrgn_pipeline.report.montage import Views, difference_colours, difference_range, grey_range
from cryodrgn_pipeline.report.rows import row_of_centers, shown_rows

CONTRAST_BINS = 60
INK, FAINT = "#22303c", "#8a97a3"
FSC_LINES = {  # column → what it is, its colour
    "fsc_masked": ("masked", "#1f6feb"),
    "fsc_unmasked": ("unmasked", "#8a97a3"),
    "fsc_corrected": ("corrected", "#2da44e"),
    "fsc_reference": ("against the reference map", "#bf5af2"),
}
RECONSTRUCTION_NAMES = {
    "reconstruction": "training particles",
    "held_out_reconstruction": "held-out particles",
}
KLD_NAMES = {"kld": "training particles", "held_out_kld": "held-out particles"}
LOSS_COLOURS = ("#1f6feb", "#d1570a")
LINES_AT_MOST = 12
VIEW_NAMES = ("slice z", "slice y", "slice x", "projection z", "projection y", "projection x")


def cluster_colours(n: int) -> list[str]:
    """`n` colours as `#rrggbb`; clusters are ordered by likeness, and so are their colours."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0.06, 0.94, max(n, 1)))]


def axis_range(values: NDArray[np.floating]) -> tuple[float, float]:
    """Where to draw an axis so that a few far-out particles do not squeeze all others into a line."""
    x = np.asarray(values, dtype=np.float64)
    low, high = np.percentile(x, (0.5, 99.5))
    margin = 0.15 * (high - low) or 1.0
    edge = 0.03 * (high - low) or 1.0
    return max(float(low - margin), float(x.min() - edge)), min(float(high + margin), float(x.max() + edge))


def fsc_curves(fsc: Columns) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Frequency in 1/Å and correlation of each FSC column that holds numbers, without the zero shell."""
    frequency = np.asarray(fsc["frequency_per_a"], dtype=np.float64)
    curves = {}
    for name in FSC_LINES:
        if name in fsc:
            values = np.asarray(fsc[name], dtype=np.float64)
            known = np.isfinite(values) & (frequency > 0)
            if known.any():
                curves[name] = (frequency[known], values[known])
    return curves


def training_curves(metrics: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Epochs and values at which a metric was recorded."""
    known = [
        (int(record["epoch"]), float(record[name])) for record in metrics if record.get(name) is not None
    ]
    return [epoch for epoch, _ in known], [value for _, value in known]


def write_figures(gathered: Gathered, folder: Path) -> list[str]:
    """Write the figures there is material for; returns their file names."""
    written = []

    def save(name: str, figure: Any) -> None:
        with replacing(folder / name) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        written.append(name)

    analysed = gathered.analysed
    if analysed is not None and "pc_1" in analysed:
        up = "pc_2" if "pc_2" in analysed else None
        save("latent_pca.png", _latent_figure(gathered, analysed, "pc_1", up, "PC 1", "PC 2"))
    if analysed is not None and "umap_1" in analysed:
        save("latent_umap.png", _latent_figure(gathered, analysed, "umap_1", "umap_2", "UMAP 1", "UMAP 2"))
    if gathered.latents is not None and gathered.latents.contrast is not None:
        save("contrast.png", _contrast_figure(gathered.latents.contrast))
    if gathered.metrics:
        save("loss.png", _loss_figure(gathered))
    consensus = gathered.consensus
    if consensus is not None and consensus.fsc is not None:
        save("fsc.png", _fsc_figure(consensus))
    views = consensus.views if consensus is not None else None
    if gathered.volumes or views is not None:
        save("montage.png", _montage_figure(views, gathered.volumes[0] if gathered.volumes else None))
    for volumes in gathered.volumes[1:]:
        save(f"montage_{volumes.name}.png", _montage_figure(None, volumes))
    for volumes in gathered.volumes:
        if volumes.is_path and len(volumes.views) > 1:
            save(f"difference_{volumes.name}.png", _difference_figure(volumes))
    return written


def _canvas(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=INK, labelsize=9)
    return figure, axes


def _latent_figure(
    gathered: Gathered, analysed: Columns, across: str, up: str | None, x_name: str, y_name: str
) -> Any:
    figure, (ax,) = _canvas(6.4, 5.2)
    rows = shown_rows(len(analysed["particle_id"]))
    x = analysed[across]
    y = analysed[up] if up is not None else np.zeros_like(x)
    colours = np.array(cluster_colours(int(analysed["cluster"].max()) + 1))
    size = 14.0 if len(rows) < 2000 else 5.0 if len(rows) < 20_000 else 1.5
    ax.scatter(x[rows], y[rows], s=size, c=colours[analysed["cluster"][rows]], alpha=0.7, linewidths=0)
    if gathered.centers is not None:
        at = row_of_centers(gathered.centers, analysed)
        ax.scatter(x[at], y[at], s=22, c="white", edgecolors=INK, linewidths=0.8, zorder=3)
        for label, row in enumerate(at):
            ax.annotate(
                str(label), (x[row], y[row]), (4, 4), textcoords="offset points", fontsize=8, color=INK
            )
    ax.set_xlim(axis_range(x))
    ax.set_ylim(axis_range(y))
    ax.set_xlabel(x_name)
    ax.set_ylabel(y_name if up is not None else "")
    if gathered.uncertainty is not None and up is not None and across in gathered.uncertainty.rows:
        at = row_of_centers(gathered.centers or {}, analysed)
        _draw_ellipses(ax, gathered.uncertainty, across, up, np.stack([x[at], y[at]], axis=1))
    shown = "" if len(rows) == len(x) else f" ({len(rows):,} shown)"
    ax.set_title(f"{len(x):,} particles{shown}, coloured by cluster", fontsize=10, color=INK, loc="left")
    return figure


def _draw_ellipses(
    ax: Any, uncertainty: Uncertainty, across: str, up: str, centers: NDArray[np.floating]
) -> None:
    """The posterior at each cluster centre `(k, 2)` and, in the lower left corner, that of most particles."""
    from matplotlib.patches import Ellipse

    def add(place: tuple[float, float], covariance: NDArray[np.floating], **look: Any) -> None:
        width, height, angle_deg = ellipse(uncertainty.in_plane(covariance, across, up))
        ax.add_patch(Ellipse(place, width, height, angle=angle_deg, edgecolor=INK, **look))

    for place, covariance in zip(centers, uncertainty.centers, strict=True):
        add((float(place[0]), float(place[1])), covariance, fill=False, linewidth=0.6, alpha=0.7)
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    reach = np.sqrt(np.diag(uncertainty.in_plane(uncertainty.typical, across, up)))
    corner = (left + 0.02 * (right - left) + reach[0], bottom + 0.02 * (top - bottom) + reach[1])
    add(corner, uncertainty.typical, facecolor=FAINT, linewidth=0.9, alpha=0.8, zorder=4)
    ax.annotate(
        "±1σ of a particle", (corner[0] + reach[0], corner[1]), (4, 0), textcoords="offset points",
        fontsize=8, color=INK, va="center", zorder=4,
    )  # fmt: skip


def contrast_histogram(contrast: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Particles per bin of contrast, and the bins' edges; the far-out 0.1 % count in the outermost bins."""
    known = contrast[np.isfinite(contrast)].astype(np.float64)
    low, high = np.percentile(known, (0.05, 99.95)) if len(known) else (0.0, 2.0)
    counts, edges = np.histogram(
        np.clip(known, low, high),
        bins=CONTRAST_BINS,
        range=(low, high) if high > low else (low - 0.5, low + 0.5),
    )
    return counts.astype(np.int64), edges


def _contrast_figure(contrast: NDArray[np.floating]) -> Any:
    figure, (ax,) = _canvas(6.4, 3.2)
    counts, edges = contrast_histogram(contrast)
    ax.stairs(counts, edges, fill=True, color=LOSS_COLOURS[0])
    ax.set_xlabel("contrast (1: that of the mean map)")
    ax.set_ylabel("particles")
    return figure


def steps_word(gathered: Gathered) -> str:
    """What one record of metrics.jsonl is: expectation maximisation has iterations, not epochs."""
    return "iteration" if gathered.is_subspace else "epoch"


def _loss_figure(gathered: Gathered) -> Any:
    panels = [("reconstruction loss", RECONSTRUCTION_NAMES), ("KL divergence per particle", KLD_NAMES)]
    curves = [
        (title, {label: training_curves(gathered.metrics, name) for name, label in names.items()})
        for title, names in panels
    ]
    curves = [(title, lines) for title, lines in curves if any(epochs for epochs, _ in lines.values())]
    figure, axes = _canvas(4.5 * max(len(curves), 1), 3.6, columns=max(len(curves), 1))
    for ax, (title, lines) in zip(axes, curves, strict=False):
        for (label, (epochs, values)), colour in zip(lines.items(), LOSS_COLOURS, strict=True):
            if epochs:
                ax.plot(epochs, values, marker="o", markersize=3, color=colour, label=label)
        ax.set_ylabel(title)
        ax.set_xlabel(steps_word(gathered))
        ax.legend(frameon=False, fontsize=8)
    return figure


def _fsc_figure(consensus: Consensus) -> Any:
    figure, (ax,) = _canvas(6.4, 4.0)
    curves = fsc_curves(consensus.fsc or {})
    for name, curve in curves.items():
        label, colour = FSC_LINES[name]
        ax.plot(*curve, color=colour, label=label)
    for level in (0.143, 0.5):
        ax.axhline(level, color=FAINT, linewidth=0.8, linestyle="--")
        ax.annotate(f"{level:g}", (1, level), (2, 2), xycoords=("axes fraction", "data"),
                    textcoords="offset points", fontsize=8, color=FAINT)  # fmt: skip
    end = max((float(x.max()) for x, _ in curves.values()), default=1.0)
    ticks = [end * i / 5 for i in range(1, 6)]
    ax.set_xticks(ticks, [f"{1 / tick:.3g}" for tick in ticks])
    ax.set_xlim(0, 1.02 * end)
    at = consensus.summary.get("resolution_fsc0143_a")
    if at:
        ax.axvline(1 / at, color=FSC_LINES["fsc_masked"][1], linewidth=0.8)
        ax.set_title(f"FSC 0.143 at {at:.3g} Å", fontsize=10, color=INK, loc="left")
    ax.set_ylim(-0.1, 1.05)
    ax.set_xlabel("resolution (Å)")
    ax.set_ylabel("Fourier shell correlation")
    ax.legend(frameon=False, fontsize=8)
    return figure


def _montage_figure(consensus: Views | None, volumes: VolumeSet | None) -> Any:
    rows: list[tuple[str, Views]] = [] if consensus is None else [("consensus", consensus)]
    if volumes is not None:
        rows += [
            (f"vol {row:03d}" + ("\noutside" if volumes.is_outside(row) else ""), view)
            for row, view in zip(volumes.drawn, volumes.views, strict=True)
        ]
    sets = [[view for _, view in rows[:1]]] if consensus is not None else []
    sets += [list(volumes.views)] if volumes is not None else []
    ranges = {id(view): view_ranges(group) for group in sets for view in group}
    blocks = -(-len(rows) // LINES_AT_MOST)
    lines = -(-len(rows) // blocks)
    figure, grid = _picture_grid(lines, 6 * blocks)
    for number, (name, view) in enumerate(rows):
        block, line = divmod(number, lines)
        slices, projections = ranges[id(view)]
        for column, image in enumerate([*view.slices, *view.projections]):
            low, high = slices if column < 3 else projections
            ax = grid[line][6 * block + column]
            ax.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="bicubic")
            if line == 0:
                ax.set_title(VIEW_NAMES[column], fontsize=8, color=INK)
        label = grid[line][6 * block]
        label.set_ylabel(name, fontsize=8, color=INK, rotation=0, ha="right", va="center")
    return figure


def view_ranges(views: Sequence[Views]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The common grey scales of several maps: of their slices, of their projections."""
    return grey_range([view.slices for view in views]), grey_range([view.projections for view in views])


def _difference_figure(volumes: VolumeSet) -> Any:
    changes = changes_along(volumes)
    largest = difference_range(changes)
    figure, grid = _picture_grid(len(changes), 3)
    for line, (row, change) in enumerate(zip(volumes.drawn[1:], changes, strict=True)):
        for column in range(3):
            grid[line][column].imshow(difference_colours(change[column], largest))
            if line == 0:
                grid[line][column].set_title(VIEW_NAMES[column + 3], fontsize=8, color=INK)
        grid[line][0].set_ylabel(
            f"vol {row:03d} − {volumes.drawn[0]:03d}",
            fontsize=8,
            color=INK,
            rotation=0,
            ha="right",
            va="center",
        )
    return figure


def changes_along(volumes: VolumeSet) -> list[NDArray[np.float32]]:
    """Projections `(3, D, D)` of each later map minus those of the first."""
    return [view.projections - volumes.views[0].projections for view in volumes.views[1:]]


def _picture_grid(lines: int, columns: int) -> tuple[Any, Any]:
    """A figure and its `(lines, columns)` array of bare axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.9 + 1.15 * columns, 0.3 + 1.15 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for ax in grid.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    return figure, grid
