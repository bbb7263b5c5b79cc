rule decode_volumes:
    input:
        model="<results>/{dataset}/{subset}/{run}/model.safetensors",
        analysis="<results>/{dataset}/{subset}/{run}/analysis/analysis.json",
        stack=volumes_stack,
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
        **nodes_for("volumes"),
        mem_mb=mem_mb_for("volumes"),
        runtime=runtime_for("volumes"),
        disk_mb=disk_mb_for("volumes"),
    params:
        run=subpath(input.model, parent=True),
        folder=subpath(output.table, parent=True),
        z=latent_points,
        options=volumes_options,
        stack=volumes_stack_option,
        srun=srun,
        together=together("volumes"),
    message:
        "{wildcards.dataset}/{wildcards.subset}/{wildcards.run}: making volumes ({wildcards.series})"
    shell:
        "{params.srun}cryodrgn-pipeline volumes {params.run:q} --z {params.z:q} {params.options:q}"
        " {params.stack:q} {params.together:q} --threads {threads} -o {params.folder:q} &> {log:q}"
