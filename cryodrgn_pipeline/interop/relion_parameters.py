"""The parameters of RELION's External job are keys of config.yaml, such as `train.epochs`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cryodrgn_pipeline.errors import ConfigError

DATASET, RUN, SUBSET = "particles", "vae", "subset"
OF_DATASET = ("class", "conventions", "datadir", "set")
OF_SUBSET = ("clusters", "invert", "ranges", "where", "without_junk")
LISTS = ("subset.clusters", "subset.ranges", "analyze.through")
TEXTS = ("subset.where", "datadir")
DEFAULTS: dict[str, Any] = {"volumes": {"source": "particles", "principal_components": 0}}
"""One map with half maps per cluster; paths between them are for `run`."""


def configuration(
    output: Path,
    particles: Path,
    reference: Path | None,
    mask: Path | None,
    parameters: Mapping[str, Sequence[str]],
) -> str:
    """The config.yaml of a job.

    Parameters
    ----------
    output
        The job's folder, where the workflow runs; the paths are relative to the working directory, the
        project folder.
    particles, reference, mask
        RELION's input nodes.
    parameters
        The words after each label, none for a bare one, which means yes.

    Raises
    ------
    ConfigError
        If a label is no key of config.yaml that can be said here.
    """
    import yaml

    def seen_from_job(path: Path) -> str:
        return os.path.relpath(path, output)

    dataset: dict[str, Any] = {"particles": seen_from_job(particles), "datadir": seen_from_job(Path())}
    dataset |= {"reference": seen_from_job(reference)} if reference else {}
    dataset |= {"mask": seen_from_job(mask)} if mask else {}
    dataset["runs"] = {RUN: {}}
    content: dict[str, Any] = {"datasets": {DATASET: dataset}}
    for section, settings in DEFAULTS.items():
        content[section] = dict(settings)
    for label, words in parameters.items():
        first, *rest = path = label.split(".")
        where = content
        if first == SUBSET and len(rest) == 1 and rest[0] in OF_SUBSET:
            where = dataset.setdefault("subsets", {}).setdefault(SUBSET, {"from_run": RUN})
            path = rest
        elif first in OF_DATASET:
            where = dataset
        elif first not in _sections() or not rest:
            raise ConfigError(f"--{label}: {_cure(label)}")
        _put(where, path, _value(label, words))
    head = "# Written for RELION by cryodrgn-pipeline-relion; the job's parameters are keys of this file.\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _sections() -> list[str]:
    from cryodrgn_pipeline.config.models import Config

    return [name for name in Config.model_fields if name not in ("datasets", "pathvars")]


def _cure(label: str) -> str:
    from cryodrgn_pipeline.config.models import Config

    last = label.rpartition(".")[2]
    near = [
        f"{name}.{last}" for name in _sections() if last in type(getattr(Config(), name)).model_fields
    ] + [f"{SUBSET}.{last}" for name in OF_SUBSET if name == last]
    if near:
        return f"write {' or '.join(near)}"
    return (
        f"no such parameter; parameters are keys of config.yaml in {', '.join(_sections())}, those of a "
        f"dataset ({', '.join(OF_DATASET)}), and {SUBSET}.{f', {SUBSET}.'.join(OF_SUBSET)}"
    )


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *parents, last = path
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--{'.'.join(path)}: {parent} is given a value of its own as well")
    tree[last] = value


def _value(label: str, words: Sequence[str]) -> Any:
    """What a value means: YAML, but a bare label is yes, and lists are separated by commas."""
    import yaml

    if not words:
        return True
    text = " ".join(words)
    if label in TEXTS:
        return text
    try:
        if label in LISTS:
            return [yaml.safe_load(part) for part in text.split(",")]
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{label} {text!r}: no value of config.yaml") from error
