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
        disk_mb=disk_mb_for("analyze"),
        gpu=gpus_for("analyze"),
    params:
        run=subpath(input.latent, parent=True),
        options=analyze_options,
    message:
        "{wildcards.dataset}/{wildcards.subset}/{wildcards.run}: analysing the latent space"
    shell:
        "cryodrgn-pipeline analyze {params.run:q} {params.options:q} &> {log:q}"
