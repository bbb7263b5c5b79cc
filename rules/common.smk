# What the rules share: settings with their overrides, command-line options, folders, resources.
import os
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

try:
    from cryodrgn_pipeline.config.models import Config
except ModuleNotFoundError:
    # Snakemake of another environment: the package lies beside the rules
    rules_folder = Path(str(workflow.current_basedir))
    sys.path += [str(rules_folder.parent), str(rules_folder.parents[2])]
    from cryodrgn_pipeline.config.models import Config
from cryodrgn_pipeline.planning.jobs import Plan

# The command line that belongs to this Snakemake, also when its environment is not activated.
os.environ.update(
    PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])
)


plan = Plan(Config.model_validate(config), Path(workflow.pathvars.apply("<results>")))


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


def all_exports():
    """The particle files of the named subsets, where they are wanted."""
    return [
        f"<results>/{dataset}/{subset}/particles.{kind}"
        for dataset, content in config["datasets"].items()
        for subset in content["subsets"]
        for kind in content["export"]
    ]


def all_reports():
    return [f"{run_dir(*training)}/report.html" for training in trainings()]


def either(names):
    """A wildcard constraint that allows these names and nothing else."""
    return "|".join(sorted(re.escape(name) for name in names)) or "(?!)"


def threads_for(step):
    return config["resources"][step]["threads"]


def gpus_for(step):
    return config["resources"][step].get("gpus", 0)


def asked(task, wildcards, attempt=1):
    """What a job asks for, from particles, box and settings; what `resources` says in numbers counts."""
    return plan.job(task, dict(wildcards.items()), attempt)


def mem_mb_for(task):
    def mem_mb(wildcards, attempt):
        return asked(task, wildcards, attempt).mem_mb

    return mem_mb


def runtime_for(task):
    def runtime(wildcards, attempt):
        return asked(task, wildcards, attempt).runtime_min

    return runtime


def disk_mb_for(task):
    def disk_mb(wildcards):
        return asked(task, wildcards).disk_mb

    return disk_mb


def nodes_for(step):
    """GPUs on one node, or on each of several; there srun starts one task a node."""
    nodes, gpus = (config["resources"][step].get(key) for key in ("nodes", "gpus"))
    if nodes == 1:
        one_node = {"nodes": 1} if (gpus or 0) > 1 else {}
        return one_node | ({} if gpus is None else {"gpu": gpus})
    several = {"mpi": "srun", "nodes": nodes, "tasks": nodes, "tasks_per_gpu": -1}
    return several | ({"gres": f"gpu:{gpus}"} if gpus else {})


def srun(wildcards, threads, resources):
    """What starts the command on each of several nodes, for one node nothing."""
    nodes = resources.get("nodes") or 1
    if nodes == 1:
        return ""
    step = f"srun --nodes {nodes} --ntasks {nodes} --cpus-per-task {threads}"
    return f"{step} --mem 0 --kill-on-bad-exit "  # all memory of the job; a lost node ends it


def together(step):
    """Options that make one of the processes on all nodes; their number is no reason to do it again."""

    def words(wildcards, resources):
        given = config["resources"][step]
        # only training has work for several GPUs of a node
        processes = given["gpus"] if step == "train" else 1
        asked = (("--processes", processes), ("--nodes", given["nodes"]))
        return [
            word for flag, number in asked if number > 1 for word in (flag, str(number))
        ]

    return words


# ── Import ──


def import_files(wildcards):
    dataset = dataset_of(wildcards)
    if dataset["cryosparc"]["job"]:
        return [f"<results>/{wildcards.dataset}/cryosparc/particles.cs"]
    if not dataset["particles"]:
        raise WorkflowError(
            f"datasets.{wildcards.dataset}: needs particles (a file) or cryosparc (project and job)"
        )
    return [local(dataset["particles"])]


def passthrough_files(wildcards):
    return [local(path) for path in dataset_of(wildcards)["passthrough"]]


def passthrough_options(wildcards):
    return options(dataset_of(wildcards), {"passthrough": "--passthrough"})


def import_options(wildcards):
    dataset = dataset_of(wildcards)
    columns = [f"{key}={value}" for key, value in dataset["set"].items()]
    conventions = {
        "transpose_rotations": "--transpose-rotations",
        "negate_shifts": "--negate-shifts",
        "mirror_hand": "--mirror-hand",
        "shift_scale": "--shift-scale",
    }
    return [
        *options(dataset, {"datadir": "--datadir", "class": "--class"}),
        *options({"set": columns}, {"set": "--set"}),
        *options(dataset["conventions"], conventions),
    ]


# ── Preprocess and consensus ──


def preprocess_options(wildcards):
    given = settings("preprocess", dataset_of(wildcards))
    flags = {
        "window": "--window/--no-window",
        "window_inner": "--window-inner",
        "window_outer": "--window-outer",
        "mask_radius_a": "--mask-radius-a",
        "dtype": "--dtype",
    }
    return options(given, flags)


def own_maps(wildcards):
    """The user's consensus map and mask, if any."""
    dataset = dataset_of(wildcards)
    return [local(dataset[key]) for key in ("reference", "mask") if dataset[key]]


def consensus_options(wildcards):
    given = settings("consensus", dataset_of(wildcards))
    check = given["check"] or "off"  # YAML reads a bare `off` as false
    named = options(
        dataset_of(wildcards), {"reference": "--reference", "mask": "--mask"}
    )
    return ["--check", check, *options(given, {"seed": "--seed"}), *named]


# ── Subsets ──


def subset_of(wildcards):
    return dataset_of(wildcards)["subsets"][wildcards.subset]


