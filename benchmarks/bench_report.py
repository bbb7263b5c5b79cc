"""The rows of bench.py as tables for RESULTS.md and one figure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from cryodrgn_pipeline.evaluate import mean_gain, paired_gain

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
PEER = "cryodrgn"
MASKS = ("unmasked", "union", "moving")
PANELS_A_ROW = 4


@dataclass(kw_only=True)
class Row:
    """One run scored on one set: all that a table needs.

    `wall_s` and `cpu_s` by step; `each` the 100 scores on the moving mask (union mask where nothing moves),
    empty where only their mean was kept;
    `references` as `headroom.reference_scores` gives them; `epoch`, `converged` and `extra` are cryoDRGN's.
    """

    set: str
    method: str
    seed: int
    commands: list[str]
    commit: str
    load: float
    wall_s: dict[str, float]
    cpu_s: dict[str, float]
    peak_mb: float
    fsc_auc: dict[str, float]
    each: list[float]
    references: dict[str, Any]
    headroom: float | None
    latent: dict[str, Any]
    epoch: int | None = None
    converged: bool | None = None
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.method}, epoch {self.epoch}" if self.epoch else f"{self.method}, seed {self.seed}"

    @property
    def score(self) -> float:
        """Mean over the images, on the moving mask or, where nothing moves, on the union mask."""
        return self.fsc_auc["moving"] if "moving" in self.fsc_auc else self.fsc_auc["union"]

    @property
    def total_wall_s(self) -> float:
        """From import to the 100 volumes."""
        return sum(self.wall_s.values())


def report(header: str, command: str, rows: list[Row], sets: dict[str, str]) -> str:
    """The whole section, without its markers."""
    present = [name for name in sets if any(row.set == name for row in rows)]
    told = [f"`{name}`: `simulate {sets[name]}`" for name in present]
    trained = sorted(
        {
            f"{row.method}: `{row.commands[0].replace(f'/{row.set}/', '/SET/')}`"
            for row in final_rows(rows)
            if row.seed == 0
        }
    )
    commits = sorted({row.commit for row in rows})
    parts = [
        f"`{command}`. {header}. Commits: {', '.join(commits)}.",
        "Sets: " + "; ".join(told) + ".",
        "Trained by:\n\n" + "\n".join(f"- {line}" for line in trained),
        "Scores are FSC-AUC per image (100 particles): unmasked, union mask, moving mask; H is the headroom "
        "between the consensus and an oracle that is told the true states; junk: ROC-AUC of the junk score. "
        "Wall time runs from import to "
        "the 100 volumes; of cryoDRGN it is the number of epochs times its fastest epoch, and CPU time and "
        "memory are those of drawing the volumes only, since its training is cached.",
        scores_table(rows),
        gains_table(rows),
        conclusion(rows),
        epochs_table(rows),
        "![scores](bench.png)",
    ]
    return "\n\n".join(part for part in parts if part)


def final_rows(rows: list[Row]) -> list[Row]:
    """All of ours, and of cryoDRGN's epochs the last one of each set."""
    last = {row.set: row.epoch or 0 for row in sorted(rows, key=lambda row: row.epoch or 0)}
    return [row for row in rows if row.method != PEER or row.epoch == last[row.set]]


def by_set(rows: list[Row]) -> Iterable[tuple[str, list[Row]]]:
    """Rows, sorted by set, in groups."""
    return ((name, list(group)) for name, group in groupby(rows, key=lambda row: row.set))


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _named(values: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in values.items()) or "–"


def scores_table(rows: list[Row]) -> str:
    """Every final score, with the set's consensus and oracle."""
    lines = [
        "| set | run | unmasked | union | moving | H | R² of the truth | ARI | junk | leakage | wall s "
        "| CPU s | MB | load |",
        "|" + "---|" * 14,
    ]
    for name, group in by_set(final_rows(rows)):
        for end in ("consensus", "oracle"):
            known = group[0].references[end]
            scores = " | ".join(_number(known.get(mask)) for mask in MASKS)
            lines.append(f"| {name} | {end} | {scores} |" + " – |" * 9)
        for row in group:
            scores = " | ".join(_number(row.fsc_auc.get(mask)) for mask in MASKS)
            told = {key: _named(row.latent.get(key, {})) for key in ("r2", "ari", "leakage")}
            junk = _number(row.latent.get("junk_roc_auc"))
            latent = (told["r2"], told["ari"], junk, told["leakage"])
            spent = f"{row.total_wall_s:.0f} | {sum(row.cpu_s.values()):.0f} | {row.peak_mb:.0f}"
            lines.append(
                f"| {name} | {row.name} | {scores} | {_number(row.headroom, 2)} | "
                f"{' | '.join(latent)} | {spent} | {row.load:.1f} |"
            )
    return "\n".join(lines)


