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
        mem_mb=mem_mb_for("select"),
        runtime=runtime_for("select"),
        disk_mb=disk_mb_for("select"),
        gpu=gpus_for("subset"),
    params:
        run=subpath(input.latent, parent=True),
        options=select_options,
    message:
        "{wildcards.dataset}: choosing the particles of subset {wildcards.subset}"
    shell:
        "cryodrgn-pipeline select {params.run:q} {params.options:q} -o {output.ids:q} &> {log:q}"


# What goes beside a .cs file (.csg, passthrough) is not declared: it depends on the source.
rule export_particles:
    input:
        particles="<results>/{dataset}/import/particles.parquet",
        manifest="<results>/{dataset}/import/import.json",
        ids=id_file,
    output:
        "<results>/{dataset}/{subset}/particles.{kind}",
    log:
        "<logs>/{dataset}/{subset}/export_{kind}.log",
    benchmark:
        "<benchmarks>/{dataset}/{subset}/export_{kind}.tsv"
    conda:
        "../workflows/envs/cryodrgn-pipeline.yaml"
    threads: threads_for("subset")
    resources:
        mem_mb=mem_mb_for("export"),
        runtime=runtime_for("export"),
        disk_mb=disk_mb_for("export"),
        gpu=gpus_for("subset"),
    params:
        source=subpath(input.particles, parent=True),
    message:
        "{wildcards.dataset}: the particles of subset {wildcards.subset} as a .{wildcards.kind} file"
    shell:
        "cryodrgn-pipeline export {params.source:q} --subset {input.ids:q} -o {output:q} &> {log:q}"
