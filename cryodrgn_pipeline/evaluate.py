"""Score volumes and latents against a known truth, by the definitions of the CryoBench benchmark.

A truth folder holds `truth.parquet` (particle_id or uid, and one column per state coordinate) and `volumes/`
with `states.csv` (path, and the same coordinates): `simulate` writes one, and any other truth can be put in
this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline.errors import ConfigError, InputFormatError
from cryodrgn_pipeline.io.mrc import read_volume
from cryodrgn_pipeline.io.runs import read_columns, read_latents

Array = NDArray[np.float64]

NEIGHBOURS = 20
FOLDS = 5
UNION_THRESHOLD = 0.08
MOVING_THRESHOLD = 0.05
SOFT_EDGE_PX = 3.0
ROUNDING = 1e-24  # of the strongest shell: a shell that was cut off correlates by its rounding errors only
NOT_STATE = ("path", "volume", "weight")
DISCRETE = ("species",)  # coordinates that are names written as numbers
BOOTSTRAP_SAMPLES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What is known of a set: S state volumes and N particles.

    `volumes` `(S, D, D, D)`; `coordinates` (names); `states` `(S, C)`; `particle_states` `(N, C)`;
    `table` all columns of truth.parquet.
    """

    volumes: NDArray[np.float32]
    coordinates: tuple[str, ...]
    states: Array
    particle_states: Array
    table: dict[str, NDArray[Any]]

    @property
    def junk(self) -> NDArray[np.bool_]:
        """Which of the N particles are debris: `(N,)`."""
        return np.asarray(self.table.get("junk", np.zeros(len(self.particle_states))), dtype=bool)

    def distance(self, particle_states: Array) -> Array:
        """From each of M true states `(M, C)` to each state volume: `(M, S)`.

        Coordinates are scaled to their range; two different values of a discrete one are 1 apart.
        """
        span = np.ptp(self.states, axis=0)
        span[span == 0] = 1.0
        apart = (particle_states[:, None] - self.states[None]) / span
        discrete = np.isin(self.coordinates, DISCRETE)
        apart[..., discrete] = apart[..., discrete] != 0
        return np.asarray(np.sqrt((apart**2).sum(axis=-1)), dtype=np.float64)

    def nearest_state(self, particle_states: Array) -> NDArray[np.int64]:
        """The state volume nearest to each of M true states `(M, C)`."""
        return np.asarray(self.distance(particle_states).argmin(axis=1), dtype=np.int64)

    def rows_of(self, particle_id: NDArray[Any]) -> NDArray[np.int64]:
        """Rows of truth.parquet for ids of either kind (star names or uids)."""
        for name in ("particle_id", "uid"):
            if name not in self.table:
                continue
            known, wanted = self.table[name].astype(str), np.asarray(particle_id).astype(str)
            order = np.argsort(known)
            place = np.clip(np.searchsorted(known, wanted, sorter=order), 0, len(known) - 1)
            rows = order[place]
            if np.array_equal(known[rows], wanted):
                return rows
        raise InputFormatError(
            f"the run's particle ids (such as {np.asarray(particle_id)[0]}) are not all in truth.parquet "
            "(columns particle_id and uid): is this the truth of the same set?"
        )


def read_truth(folder: Path) -> Truth:
    """Read a truth folder (or the folder of a simulated set, which holds one as `truth/`)."""
    import pandas as pd

    folder = folder / "truth" if (folder / "truth").is_dir() else folder
    listing = folder / "volumes" / "states.csv"
    if not listing.is_file():
        raise InputFormatError(f"{listing}: no such file; a truth folder as `simulate` writes it is expected")
    states = pd.read_csv(listing)
    table = read_columns(folder / "truth.parquet", "a truth folder as `simulate` writes it is expected")
    names = tuple(name for name in states.columns if name not in NOT_STATE)
    missing = [name for name in names if name not in table]
    if "path" not in states or missing or not names:
        raise InputFormatError(
            f"{listing}: columns path and the state coordinates that truth.parquet has are expected; found "
            f"{', '.join(states.columns)}, not in truth.parquet: {', '.join(missing) or 'none'}"
        )
    return Truth(
        volumes=np.stack([read_volume(listing.parent / path)[0] for path in states["path"]]),
        coordinates=names,
        states=states[list(names)].to_numpy(float),
        particle_states=np.stack([np.asarray(table[name], dtype=float) for name in names], axis=1),
        table=table,
    )


