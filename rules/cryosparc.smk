# Both run where Snakemake runs, with the command line of an environment of their own: cryoSPARC's client must
# be of cryoSPARC's own version. Credentials come from its environment variables or its own login.
# cryosparc/project, map.mrc and mask.mrc are not declared: what is there depends on the configuration.
rule read_cryosparc:
    output:
        particles="<results>/{dataset}/cryosparc/particles.cs",
        summary="<results>/{dataset}/cryosparc/cryosparc.json",
    log:
        "<logs>/{dataset}/read_cryosparc.log",
    benchmark:
        "<benchmarks>/{dataset}/read_cryosparc.tsv"
    localrule: True
    conda:
        cryosparc_environment()
    threads: threads_for("cryosparc")
    resources:
        mem_mb=mem_mb_for("fetch"),
        runtime=runtime_for("fetch"),
        disk_mb=disk_mb_for("fetch"),
        gpu=gpus_for("cryosparc"),
    params:
        executable=config["cryosparc"]["executable"],
        folder=subpath(output.particles, parent=True),
        options=read_options,
    message:
        "{wildcards.dataset}: reading the particles from cryoSPARC"
    shell:
        "{params.executable:q} read-cryosparc {params.options:q} -o {params.folder:q} &> {log:q}"


# cryosparc/job.json is not declared: a rerun finds its job in cryoSPARC by it.
rule push_cryosparc:
    input:
        latent="<results>/{dataset}/{subset}/{run}/latent.parquet",
        analysis="<results>/{dataset}/{subset}/{run}/analysis/particles.parquet",
        report="<results>/{dataset}/{subset}/{run}/report.html",
        volumes=push_volumes,
        subsets=push_subsets,
    output:
        receipt="<results>/{dataset}/{subset}/{run}/cryosparc/pushed.json",
    log:
        "<logs>/{dataset}/{subset}/{run}/push_cryosparc.log",
    benchmark:
        "<benchmarks>/{dataset}/{subset}/{run}/push_cryosparc.tsv"
    localrule: True
    conda:
        cryosparc_environment()
    threads: threads_for("cryosparc")
    resources:
        mem_mb=mem_mb_for("push"),
        runtime=runtime_for("push"),
        disk_mb=disk_mb_for("push"),
        gpu=gpus_for("cryosparc"),
    params:
        executable=config["cryosparc"]["executable"],
        run=subpath(input.latent, parent=True),
        folder=subpath(output.receipt, parent=True),
        target=push_target,
        volumes=volume_options,
        subsets=push_subset_options,
    message:
        "{wildcards.dataset}/{wildcards.subset}/{wildcards.run}: pushing the results into cryoSPARC"
    shell:
        "{params.executable:q} push {params.run:q} {params.target:q} {params.volumes:q} {params.subsets:q}"
        " -o {params.folder:q} &> {log:q}"
