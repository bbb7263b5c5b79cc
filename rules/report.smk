rule write_report:
    input:
        manifest="<results>/{dataset}/{subset}/{run}/run.json",
        metrics="<results>/{dataset}/{subset}/{run}/metrics.jsonl",
        latent="<results>/{dataset}/{subset}/{run}/latent.parquet",
        analysis="<results>/{dataset}/{subset}/{run}/analysis/analysis.json",
        source=import_manifest,
        stack=training_stack,
        consensus=checked_consensus,
        volumes=volume_tables,
    output:
        html=report(
            "<results>/{dataset}/{subset}/{run}/report.html",
            caption="../workflows/report/run.rst",
            category="{dataset}",
            subcategory="{subset}",
            labels={"run": "{run}", "page": "report"},
        ),
        figures=report(
            directory("<results>/{dataset}/{subset}/{run}/report"),
            patterns=["{figure}.png"],
            caption="../workflows/report/figure.rst",
            category="{dataset}",
            subcategory="{subset}",
            labels={"run": "{run}", "page": "{figure}"},
        ),
    log:
        "<logs>/{dataset}/{subset}/{run}/report.log",
    benchmark:
        "<benchmarks>/{dataset}/{subset}/{run}/report.tsv"
    conda:
        "../workflows/envs/cryodrgn-pipeline.yaml"
    threads: threads_for("report")
    resources:
        mem_mb=mem_mb_for("report"),
        runtime=runtime_for("report"),
        disk_mb=disk_mb_for("report"),
        gpu=gpus_for("report"),
    params:
        run=subpath(input.manifest, parent=True),
        source=subpath(input.source, parent=True),
        stack=subpath(input.stack, parent=True),
        consensus=subpath(input.consensus, parent=True),
        volumes=volume_options,
        title="{dataset} · {subset} · {run}",
    message:
        "{wildcards.dataset}/{wildcards.subset}/{wildcards.run}: writing the report"
    shell:
        "cryodrgn-pipeline report {params.run:q} --consensus {params.consensus:q} {params.volumes:q}"
        " --import-dir {params.source:q} --stack {params.stack:q} --title {params.title:q} &> {log:q}"