def gains_table(rows: list[Row]) -> str:
    """Ours (per image the mean over the seeds) less cryoDRGN's last epoch: gain, time, and equal time."""
    lines = [
        "| set | method | seeds | gain over cryoDRGN | 95 % interval | H | times less wall time "
        "| cryoDRGN's loss flat | cryoDRGN at equal wall time |",
        "|" + "---|" * 9,
    ]
    for name, group in by_set(rows):
        theirs = [row for row in group if row.method == PEER]
        if not theirs:
            continue
        last = theirs[-1]
        for method in sorted({row.method for row in group} - {PEER}):
            ours = [row for row in group if row.method == method]
            gain, interval = float(np.mean([row.score for row in ours])) - last.score, "–"
            if last.each:
                gain, low, high = paired_gain(np.mean([row.each for row in ours], axis=0), last.each)
                interval = f"{low:+.3f} … {high:+.3f}"
            wall = float(np.mean([row.total_wall_s for row in ours]))
            heads = [row.headroom for row in ours if row.headroom is not None]
            seeds = ", ".join(str(row.seed) for row in ours)
            lines.append(
                f"| {name} | {method} | {seeds} | {gain:+.3f} | {interval} | "
                f"{_number(float(np.mean(heads)) if heads else None, 2)} | {last.total_wall_s / wall:.0f} | "
                f"{'yes' if last.converged else 'no'} | {at_time(theirs, wall)} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def at_time(theirs: list[Row], wall_s: float) -> str:
    """cryoDRGN's score at the last scored epoch within `wall_s`; its first one, marked, where none is."""
    reached = [row for row in theirs if row.total_wall_s <= wall_s]
    if reached:
        return _number(reached[-1].score)
    first = theirs[0]
    return f"none yet; {first.score:.3f} after epoch {first.epoch}, {first.total_wall_s:.0f} s"


def conclusion(rows: list[Row]) -> str:
    """The mean gain of each method over the sets on which cryoDRGN's loss is flat; each set counts alike."""
    pairs: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    gains: dict[str, dict[str, float]] = {}
    for name, group in by_set(rows):
        theirs = [row for row in group if row.method == PEER]
        if not theirs or not theirs[-1].converged:
            continue
        for method in sorted({row.method for row in group} - {PEER}):
            ours = [row for row in group if row.method == method]
            gains.setdefault(method, {})[name] = (
                float(np.mean([row.score for row in ours])) - theirs[-1].score
            )
            if theirs[-1].each:
                each = np.mean([row.each for row in ours], axis=0).tolist()
                pairs.setdefault(method, {})[name] = (each, theirs[-1].each)
    lines = []
    for method, sets in gains.items():
        mean = np.mean(list(sets.values()))
        lines.append(f"`{method}` over converged cryoDRGN, mean of {', '.join(sets)}: {mean:+.3f}.")
        if known := pairs.get(method):
            mean, low, high = mean_gain(list(known.values()))
            lines[-1] += (
                f" Of those with scores by image ({', '.join(known)}): {mean:+.3f} "
                f"({low:+.3f} … {high:+.3f}, 95 %, bootstrap over the images of each set)."
            )
    return "\n\n".join(lines)


def epochs_table(rows: list[Row]) -> str:
    """cryoDRGN's way: score by epoch."""
    lines = ["| set | cryoDRGN's epoch | loss | wall s | moving | R² of the truth |", "|" + "---|" * 6]
    for row in rows:
        if row.method == PEER:
            lines.append(
                f"| {row.set} | {row.epoch} | {row.extra['loss']:.4f} | {row.total_wall_s:.0f} | "
                f"{row.score:.3f} | {_named(row.latent['r2'])} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def figure(rows: list[Row], path: Path) -> None:
    """Score against time, a panel a set: cryoDRGN by epoch, ours as points, consensus and oracle as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(by_set(rows))
    if not groups:
        return
    rows_of_panels = -(-len(groups) // PANELS_A_ROW)
    made, axes = plt.subplots(
        rows_of_panels, PANELS_A_ROW, figsize=(3.2 * PANELS_A_ROW, 3 * rows_of_panels), layout="constrained"
    )
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, (name, group) in zip(axes.flat, groups, strict=False):
        for end, style in (("consensus", ":"), ("oracle", "--")):
            known = group[0].references[end]
            axis.axhline(known.get("moving", known["union"]), color="0.5", ls=style, label=end)
        for method in dict.fromkeys(row.method for row in group):
            points = [(row.total_wall_s, row.score) for row in group if row.method == method]
            axis.plot(
                *zip(*points, strict=True),
                "o-" if method == PEER else "*",
                ms=4 if method == PEER else 9,
                label=method,
            )
        axis.set(title=name, xscale="log", xlabel="wall time (s)", ylabel="FSC-AUC per image, moving mask")
        axis.legend(fontsize=7)
    made.savefig(path, dpi=120)
    plt.close(made)


def rewrite(path: Path, section: str) -> None:
    """Put the section in place of the one between the markers; at the end where there is none yet."""
    text = path.read_text(encoding="utf-8")
    if BEGIN in text and END in text:
        before, rest = text.split(BEGIN, 1)
        text = before + section + rest.split(END, 1)[1]
    else:
        text = f"{text.rstrip()}\n\n## Against cryoDRGN on sets with known answers\n\n{section}\n"
    path.write_text(text, encoding="utf-8")
