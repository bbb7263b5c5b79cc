# RUN/checkpoints is not declared: Snakemake would delete it before a retry, and the resume with it.
# exec: Slurm's SIGTERM goes to all processes of a job, and takes back the time to save once a shell has died of it.
# The consensus is ancient(): training waits for its verdict on the conventions, not for its numbers.
rule train_model:
    input:
        stack=training_stack,
        consensus=ancient(checked_consensus),
        ids=id_file,
    output:
        latent="<results>/{dataset}/{subset}/{run}/latent.parquet",
        model="<results>/{dataset}/{subset}/{run}/model.safetensors",
        metrics="<results>/{dataset}/{subset}/{run}/metrics.jsonl",
        manifest="<results>/{dataset}/{subset}/{run}/run.json",
    log:
        "<logs>/{dataset}/{subset}/{run}/train.log",
    benchmark:
        "<benchmarks>/{dataset}/{subset}/{run}/train.tsv"
    conda:
        "../workflows/envs/cryodrgn-pipeline.yaml"
    threads: threads_for("train")
    resources:
        **nodes_for("train"),
        mem_mb=mem_mb_for("train"),
        runtime=runtime_for("train"),
        disk_mb=disk_mb_for("train"),
    params:
        stack=subpath(input.stack, parent=True),
        folder=subpath(output.manifest, parent=True),
        subset=subset_option,
        options=train_options,
        srun=srun,
        together=together("train"),
    message:
        "{wildcards.dataset}/{wildcards.subset}/{wildcards.run}: training"
    shell:
        "exec {params.srun}cryodrgn-pipeline train {params.stack:q} {params.subset:q} {input.ids:q}"
        " {params.options:q} {params.together:q} --resume --threads {threads}"
        " -o {params.folder:q} &> {log:q}"
