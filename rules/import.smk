def import_files(wildcards):
    dataset = dataset_of(wildcards)
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


rule import_particles:
    input:
        particles=import_files,
        passthrough=passthrough_files,
    output:
        particles="<results>/{dataset}/import/particles.parquet",
        manifest="<results>/{dataset}/import/import.json",
    log:
        "<logs>/{dataset}/import.log",
    benchmark:
        "<benchmarks>/{dataset}/import.tsv"
    conda:
        "../workflows/envs/cryodrgn-pipeline.yaml"
    threads: threads_for("import")
    resources:
        mem_mb=mem_mb_for("import"),
        runtime=runtime_for("import"),
    params:
        folder=subpath(output.particles, parent=True),
        passthrough=passthrough_options,
        options=import_options,
    message:
        "{wildcards.dataset}: reading the poses and CTFs of {input.particles}"
    shell:
        "cryodrgn-pipeline import {input.particles:q} {params.passthrough:q} {params.options:q}"
        " -o {params.folder:q} &> {log:q}"
