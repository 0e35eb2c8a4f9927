# snakemake --cores all                           the embedded track, on this machine
# snakemake --cores all --config track=smoke      another track: config/<track>.yaml, or a YAML file
# snakemake --cores all partial                   the leaderboard of what is finished so far


include: "workflow/rules/common.smk"


wildcard_constraints:
    model="[a-z][a-z0-9_]*",
    method="[a-z][a-z0-9_]*",
    sparsity=r"0\.[0-9]+",
    recovery="none|[a-z][a-z0-9_]*-[a-z0-9]+",
    selection="selection(-[a-z0-9_-]+)?",
    seed="[0-9]+",


onstart:
    start_warm_server()


onsuccess:
    report_failed_cells()


localrules:
    all,
    leaderboard,
    partial,


rule all:
    default_target: True
    input:
        METRICS,  # targets of their own: a deleted record is made again
        LEADERBOARD,


include: "workflow/rules/dense.smk"
include: "workflow/rules/select.smk"
include: "workflow/rules/recover.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/score.smk"
include: "workflow/rules/leaderboard.smk"