def fsc_auc(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Area under |FSC| of two `(D, D, D)` maps: shells i−1 ≤ r < i for i < D/2, FSC₀ = 1, over i/D."""
    d = first.shape[0]
    k = np.arange(d) - d // 2
    radius = np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2)
    shell = (np.floor(radius).astype(np.int64) + 1).ravel()
    one, two = (np.fft.fftshift(np.fft.fftn(volume)).ravel() for volume in (first, second))

    def sums(values: Array) -> Array:
        return np.bincount(shell, weights=values)[1 : d // 2].astype(np.float64)

    power = sums(np.abs(one) ** 2) * sums(np.abs(two) ** 2)
    cross = np.hypot(sums((one * two.conj()).real), sums((one * two.conj()).imag))
    curve = np.divide(cross, np.sqrt(power), out=np.zeros_like(cross), where=power > ROUNDING * power.max())
    return float(np.trapezoid(np.concatenate([[1.0], curve]), dx=1 / d))


def _soft(core: NDArray[np.bool_]) -> Array:
    from scipy.ndimage import distance_transform_edt

    distance = np.clip(distance_transform_edt(~core) / SOFT_EDGE_PX, 0, 1)
    return np.asarray(0.5 * (1 + np.cos(np.pi * distance)), dtype=np.float64)


def union_mask(volumes: NDArray[np.float32]) -> Array:
    """Where any of the states `(S, D, D, D)` has density: above 8 % of the maximum, with a soft edge."""
    highest = volumes.max(axis=0)
    return _soft(highest > UNION_THRESHOLD * highest.max())


def moving_mask(volumes: NDArray[np.float32]) -> Array | None:
    """Where the states differ: variance above 5 % of its maximum, soft edge; None for a single state."""
    variance = volumes.astype(np.float64).var(axis=0)
    if variance.max() <= 1e-12 * float(np.abs(volumes).max()) ** 2:
        return None
    return _soft(variance > MOVING_THRESHOLD * variance.max())


def volume_scores(
    volumes: list[NDArray[np.float32]], truth: Truth, states: NDArray[np.int64]
) -> dict[str, Any]:
    """FSC-AUC of each volume against the true volume of its state: unmasked, union mask, moving mask.

    Parameters
    ----------
    volumes
        M maps `(D, D, D)` on the truth's grid.
    states
        `(M,)` the state (row of `truth.volumes`) each one stands for.
    """
    union, moving = union_mask(truth.volumes), moving_mask(truth.volumes)
    masks = {"unmasked": np.ones_like(union), "union": union}
    if moving is not None:
        masks["moving"] = moving
    solvent = union < 1e-3
    if not solvent.any():
        solvent = union <= union.min()
    scores: dict[str, list[float]] = {name: [] for name in masks}
    for volume, state in zip(volumes, states, strict=True):
        true = truth.volumes[state]
        if volume.shape != true.shape:
            raise InputFormatError(
                f"volumes of {volume.shape[0]} px cannot be scored against true volumes of {true.shape[0]} "
                "px: reconstruct at the box of the truth"
            )
        ours, theirs = (each - each[solvent].mean() for each in (volume, true))
        for name, mask in masks.items():
            scores[name].append(fsc_auc(ours * mask, theirs * mask))
    d = truth.volumes.shape[1]
    return {
        "volumes": len(volumes),
        "ceiling": (d / 2 - 1) / d,
        "fsc_auc": {name: float(np.mean(values)) for name, values in scores.items()},
        "fsc_auc_each": scores,
    }


def knn_r2(x: NDArray[Any], target: NDArray[Any], *, neighbours: int = NEIGHBOURS) -> float:
    """How well `target` `(N,)` or `(N, C)` is predicted from `x` `(N, J)` by its 20 nearest neighbours.

    R² = 1 − Σ(y − ŷ)² / Σ(y − ȳ)² (all columns together) of five-fold cross-validated predictions; at least
    as many training particles as neighbours are needed.
    """
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.neighbors import KNeighborsRegressor

    y = np.asarray(target, dtype=np.float64).reshape(len(x), -1)
    if len(x) * (FOLDS - 1) // FOLDS < neighbours:
        raise ConfigError(f"{len(x)} particles are too few to score {neighbours} neighbours in {FOLDS} folds")
    folds = KFold(n_splits=FOLDS, shuffle=True, random_state=0)
    predicted = cross_val_predict(KNeighborsRegressor(n_neighbors=neighbours), x, y, cv=folds)
    spread = float(((y - y.mean(axis=0)) ** 2).sum())
    return 1 - float(((y - predicted) ** 2).sum()) / spread if spread > 0 else float("nan")


def latent_r2(z: NDArray[Any], truth: dict[str, NDArray[Any]]) -> dict[str, float]:
    """20-NN R² from `z` `(N, J)` of each true coordinate `(N,)` that varies, five-fold cross-validated."""
    return {name: knn_r2(z, values) for name, values in truth.items() if np.ptp(values) > 0}


def leakage(z: NDArray[Any], viewing_direction: Array, defocus_a: Array) -> dict[str, float]:
    """20-NN R² from `z` of what it should not know, ≈ 0 is good: view `(N, 3)` and defocus `(N,)`."""
    return latent_r2(z, {"viewing_direction": viewing_direction, "defocus": defocus_a})


def paired_gain(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `first − second`, scores of the same M images, and the ends of its 95 % bootstrap interval."""
    return mean_gain([(first, second)], seed=seed)


def mean_gain(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]], *, seed: int = 0
) -> tuple[float, float, float]:
    """`paired_gain` over several sets, each of which counts alike; images are drawn within their set."""
    rng = np.random.default_rng(seed)
    gains, drawn = [], []
    for first, second in pairs:
        gain = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
        if gain.ndim != 1 or not len(gain):
            raise ValueError("paired scores must be two rows of equal length")
        gains.append(gain.mean())
        drawn.append(gain[rng.integers(len(gain), size=(BOOTSTRAP_SAMPLES, len(gain)))].mean(axis=1))
    low, high = np.quantile(np.mean(drawn, axis=0), (0.025, 0.975))
    return float(np.mean(gains)), float(low), float(high)


