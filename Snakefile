# Bare `snakemake` from a checkout: the workflow itself is workflows/Snakefile.
include: "workflows/Snakefile"


rule default:
    default_target: True
    input:
        rules.all.input,
    localrule: True
