rule preprocess_images:
    input:
        particles="<results>/{dataset}/import/particles.parquet",
        manifest="<results>/{dataset}/import/import.json",
    output:
        images="<results>/{dataset}/stack_{box}/images.mrcs",
        particles="<results>/{dataset}/stack_{box}/particles.parquet",
        noise="<results>/{dataset}/stack_{box}/noise.parquet",
        manifest="<results>/{dataset}/stack_{box}/stack.json",
    log:
        "<logs>/{dataset}/preprocess_{box}.log",
    benchmark:
        "<benchmarks>/{dataset}/preprocess_{box}.tsv"
    conda:
        "../workflows/envs/cryodrgn-pipeline.yaml"
    threads: threads_for("preprocess")
    resources:
        mem_mb=mem_mb_for("preprocess"),
        runtime=runtime_for("preprocess"),
        disk_mb=disk_mb_for("preprocess"),
        gpu=gpus_for("preprocess"),
    params:
        source=subpath(input.particles, parent=True),
        folder=subpath(output.manifest, parent=True),
        options=preprocess_options,
    message:
        "{wildcards.dataset}: centring the images and cropping them to {wildcards.box} px"
    shell:
        "cryodrgn-pipeline preprocess {params.source:q} --box-size {wildcards.box} {params.options:q}"
        " --threads {threads} -o {params.folder:q} &> {log:q}"


rule reconstruct_consensus:
    input:
        stack="<results>/{dataset}/stack_{box}/stack.json",
        maps=own_maps,
        fetched=fetched_summary,
    output:
        map="<results>/{dataset}/consensus_{box}/map.mrc",
        half1="<results>/{dataset}/consensus_{box}/half1.mrc",
        half2="<results>/{dataset}/consensus_{box}/half2.mrc",
        fsc="<results>/{dataset}/consensus_{box}/fsc.parquet",
        summary="<results>/{dataset}/consensus_{box}/consensus.json",
    log:
        "<logs>/{dataset}/consensus_{box}.log",
    benchmark:
        "<benchmarks>/{dataset}/consensus_{box}.tsv"
    conda:
        "../workflows/envs/cryodrgn-pipeline.yaml"
    threads: threads_for("consensus")
    resources:
        **nodes_for("consensus"),
        mem_mb=mem_mb_for("consensus"),
        runtime=runtime_for("consensus"),
        disk_mb=disk_mb_for("consensus"),
        gpu=gpus_for("consensus"),
    params:
        stack=subpath(input.stack, parent=True),
        folder=subpath(output.summary, parent=True),
        options=consensus_options,
        fetched=fetched_maps,
        srun=srun,
        together=together("consensus"),
    message:
        "{wildcards.dataset}: backprojecting two half maps and checking the conventions"
    shell:
        "{params.srun}cryodrgn-pipeline consensus {params.stack:q} {params.options:q} {params.fetched:q}"
        " {params.together:q} -o {params.folder:q} &> {log:q}"
