"""The jobs that a configuration gives, and what each of them asks for.

Expected needs get margins here: a job that asks for too little dies and starts again with twice as much, one
that asks for too much waits in the queue. What `resources:` says in numbers counts as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cryodrgn_pipeline.config.models import (
    Analyze,
    Config,
    Dataset,
    Preprocess,
    Run,
    Section,
    StepResources,
    Train,
    Volumes,
)
from cryodrgn_pipeline.planning import needs
from cryodrgn_pipeline.planning.needs import Needs
from cryodrgn_pipeline.planning.sources import SourceSize, ids_in, source_size

MEMORY_MARGIN, MEMORY_ROOM_BYTES = (
    1.25,
    500e6,
)  # beside anonymous memory: mapped libraries, the log, the shell
TIME_MARGIN, LEAST_MINUTES = 3.0, 15  # clusters differ more in speed than in memory
DISK_MARGIN, DISK_ROOM_BYTES = 1.1, 10e6
MEMORY_STEP_MB, MINUTES_STEP = 100, 5

RULES = {
    "fetch": "read_cryosparc",
    "import": "import_particles",
    "preprocess": "preprocess_images",
    "consensus": "reconstruct_consensus",
    "select": "select_subset",
    "export": "export_particles",
    "train": "train_model",
    "analyze": "analyze_latent",
    "volumes": "decode_volumes",
    "report": "write_report",
    "push": "push_cryosparc",
}
"""The workflow's rules, by the task of their jobs, in the order in which they come."""

SECTIONS = {"select": "subset", "export": "subset", "fetch": "cryosparc", "push": "cryosparc"}
"""Keys of `resources` that are not called as their tasks."""

