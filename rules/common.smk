# What the rules share: settings with their overrides, command-line options, folders, resources.
import os
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

# The command line that belongs to this Snakemake, also when its environment is not activated.
os.environ["PATH"] = os.pathsep.join(
    [str(Path(sys.executable).parent), os.environ["PATH"]]
)


def dataset_of(wildcards):
    return config["datasets"][wildcards.dataset]


def run_of(wildcards):
    return dataset_of(wildcards)["runs"][wildcards.run]


def settings(section, *overrides):
    """One section of the configuration, what a dataset or run says on top of it."""
    merged = dict(config[section])
    for override in overrides:
        merged.update(override.get(section, {}))
    return merged


def options(given, flags):
    """Command-line words for settings: `flags` maps a key to --flag, or to --yes/--no for a switch."""
    words = []
    for key, flag in flags.items():
        value = given[key]
        yes, _, no = flag.partition("/")
        if isinstance(value, bool):
            words += [yes] if value else [no] if no else []
        elif isinstance(value, (list, tuple)):
            words += [word for item in value for word in (yes, str(item))]
        elif value is not None:
            words += [yes, str(value)]
    return words


def box_size_px(wildcards):
    own = run_of(wildcards)["box_size_px"]
    return own or settings("preprocess", dataset_of(wildcards))["box_size_px"]


def stack_dir(wildcards):
    return f"<results>/{wildcards.dataset}/stack_{box_size_px(wildcards)}"


def consensus_dir(wildcards):
    return f"<results>/{wildcards.dataset}/consensus_{box_size_px(wildcards)}"


def run_dir(dataset, subset, run):
    return f"<results>/{dataset}/{subset}/{run}"


def trainings():
    """Every (dataset, subset, run) that the configuration asks for."""
    found = []
    for dataset, content in config["datasets"].items():
        for run, given in content["runs"].items():
            for subset in given["subsets"]:
                if subset != "all" and subset not in content["subsets"]:
                    raise WorkflowError(
                        f"datasets.{dataset}.runs.{run}.subsets: no subset {subset}; "
                        f"there are: {', '.join(['all', *content['subsets']])}"
                    )
                found.append((dataset, subset, run))
    if not found:
        raise WorkflowError(
            "The configuration names no dataset. `cryodrgn-pipeline init -o config.yaml --particles FILE` "
            "writes one, and `--configfile config.yaml` hands it over."
        )
    return found


def all_reports():
    return [f"{run_dir(*training)}/report.html" for training in trainings()]


def either(names):
    """A wildcard constraint that allows these names and nothing else."""
    return "|".join(sorted(re.escape(name) for name in names)) or "(?!)"


def threads_for(step):
    return config["resources"][step]["threads"]


def mem_mb_for(step):
    def mem_mb(wildcards, attempt):
        return config["resources"][step]["mem_mb"] * 2 ** (attempt - 1)

    return mem_mb


def runtime_for(step):
    def runtime(wildcards, attempt):
        return config["resources"][step]["runtime_min"] * 2 ** (attempt - 1)

    return runtime


def gpus_for(step):
    return config["resources"][step]["gpus"]


wildcard_constraints:
    dataset=either(config["datasets"]),
    subset=either({subset for _, subset, _ in trainings()}),
    run=either({run for _, _, run in trainings()}),
    box=r"\d+",
    series=r"centers|pc\d+|direct|graph",
