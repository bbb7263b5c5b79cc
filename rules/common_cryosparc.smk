# What the rules share about cryoSPARC: what was read of a job, and what is pushed.
def all_pushes():
    return [
        f"{run_dir(*training)}/cryosparc/pushed.json"
        for training in trainings()
        if config["datasets"][training[0]]["push"]["workspace"]
    ]


def fetched_datadir(wildcards, input):
    """The folder of the images, where a job of cryoSPARC was read."""
    if not dataset_of(wildcards)["cryosparc"]["job"]:
        return []
    return ["--datadir", os.path.join(os.path.dirname(input.particles[0]), "project")]


def fetched_summary(wildcards):
    """What was read from a job of cryoSPARC, if any."""
    if not dataset_of(wildcards)["cryosparc"]["job"]:
        return []
    return f"<results>/{wildcards.dataset}/cryosparc/cryosparc.json"


def fetched_maps(wildcards, input):
    """The job's map and mask, where the user names none."""
    dataset = dataset_of(wildcards)
    if not input.fetched:
        return []
    folder = os.path.dirname(input.fetched)
    return [
        word
        for key, own, file in (("volume", "reference", "map"), ("mask", "mask", "mask"))
        if dataset["cryosparc"][key] and not dataset[own]
        for word in (f"--{own}", os.path.join(folder, f"{file}.mrc"))
    ]


def cryosparc_environment():
    return f"../workflows/envs/cryosparc-{config['cryosparc']['tools']}.yaml"


def read_options(wildcards):
    flags = {
        "project": "--project",
        "job": "--job",
        "output": "--output-name",
        "volume": "--volume",
        "mask": "--mask",
        "project_folder": "--project-folder",
    }
    return options(dataset_of(wildcards)["cryosparc"], flags)


def push_target(wildcards):
    dataset = dataset_of(wildcards)
    given = {
        key: dataset["push"][key] or dataset["cryosparc"][key]
        for key in ("project", "job", "output")
    }
    flags = {
        "project": "--project",
        "workspace": "--workspace",
        "job": "--job",
        "output": "--output-name",
        "clusters": "--clusters/--no-clusters",
        "import_volumes": "--import-volumes/--no-import-volumes",
    }
    return options({**dataset["push"], **given}, flags)


def push_volumes(wildcards):
    wanted, made = dataset_of(wildcards)["push"]["volumes"], series_of(wildcards)
    if not set(wanted) <= set(made):
        raise WorkflowError(
            f"datasets.{wildcards.dataset}.push.volumes: {', '.join(wanted)}; run {wildcards.run} makes the "
            f"series {', '.join(made)}"
        )
    folder = run_dir(wildcards.dataset, wildcards.subset, wildcards.run)
    return [f"{folder}/volumes/{series}/volumes.parquet" for series in wanted]


def push_subsets(wildcards):
    """The id files of the subsets to push, in runs on all particles."""
    if wildcards.subset != "all":
        return []
    dataset = dataset_of(wildcards)
    return [
        (
            local(dataset["subsets"][name]["ids"])
            if dataset["subsets"][name]["ids"]
            else f"<results>/{wildcards.dataset}/{name}/ids.txt"
        )
        for name in dataset["push"]["subsets"]
    ]


def push_subset_options(wildcards, input):
    names = dataset_of(wildcards)["push"]["subsets"]
    return [
        word
        for name, file in zip(names, input.subsets)
        for word in ("--subset", f"{name}={file}")
    ]
