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


rule analyze_latent:
    input:
        latent="<results>/{dataset}/{subset}/{run}/latent.parquet",
    output:
        particles="<results>/{dataset}/{subset}/{run}/analysis/particles.parquet",
        centers="<results>/{dataset}/{subset}/{run}/analysis/centers.csv",
        summary="<results>/{dataset}/{subset}/{run}/analysis/analysis.json",
    log:
        "<logs>/{dataset}/{subset}/{run}/analyze.log",
    benchmark:
        "<benchmarks>/{dataset}/{subset}/{run}/analyze.tsv"
    conda:
        "../workflows/envs/cryodrgn-pipeline.yaml"
    threads: threads_for("analyze")
    resources:
        mem_mb=mem_mb_for("analyze"),
        runtime=runtime_for("analyze"),
    params:
        run=subpath(input.latent, parent=True),
        options=analyze_options,
    message:
        "{wildcards.dataset}/{wildcards.subset}/{wildcards.run}: analysing the latent space"
    shell:
        "cryodrgn-pipeline analyze {params.run:q} {params.options:q} &> {log:q}"
