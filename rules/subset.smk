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