def cluster_ari(run: Path, truth: Truth) -> dict[str, float]:
    """Adjusted Rand index of RUN/analysis's clusters with each discrete coordinate; without junk.

    Empty where the truth has no such coordinate or the run was not analysed.
    """
    names, path = [name for name in truth.coordinates if name in DISCRETE], run / "analysis/particles.parquet"
    if not names or not path.is_file():
        return {}
    from sklearn.metrics import adjusted_rand_score

    columns = read_columns(path, "analyse the run with `cryodrgn-pipeline analyze`")
    rows = truth.rows_of(columns["particle_id"])
    good = ~truth.junk[rows]
    return {
        name: float(adjusted_rand_score(truth.table[name][rows[good]], columns["cluster"][good]))
        for name in names
    }


def junk_roc_auc(run: Path, truth: Truth) -> float | None:
    """How well RUN/analysis's junk score tells the truth's junk: area under the ROC curve, 0.5 is chance.

    None where the truth has no junk or the run was not analysed.
    """
    path = run / "analysis/particles.parquet"
    if not path.is_file():
        return None
    columns = read_columns(path, "analyse the run with `cryodrgn-pipeline analyze`")
    junk = truth.junk[truth.rows_of(columns["particle_id"])]
    if not junk.any() or junk.all():
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(junk, columns["junk_score"]))


def latent_scores(run: Path, truth: Truth) -> dict[str, Any]:
    """R² of the true coordinates, ARI of discrete ones, leakage of a run, and how well it tells junk, which
    does not count for the others.

    A discrete coordinate of K values is predicted as K columns that are 0 or 1.
    """
    latents = read_latents(run)
    rows = truth.rows_of(latents.particle_id)
    good = ~truth.junk[rows]
    rows, z = rows[good], latents.z[good]
    coordinates = {
        name: np.equal(values[:, None], np.unique(values)).astype(float) if name in DISCRETE else values
        for name, values in zip(truth.coordinates, truth.particle_states[rows].T, strict=True)
    }
    scores: dict[str, Any] = {"particles": len(rows), "r2": latent_r2(z, coordinates)}
    if found := cluster_ari(run, truth):
        scores["ari"] = found
    if (area := junk_roc_auc(run, truth)) is not None:
        scores["junk_roc_auc"] = area
    view = [f"rotation_2{column}" for column in range(3)]
    if all(name in truth.table for name in (*view, "defocus_u_a")):
        direction = np.stack([truth.table[name][rows] for name in view], axis=1).astype(float)
        scores["leakage"] = leakage(z, direction, truth.table["defocus_u_a"][rows].astype(float))
    return scores