def source_run(wildcards):
    """The run, on its own subset, whose analysis a derived subset is chosen from."""
    subset = subset_of(wildcards)
    if not subset["from_run"]:
        raise WorkflowError(
            f"datasets.{wildcards.dataset}.subsets.{wildcards.subset}: needs ids or from_run"
        )
    return run_dir(wildcards.dataset, subset["from_subset"], subset["from_run"])


def source_analysis(wildcards):
    return f"{source_run(wildcards)}/analysis/particles.parquet"


def source_latent(wildcards):
    return f"{source_run(wildcards)}/latent.parquet"


def select_options(wildcards):
    subset = subset_of(wildcards)
    clusters = ",".join(str(cluster) for cluster in subset["clusters"])
    flags = {"ranges": "--range", "where": "--where", "without_junk": "--no-junk"}
    return [
        *(["--cluster", clusters] if clusters else []),
        *options(subset, flags | {"invert": "--invert"}),
    ]


def id_file(wildcards):
    """The id file that a training is restricted to; none for all particles."""
    if wildcards.subset == "all":
        return []
    listed = subset_of(wildcards)["ids"]
    return (
        local(listed)
        if listed
        else f"<results>/{wildcards.dataset}/{wildcards.subset}/ids.txt"
    )


# ── Training ──


def training_stack(wildcards):
    return f"{stack_dir(wildcards)}/stack.json"


def checked_consensus(wildcards):
    return f"{consensus_dir(wildcards)}/consensus.json"


def subset_option(wildcards):
    return [] if wildcards.subset == "all" else ["--subset"]


def train_options(wildcards):
    flags = {
        "method": "--method",
        "encoder": "--encoder",
        "decoder": "--decoder",
        "latent_dim": "--latent-dim",
        "learn_from": "--learn-from",
        "epochs": "--epochs",
        "batch_size": "--batch-size",
        "learning_rate": "--learning-rate",
        "beta": "--beta",
        "loss": "--loss",
        "encoder_layers": "--encoder-layers",
        "encoder_width": "--encoder-width",
        "encoder_type": "--encoder-type",
        "decoder_layers": "--decoder-layers",
        "decoder_width": "--decoder-width",
        "decoder_type": "--decoder-type",
        "positional_encoding": "--positional-encoding",
        "domain": "--domain",
        "mask_radius": "--mask-radius",
        "encoder_mask_radius": "--encoder-mask-radius",
        "encoder_input": "--encoder-input",
        "encoder_filter": "--encoder-filter",
        "coordinate_fraction": "--coordinate-fraction",
        "frequency_marching": "--frequency-marching",
        "held_out_fraction": "--held-out-fraction",
        "checkpoint_every_epochs": "--checkpoint-every-epochs",
        "checkpoint_every_minutes": "--checkpoint-every-minutes",
        "seed": "--seed",
        "device": "--device",
        "in_memory": "--in-memory/--lazy",
        "amp": "--amp/--no-amp",
    }
    return options(settings("train", run_of(wildcards)), flags)


# ── Analysis ──


def analyze_options(wildcards):
    given = settings("analyze", run_of(wildcards))
    through = ",".join(str(cluster) for cluster in given["through"])
    flags = {
        "clusters": "--clusters",
        "principal_components": "--pcs",
        "traversal_points": "--points",
        "snap": "--snap/--no-snap",
        "umap": "--umap/--no-umap",
        "umap_max_particles": "--umap-max",
        "junk_threshold": "--junk-threshold",
        "seed": "--seed",
    }
    return [*options(given, flags), *(["--through", through] if through else [])]


# ── Volumes ──


def series_of(wildcards):
    """The volume series that a run asks for: cluster centres, components, paths."""
    return plan.series(wildcards.dataset, wildcards.run)


def latent_points(wildcards, input):
    """The file of z that analyze wrote for a series, beside its summary."""
    series = wildcards.series
    name = "centers.csv" if series == "centers" else f"traversal_{series}.csv"
    return os.path.join(os.path.dirname(input.analysis), name)


def volumes_stack(wildcards):
    """The stack, where volumes are made from its images."""
    source = settings("volumes", run_of(wildcards))["source"]
    return training_stack(wildcards) if source == "particles" else []


def volumes_stack_option(wildcards, input):
    return ["--stack", os.path.dirname(input.stack)] if input.stack else []


def volumes_options(wildcards):
    flags = {
        "source": "--source",
        "independent_halves": "--independent-halves",
        "memory_gb": "--memory-gb",
        "box_size_px": "--box-size",
        "low_pass_a": "--low-pass-a",
        "flip_hand": "--flip-hand",
        "crop_px": "--crop-px",
        "device": "--device",
    }
    return options(settings("volumes", run_of(wildcards)), flags)


# ── Report ──


def volume_tables(wildcards):
    folder = run_dir(wildcards.dataset, wildcards.subset, wildcards.run)
    return [
        f"{folder}/volumes/{series}/volumes.parquet" for series in series_of(wildcards)
    ]


def volume_options(wildcards, input):
    folders = [os.path.dirname(table) for table in input.volumes]
    return [word for folder in folders for word in ("--volumes", folder)]


def import_manifest(wildcards):
    return f"<results>/{wildcards.dataset}/import/import.json"


wildcard_constraints:
    dataset=either(config["datasets"]),
    subset=either(
        {
            "all",
            *(
                name
                for content in config["datasets"].values()
                for name in content["subsets"]
            ),
        }
    ),
    run=either({run for _, _, run in trainings()}),
    box=r"\d+",
    series=r"centers|pc\d+|direct|graph",
    kind="star|cs",
