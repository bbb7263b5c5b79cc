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


rule select_subset:
    input:
        latent=source_latent,
        analysis=source_analysis,
    output:
        ids="<results>/{dataset}/{subset}/ids.txt",
    log:
        "<logs>/{dataset}/{subset}/select.log",
    benchmark:
        "<benchmarks>/{dataset}/{subset}/select.tsv"
    conda:
        "../workflows/envs/cryodrgn-pipeline.yaml"
    threads: threads_for("subset")
    resources:
        mem_mb=mem_mb_for("subset"),
        runtime=runtime_for("subset"),
    params:
        run=subpath(input.latent, parent=True),
        options=select_options,
    message:
        "{wildcards.dataset}: choosing the particles of subset {wildcards.subset}"
    shell:
        "cryodrgn-pipeline select {params.run:q} {params.options:q} -o {output.ids:q} &> {log:q}"
