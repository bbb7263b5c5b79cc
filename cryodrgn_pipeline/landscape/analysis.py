"""One run's latent, analysed and written: embeddings, clusters, junk scores and paths into RUN/analysis."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryodrgn_pipeline import __version__
from cryodrgn_pipeline.errors import ConfigError
from cryodrgn_pipeline.io.atomic import replacing_directory, write_json
from cryodrgn_pipeline.io.runs import (
    Columns,
    Latents,
    keep_foreign_files,
    read_latents,
    write_columns,
    write_z,
)
from cryodrgn_pipeline.landscape.cluster import PARTS, distinct_groups, kmeans_centers, labelled_centers
from cryodrgn_pipeline.landscape.density import LatentRegion, latent_region
from cryodrgn_pipeline.landscape.embed import (
    UMAP_FEWEST,
    UMAP_FIT_AT_MOST,
    PrincipalComponents,
    principal_components,
    umap_embedding,
)
from cryodrgn_pipeline.landscape.outliers import JUNK_THRESHOLD, JunkScores, junk_scores, well_fitted_rows
from cryodrgn_pipeline.landscape.traverse import direct_traversal, graph_traversal, pc_traversal, snap

log = logging.getLogger(__name__)

OURS = ("particles.parquet", "centers.parquet", "centers.csv", "analysis.json", "traversal_*.csv")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisSettings:
    """What `analyze` is asked for; `clusters` None: distinct groups where there are any, else 20 parts;
    `through` names the clusters the paths pass, None the farthest two.
    """

    clusters: int | None = None
    pcs: int = 2
    points: int = 10
    snap: bool = False
    through: tuple[int, ...] | None = None
    umap: bool = True
    umap_fit_at_most: int = UMAP_FIT_AT_MOST
    junk_threshold: float = JUNK_THRESHOLD
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clusters is not None and self.clusters < 1:
            raise ConfigError(f"--clusters {self.clusters}: at least 1 is needed")
        if self.pcs < 0:
            raise ConfigError(f"--pcs {self.pcs}: 0 or more expected")
        if self.points < 2:
            raise ConfigError(f"--points {self.points}: a path has at least 2 points")
        if self.umap_fit_at_most < UMAP_FEWEST:
            raise ConfigError(f"--umap-max {self.umap_fit_at_most}: at least {UMAP_FEWEST} expected")
        if not self.junk_threshold > 0:
            raise ConfigError(f"--junk-threshold {self.junk_threshold}: a positive number expected")
        if self.through is not None and len(self.through) < 2:
            raise ConfigError(f"--through {self.through}: at least 2 clusters expected")


def analyze_run(run: Path, settings: AnalysisSettings | None = None) -> dict[str, Any]:
    """Analyse RUN/latent.parquet and write RUN/analysis, whole or not at all.

    Written are particles.parquet (particle_id, cluster, junk_score, junk, norm_score, loss_score,
    evidence_score, pc_1 …, umap_1, umap_2), centers.csv and centers.parquet, traversal_pc1.csv …,
    traversal_direct.csv, traversal_graph.csv and analysis.json. Points of a path outside the region of
    particles are listed in analysis.json and said in the log.

    Parameters
    ----------
    run
        A folder that `train` wrote.
    settings
        What to compute; the defaults when None.

    Returns
    -------
    summary
        The content of analysis.json.

    Raises
    ------
    InputFormatError
        If the latent table is missing or damaged.
    ConfigError
        If a cluster to pass through does not exist.
    """
    settings = settings or AnalysisSettings()
    run = Path(run)
    latents = read_latents(run)
    log.info("%d particles, %d latent dimensions", len(latents), latents.z.shape[1])
    components = principal_components(latents.z)
    fitted = well_fitted_rows(latents)
    groups = None if settings.clusters else distinct_groups(latents.z, fitted, settings.seed, std=latents.std)
    if groups is None:
        centers, labels, rows = kmeans_centers(latents.z, settings.clusters or PARTS, settings.seed)
    else:
        centers, labels, rows = labelled_centers(latents.z, groups)
        log.info("the particles fall into %d distinct groups", len(centers))
    region = latent_region(latents.z[fitted], settings.seed)
    through = _through(settings.through, centers, region)
    junk = junk_scores(latents.z, latents.loss, settings.junk_threshold, log_evidence=latents.log_evidence)
    umap = _umap(latents, settings)
    paths = _paths(latents, components, region, rows, through, settings)
    summary = {
        "tool": "cryodrgn-pipeline",
        "version": __version__,
        "settings": asdict(settings),
        "n_particles": len(latents),
        "latent_dim": latents.z.shape[1],
        "explained_variance_ratio": [round(float(x), 6) for x in components.explained_variance_ratio],
        "pc_mean": components.mean.tolist(),
        "pc_components": components.components.tolist(),
        "n_clusters": len(centers),
        "distinct_groups": groups is not None,
        "n_junk": int(junk.flagged.sum()),
        "umap": umap is not None,
        "traversal_through": [int(label) for label in through],
        "traversals": sorted(paths),
        "outside_region": _outside(paths, region),
    }
    with replacing_directory(run / "analysis") as folder:
        keep_foreign_files(run / "analysis", folder, OURS)
        particles = _particle_columns(latents, labels, junk, components, umap)
        write_columns(folder / "particles.parquet", particles)
        write_columns(folder / "centers.parquet", _center_columns(latents, region, labels, rows))
        write_z(folder / "centers.csv", centers)
        for name, path in paths.items():
            write_z(folder / f"traversal_{name}.csv", path)
        write_json(folder / "analysis.json", summary)
    log.info(
        "%d clusters, %d of %d particles flagged as possible junk (score above %g)",
        len(centers),
        summary["n_junk"],
        len(latents),
        settings.junk_threshold,
    )
    return summary


def _umap(latents: Latents, settings: AnalysisSettings) -> NDArray[np.float32] | None:
    if not settings.umap:
        return None
    if len(latents) >= UMAP_FEWEST:
        log.info(
            "UMAP of %d particles, on one core so that it repeats",
            min(len(latents), settings.umap_fit_at_most),
        )
    umap = umap_embedding(latents.z, settings.seed, settings.umap_fit_at_most)
    if umap is None:
        log.warning("no UMAP: %d particles (at least %d that differ are needed)", len(latents), UMAP_FEWEST)
    return umap


def _through(
    wanted: tuple[int, ...] | None, centers: NDArray[np.float32], region: LatentRegion
) -> tuple[int, ...]:
    """The clusters that the paths pass: those asked for, or the two farthest apart where particles are.

    It is the densest alone where there are no two.
    """
    if wanted is not None:
        unknown = [label for label in wanted if not 0 <= label < len(centers)]
        if unknown:
            raise ConfigError(f"--through: no cluster {unknown[0]}; there are 0 to {len(centers) - 1}")
        return wanted
    inside = np.flatnonzero(region.inside(centers))
    if len(inside) < 2:
        return (int(region.density(centers).argmax()),)
    distance = np.linalg.norm(centers[inside, None] - centers[None, inside], axis=2)
    first, last = np.unravel_index(int(distance.argmax()), distance.shape)
    return int(inside[first]), int(inside[last])


def _paths(
    latents: Latents,
    components: PrincipalComponents,
    region: LatentRegion,
    rows: NDArray[np.int64],
    through: tuple[int, ...],
    settings: AnalysisSettings,
) -> dict[str, NDArray[np.float32]]:
    paths = {}
    for pc in range(1, min(settings.pcs, len(components.components)) + 1):
        path = pc_traversal(components, pc, region, settings.points)
        paths[f"pc{pc}"] = snap(path, latents.z)[0] if settings.snap else path
    anchors = rows[list(through)]
    if len(anchors) > 1:
        paths["direct"] = direct_traversal(latents.z[anchors], settings.points)
        paths["graph"] = graph_traversal(latents.z, anchors, settings.points, settings.seed)[0]
    else:  # a path of one point, so that what follows finds its files
        paths["direct"] = paths["graph"] = latents.z[anchors]
    return paths


def _outside(paths: dict[str, NDArray[np.float32]], region: LatentRegion) -> dict[str, list[int]]:
    """Per path the points, from 0, at which no particles are."""
    outside = {}
    for name, path in sorted(paths.items()):
        rows = np.flatnonzero(~region.inside(path)).tolist()
        if rows:
            outside[name] = rows
            log.warning(
                "traversal_%s.csv: %d of %d points lie outside the region of particles",
                name,
                len(rows),
                len(path),
            )
    return outside


def _particle_columns(
    latents: Latents,
    labels: NDArray[np.int32],
    junk: JunkScores,
    components: PrincipalComponents,
    umap: NDArray[np.float32] | None,
) -> Columns:
    columns: Columns = {
        "particle_id": latents.particle_id,
        "cluster": labels,
        "junk_score": junk.score,
        "junk": junk.flagged,
        "norm_score": junk.norm_score,
    }
    if junk.loss_score is not None:
        columns["loss_score"] = junk.loss_score
    if junk.evidence_score is not None:
        columns["evidence_score"] = junk.evidence_score
    columns |= {f"pc_{k + 1}": scores for k, scores in enumerate(components.scores.T)}
    if umap is not None:
        columns |= {"umap_1": umap[:, 0], "umap_2": umap[:, 1]}
    return columns


def _center_columns(
    latents: Latents, region: LatentRegion, labels: NDArray[np.int32], rows: NDArray[np.int64]
) -> Columns:
    centers = latents.z[rows]
    columns: Columns = {
        "cluster": np.arange(len(rows), dtype=np.int32),
        "particle_id": latents.particle_id[rows],
        "n": np.bincount(labels, minlength=len(rows)).astype(np.int64),
    }
    columns |= {f"z_{j}": centers[:, j] for j in range(centers.shape[1])}
    return columns | {"inside": region.inside(centers), "latent_density": region.density(centers)}
