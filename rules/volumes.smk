def series_of(wildcards):
    """The volume series that a run asks for: cluster centres, components, paths."""
    given = settings("volumes", run_of(wildcards))
    drawn = settings("analyze", run_of(wildcards))["principal_components"]
    components = min(given["principal_components"], drawn)
    return [
        *(["centers"] if given["centers"] else []),
        *(f"pc{number}" for number in range(1, components + 1)),
        *(["direct"] if given["direct_path"] else []),
        *(["graph"] if given["graph_path"] else []),
    ]


def latent_points(wildcards, input):
    """The file of z that analyze wrote for a series, beside its summary."""
    series = wildcards.series
    name = "centers.csv" if series == "centers" else f"traversal_{series}.csv"
    return os.path.join(os.path.dirname(input.analysis), name)


def volumes_options(wildcards):
    flags = {
        "source": "--source",
        "box_size_px": "--box-size",
        "low_pass_a": "--low-pass-a",
        "flip_hand": "--flip-hand",
        "crop_px": "--crop-px",
        "device": "--device",
    }
    return options(settings("volumes", run_of(wildcards)), flags)


rule decode_volumes:
    input:
        model="<results>/{dataset}/{subset}/{run}/model.safetensors",
        analysis="<results>/{dataset}/{subset}/{run}/analysis/analysis.json",
    output:
        table="<results>/{dataset}/{subset}/{run}/volumes/{series}/volumes.parquet",
    log:
        "<logs>/{dataset}/{subset}/{run}/volumes_{series}.log",
    benchmark:
        "<benchmarks>/{dataset}/{subset}/{run}/volumes_{series}.tsv"
    conda:
        "../workflows/envs/cryodrgn-pipeline.yaml"
    threads: threads_for("volumes")
    resources:
        mem_mb=mem_mb_for("volumes"),
        runtime=runtime_for("volumes"),
        gpu=gpus_for("volumes"),
    params:
        run=subpath(input.model, parent=True),
        folder=subpath(output.table, parent=True),
        z=latent_points,
        options=volumes_options,
    message:
        "{wildcards.dataset}/{wildcards.subset}/{wildcards.run}: decoding volumes ({wildcards.series})"
    shell:
        "cryodrgn-pipeline volumes {params.run:q} --z {params.z:q} {params.options:q}"
        " --threads {threads} -o {params.folder:q} &> {log:q}"
