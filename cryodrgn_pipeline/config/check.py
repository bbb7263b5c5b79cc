"""Read a config.yaml and name every mistake in it at once: line, key, what was expected, the cure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cryodrgn_pipeline.config.models import CRYOSPARC_PATTERN, Config, Dataset, Subset
from cryodrgn_pipeline.config.schema import json_schema
from cryodrgn_pipeline.errors import ConfigError

Location = tuple[str | int, ...]
Problem = tuple[Location, str]

RESERVED_SUBSET = re.compile(r"import|cryosparc|(stack|consensus)_\d+")


def load_config(path: Path) -> Config:
    """Read and check a config.yaml.

    Parameters
    ----------
    path
        The YAML file.

    Raises
    ------
    ConfigError
        The file cannot be read, is not YAML, or holds mistakes: all of them are named, with their lines.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); `cryodrgn-pipeline init -o {path}` writes one"
        ) from error
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(tree, yaml.MappingNode):
        raise ConfigError(f"{path}: expected keys such as `datasets:` at the top, found {_shown(content)}")

    problems = list(_duplicate_keys(tree, ()))
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        problems += _explained(error, content)
    else:
        problems += _contradictions(config)
        if not problems:
            return config
    lines = sorted((_line(tree, location), _spoken(location), text) for location, text in problems)
    listed = "\n".join(f"  line {line}, {key}: {text}" for line, key, text in lines)
    raise ConfigError(f"{path}: {len(lines)} problem{'s' if len(lines) > 1 else ''} to mend\n{listed}")


def missing_files(config: Config, directory: Path) -> list[str]:
    """Say which of the user's files that `config` names do not exist; paths are relative to `directory`."""
    missing = []
    for name, dataset in config.datasets.items():
        named = [
            ("particles", dataset.particles),
            ("cryosparc.project_folder", dataset.cryosparc.project_folder),
            ("reference", dataset.reference),
            ("mask", dataset.mask),
            ("datadir", dataset.datadir),
        ]
        named += [("passthrough", path) for path in dataset.passthrough]
        named += [(f"subsets.{key}.ids", subset.ids) for key, subset in dataset.subsets.items()]
        for key, path in named:
            if path is not None and not (directory / path).exists():
                missing.append(f"datasets.{name}.{key}: no {path} in {directory.resolve()}")
    return missing


def _explained(error: ValidationError, content: Any) -> Iterator[Problem]:
    """Put pydantic's findings into the user's words, one for each place."""
    expected: dict[Location, list[str]] = {}
    found: dict[Location, Any] = {}
    for detail in error.errors():
        location = _within(content, detail["loc"])
        if detail["type"] == "extra_forbidden":
            yield location, f"unknown key{_suggestion(location)}"
        elif detail["type"] == "missing":
            yield location, "missing; it has no default"
        elif detail["type"] == "string_pattern_mismatch" and detail["ctx"]["pattern"] == CRYOSPARC_PATTERN:
            yield location, f"expected cryoSPARC's name, such as P3, W1 or J42, found {detail['input']!r}"
        elif detail["type"] == "string_pattern_mismatch":
            yield location, f"{detail['input']!r} cannot be a name: use letters, digits, '_', '-' and '.'"
        else:
            words = (
                detail["msg"].removeprefix("Input should be ").replace("a valid integer", "a whole number")
            )
            expected.setdefault(location, []).append(words.replace("a valid ", "a "))
            found[location] = detail["input"]
    for location, choices in expected.items():
        value = found[location]
        yield location, f"expected {' or '.join(choices)}, found {_shown(value)}{_cure(value)}"


def _within(content: Any, location: Location) -> Location:
    """Cut off what pydantic adds to a location: the branch of a union, the mark of a key."""
    for depth, part in enumerate(location):
        if isinstance(content, dict) and part != "[key]":
            content = content.get(part)
        elif isinstance(content, list) and isinstance(part, int) and part < len(content):
            content = content[part]
        else:
            return location[:depth]
    return location