Settings = TypeVar("Settings", bound=Section)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job: its task, the wildcards of its rule, what is expected of it, and what it asks for (MB of 10⁶
    bytes; threads and GPUs on each node).
    """

    task: str
    wildcards: dict[str, str]
    expected: Needs
    threads: int
    mem_mb: int
    runtime_min: int
    disk_mb: int
    gpus: int
    nodes: int

    @property
    def rule(self) -> str:
        """The rule of the workflow that it is a job of."""
        return RULES[self.task]


class Plan:
    """All jobs of a configuration.

    Parameters
    ----------
    config
        The checked configuration.
    results
        Folder of the workflow's results.
    directory
        Folder that the user's relative paths start at.
    """

    def __init__(self, config: Config, results: Path, directory: Path = Path()) -> None:
        self.config, self.results, self.directory = config, results, directory

    def jobs(self) -> list[Job]:
        """One entry per job of a run from the start, rule by rule."""
        asked = [(task, wildcards) for name in self.config.datasets for task, wildcards in self._asked(name)]
        order = list(RULES)
        asked.sort(key=lambda one: order.index(one[0]))
        return [self.job(task, wildcards) for task, wildcards in asked]

    def job(self, task: str, wildcards: Mapping[str, str], attempt: int = 1) -> Job:
        """What a job asks for; memory and time double with each attempt.

        Parameters
        ----------
        task
            A key of `RULES`.
        wildcards
            Those of the rule: dataset, subset, run, box, series, kind.
        """
        given = self.resources(task)
        expected = self.needs(task, **wildcards)
        grown: int = 2 ** (attempt - 1)
        mem_mb = given.mem_mb if given.mem_mb != "auto" else _memory_mb(expected)
        runtime_min = given.runtime_min if given.runtime_min != "auto" else _minutes(expected)
        return Job(
            task=task,
            wildcards=dict(wildcards),
            expected=expected,
            threads=given.threads,
            mem_mb=mem_mb * grown,
            runtime_min=runtime_min * grown,
            disk_mb=given.disk_mb if given.disk_mb != "auto" else _disk_mb(expected),
            gpus=getattr(given, "gpus", 0),
            nodes=getattr(given, "nodes", 1),
        )

    def resources(self, task: str) -> StepResources:
        """What the configuration says about the jobs of a task."""
        fields = type(self.config.resources).model_fields
        section = SECTIONS.get(task, task)
        name = next(name for name, field in fields.items() if section in (name, field.alias))
        found: StepResources = getattr(self.config.resources, name)
        return found

    def needs(
        self, task: str, *, dataset: str, subset: str = "all", run: str = "", box: str = "", **more: str
    ) -> Needs:
        """What is expected of a job."""
        of = self.config.datasets[dataset]
        source = self.source(dataset)
        n, asked = source.particles, self.resources(task)
        gpus = getattr(asked, "gpus", 0)
        if task == "fetch":
            return needs.fetch_needs(n)
        if task == "import":
            return needs.import_needs(n)
        if task == "preprocess":
            given = self._preprocess(of)
            return needs.preprocess_needs(n, source.box_size_px, int(box), given, asked.threads)
        if task == "consensus":
            check = _settled(self.config.consensus, of.consensus)
            return needs.consensus_needs(n, int(box), check, asked.threads)
        if task == "select":
            return needs.select_needs(self.particles(dataset, of.subsets[subset].from_subset))
        if task == "export":
            return needs.export_needs(n, self.particles(dataset, subset))
        chosen = self.particles(dataset, subset)
        train, analyze = self._train(of.runs[run]), self._analyze(of.runs[run])
        box_size_px = self.box_size_px(dataset, run)
        if task == "train":
            nodes = getattr(asked, "nodes", 1)
            return needs.train_needs(
                chosen, box_size_px, train, threads=asked.threads, gpus=gpus, nodes=nodes
            )
        if task == "analyze":
            return needs.analyze_needs(chosen, train.latent_dim, analyze)
        if task == "volumes":
            points = needs.points_of(more["series"], analyze)
            volumes = _settled(self.config.volumes, of.runs[run].volumes)
            return needs.volumes_needs(chosen, box_size_px, points, train, volumes, asked.threads, gpus)
        if task == "report":
            return needs.report_needs(chosen, train.latent_dim)
        return needs.push_needs(chosen, train.latent_dim)

    def source(self, dataset: str) -> SourceSize:
        """How many particles a dataset has, and of what box."""
        return source_size(dataset, self.config.datasets[dataset], self.results, self.directory)

    def particles(self, dataset: str, subset: str) -> int:
        """How many particles a subset has; all that it is chosen from where that is not known yet."""
        whole = self.source(dataset).particles
        if subset == "all":
            return whole
        given = self.config.datasets[dataset].subsets[subset]
        if given.ids is not None:
            listed = ids_in(self.directory / given.ids)
            return whole if listed is None else min(listed, whole)
        chosen = ids_in(self.results / dataset / subset / "ids.txt")
        return self.particles(dataset, given.from_subset) if chosen is None else min(chosen, whole)

    def box_size_px(self, dataset: str, run: str) -> int:
        """The box of the stack that a run is trained on."""
        of = self.config.datasets[dataset]
        return of.runs[run].box_size_px or self._preprocess(of).box_size_px

    def series(self, dataset: str, run: str) -> list[str]:
        """The volume series that a run asks for: cluster centres, components, paths."""
        of = self.config.datasets[dataset].runs[run]
        given: Volumes = _settled(self.config.volumes, of.volumes)
        components = min(
            given.principal_components,
            self._analyze(of).principal_components,
            self._train(of).latent_dim,
        )
        return [
            *(["centers"] if given.centers else []),
            *(f"pc{number}" for number in range(1, components + 1)),
            *(["direct"] if given.direct_path else []),
            *(["graph"] if given.graph_path else []),
        ]

    def _asked(self, dataset: str) -> Iterator[tuple[str, dict[str, str]]]:
        """The tasks of a dataset, with the wildcards of each job."""
        of, here = self.config.datasets[dataset], {"dataset": dataset}
        if of.cryosparc.job is not None:
            yield "fetch", here
        yield "import", here
        for box in sorted({self.box_size_px(dataset, run) for run in of.runs}):
            yield "preprocess", here | {"box": str(box)}
            yield "consensus", here | {"box": str(box)}
        for subset in sorted(self._chosen(of)):
            yield "select", here | {"subset": subset}
        for subset in of.subsets:
            for kind in of.export:
                yield "export", here | {"subset": subset, "kind": kind}
        for subset, run in sorted(self._trained(of)):
            one = here | {"subset": subset, "run": run}
            yield "train", one
            yield "analyze", one
            for series in self.series(dataset, run):
                yield "volumes", one | {"series": series}
            yield "report", one
            if of.push.workspace is not None:
                yield "push", one

    def _trained(self, of: Dataset) -> set[tuple[str, str]]:
        return {(subset, name) for name, run in of.runs.items() for subset in run.subsets}

    def _chosen(self, of: Dataset) -> set[str]:
        """Subsets that are chosen from a run and that something is made of."""
        used = {subset for subset, _ in self._trained(of)}
        if of.export:
            used |= set(of.subsets)
        if of.push.workspace is not None and "all" in used:
            used |= set(of.push.subsets)
        return {name for name in used & set(of.subsets) if of.subsets[name].from_run is not None}

    def _preprocess(self, of: Dataset) -> Preprocess:
        return _settled(self.config.preprocess, of.preprocess)

    def _train(self, of: Run) -> Train:
        return _settled(self.config.train, of.train)

    def _analyze(self, of: Run) -> Analyze:
        return _settled(self.config.analyze, of.analyze)


def _settled(section: Settings, override: Settings) -> Settings:
    """A section, with what a dataset or run says on top of it."""
    return section.model_copy(update={name: getattr(override, name) for name in override.model_fields_set})


def _memory_mb(expected: Needs) -> int:
    wanted = MEMORY_MARGIN * expected.memory_bytes + MEMORY_ROOM_BYTES
    return math.ceil(wanted / 1e6 / MEMORY_STEP_MB) * MEMORY_STEP_MB


def _minutes(expected: Needs) -> int:
    wanted = TIME_MARGIN * expected.seconds / 60
    return max(LEAST_MINUTES, math.ceil(wanted / MINUTES_STEP) * MINUTES_STEP)


def _disk_mb(expected: Needs) -> int:
    return math.ceil((DISK_MARGIN * expected.disk_bytes + DISK_ROOM_BYTES) / 1e6)