def states_of_volumes(
    folder: Path, paths: list[Path], truth: Truth, *, run: Path | None, particles: Path | None
) -> tuple[str, NDArray[np.int64]]:
    """Which true state each volume stands for, and how that is known.

    By the particle listed for it (`particles`, one id per volume in order); else by the particle of `run`
    whose z the volume was drawn at; else, with as many volumes as true states, by their order.
    """
    if particles is not None:
        ids = np.array(particles.read_text(encoding="utf-8").split())
        if len(ids) != len(paths):
            raise ConfigError(f"{particles}: {len(ids)} ids for the {len(paths)} volumes in {folder}")
        return "per image", truth.nearest_state(truth.particle_states[truth.rows_of(ids)])
    if run is not None:
        from scipy.spatial import cKDTree

        latents = read_latents(run)
        drawn = volume_z(folder, latents.z.shape[1])
        rows = truth.rows_of(latents.particle_id[cKDTree(latents.z).query(drawn)[1]])
        return "per image", truth.nearest_state(truth.particle_states[rows])
    if len(paths) == len(truth.volumes):
        return "per conformation", np.arange(len(paths))
    raise ConfigError(
        f"{folder} has {len(paths)} volumes and the truth {len(truth.volumes)} states: tell which particle "
        "each volume belongs to by --particles ids.txt (one id per volume), or by --run RUN (their z)"
    )


def volume_z(folder: Path, latent_dim: int) -> Array:
    """The `(M, J)` latent points of the volumes, from volumes.parquet."""
    columns = read_columns(folder / "volumes.parquet", "draw volumes with `cryodrgn-pipeline volumes`")
    names = [f"z_{j}" for j in range(latent_dim)]
    missing = [name for name in names if name not in columns]
    if missing:
        raise InputFormatError(f"{folder / 'volumes.parquet'}: no column {', '.join(missing)}")
    return np.stack([np.asarray(columns[name], dtype=float) for name in names], axis=1)


def evaluate(
    volumes: Path | None,
    truth_folder: Path,
    *,
    run: Path | None = None,
    particles: Path | None = None,
    stack: Path | None = None,
) -> dict[str, Any]:
    """Score a folder of volumes, a run's latent, or both; the content of metrics.json.

    Parameters
    ----------
    volumes
        A folder that `volumes` wrote: vol_000.mrc …, and volumes.parquet when `run` is used.
    truth_folder
        A truth folder (see the module).
    run
        A training run: adds latent scores, and finds each volume's particle by its z.
    particles
        One particle id per volume, in order.
    stack
        The set's stack: adds the scores of consensus and oracle, and the headroom between them.
    """
    truth = read_truth(truth_folder)
    result: dict[str, Any] = {}
    if volumes is not None:
        paths = sorted(volumes.glob("*.mrc"), key=lambda path: (len(path.name), path.name))  # 999 before 1000
        if not paths:
            raise InputFormatError(f"{volumes}: no .mrc volume in this folder")
        how, states = states_of_volumes(volumes, paths, truth, run=run, particles=particles)
        scores = volume_scores([read_volume(path)[0] for path in paths], truth, states)
        result |= {"compared": how, **scores, "states": states.tolist()}
        if stack is not None:
            from cryodrgn_pipeline.headroom import headroom, reference_scores

            known = reference_scores(stack, truth, states)
            result["references"] = known
            if "moving" in known["oracle"]:
                ends = (known["consensus"]["moving"], known["oracle"]["moving"])
                result["headroom"] = headroom(scores["fsc_auc"]["moving"], *ends)
    if run is not None:
        result["latent"] = latent_scores(run, truth)
    return result


def sample_points(
    run: Path, truth_folder: Path, *, count: int = 100
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Ids and z of `count` evenly spaced particles of the truth's table that the run knows (no junk).

    Draw volumes at these points (`volumes --z`) for the per-image score.
    """
    truth, latents = read_truth(truth_folder), read_latents(run)
    rows = truth.rows_of(latents.particle_id)
    order = np.argsort(rows)
    order = order[~truth.junk[rows[order]]]
    chosen = order[np.unique(np.linspace(0, len(order) - 1, count).round().astype(np.int64))]
    return latents.particle_id[chosen], latents.z[chosen]