def _cure(found: Any) -> str:
    if isinstance(found, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", found):
        mantissa, exponent = re.split("[eE]", found)
        return f"; YAML takes this for text, write {float(mantissa)}e{int(exponent):+d}"
    return "; leave the line out to take the default" if found is None else ""


def _suggestion(location: Location) -> str:
    """Name the key that was probably meant, or all that the section at `location` knows."""
    section = json_schema()
    for part in location[:-1]:
        named = list(section.get("patternProperties", {}).values())
        section = named[0] if named else section.get("properties", {}).get(part, {})
    known = list(section.get("properties", {}))
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known here: {', '.join(known)}" if known else ""


def _contradictions(config: Config) -> Iterator[Problem]:
    """Yield what every key alone cannot show: names that point nowhere, choices that exclude each other."""
    for name, dataset in config.datasets.items():
        here: Location = ("datasets", name)
        for within, problem in _source_problems(dataset):
            yield (*here, *within), problem
        for key, subset in dataset.subsets.items():
            for problem in _subset_problems(dataset, key, subset):
                yield (*here, "subsets", key), problem
        for key, run in dataset.runs.items():
            for subset_name in run.subsets:
                if subset_name != "all" and subset_name not in dataset.subsets:
                    known = ", ".join(["all", *dataset.subsets])
                    yield (*here, "runs", key, "subsets"), f"no subset {subset_name}; there are: {known}"


def _source_problems(dataset: Dataset) -> Iterator[tuple[Location, str]]:
    source, target = dataset.cryosparc, dataset.push
    if (source.project is None) != (source.job is None):
        yield ("cryosparc",), "give both, project and job"
    if (dataset.particles is None) == (source.job is None):
        yield (), "give either particles (a file) or cryosparc (project and job), and not both"
    if source.job is not None and (dataset.passthrough or dataset.datadir):
        yield ("cryosparc",), "passthrough and datadir belong to particles; a job knows its own"
    if target.workspace is not None and (target.job or source.job) is None:
        yield ("push",), "needs the project and the job that the particles are from"
    if (target.project is None) != (target.job is None):
        yield ("push",), "give both, project and job, or neither"
    known = ", ".join(dataset.subsets) or "none"
    for subset in target.subsets:
        if subset not in dataset.subsets:
            yield ("push", "subsets"), f"no subset {subset}; there are: {known}"


def _subset_problems(dataset: Dataset, name: str, subset: Subset) -> Iterator[str]:
    criteria = [subset.clusters, subset.ranges, subset.where, subset.without_junk]
    if name == "all" or RESERVED_SUBSET.fullmatch(name):
        yield "this name is taken by the workflow; choose another"
    if (subset.ids is None) == (subset.from_run is None):
        yield "give either ids (a file) or from_run (an earlier run), and not both"
    elif subset.ids is not None and (any(criteria) or subset.invert):
        yield "clusters, ranges, where, without_junk and invert belong to from_run, not to ids"
    elif subset.from_run is not None:
        if not any(criteria):
            yield "from_run needs a choice: clusters, ranges, where or without_junk"
        source = dataset.runs.get(subset.from_run)
        if source is None:
            yield f"from_run: no run {subset.from_run}; there are: {', '.join(dataset.runs)}"
        elif subset.from_subset not in source.subsets:
            made_on = ", ".join(source.subsets)
            yield f"from_subset: run {subset.from_run} is not made on {subset.from_subset} but on: {made_on}"
        elif _leads_back(dataset, name):
            yield "this subset is chosen from a run that is trained on itself"


def _leads_back(dataset: Dataset, name: str) -> bool:
    seen: set[str] = set()
    following: str | None = name
    while following in dataset.subsets and following not in seen:
        seen.add(following)
        source = dataset.subsets[following]
        following = source.from_subset if source.from_run is not None else None
    return following in seen


def _duplicate_keys(node: yaml.Node, location: Location) -> Iterator[Problem]:
    """Yield keys that stand twice in one mapping; YAML would silently keep the last."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield (*location, key.value), "stands here twice; only one can count"
            seen.add(key.value)
            yield from _duplicate_keys(value, (*location, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            yield from _duplicate_keys(value, (*location, position))


def _line(tree: yaml.Node, location: Location) -> int:
    """Find the line that holds `location`, or the nearest section above it."""
    node, line = tree, 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                return line
            key, node = found[-1]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _spoken(location: Location) -> str:
    return ".".join(str(part) for part in location) or "top level"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
