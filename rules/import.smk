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
        disk_mb=disk_mb_for("import"),
        gpu=gpus_for("import"),
    params:
        folder=subpath(output.particles, parent=True),
        passthrough=passthrough_options,
        options=import_options,
        datadir=fetched_datadir,
    message:
        "{wildcards.dataset}: reading the poses and CTFs of {input.particles}"
    shell:
        "cryodrgn-pipeline import {input.particles:q} {params.passthrough:q} {params.options:q} {params.datadir:q}"
        " -o {params.folder:q} &> {log:q}"
