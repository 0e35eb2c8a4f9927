# snakemake --cores all                           the embedded track's first division (matched)
# snakemake --cores all published recovery        other divisions of the track
# snakemake --cores all oracle                    every layer mask of one sparsity
# snakemake --cores all everything                all divisions and the oracle
# snakemake --cores all --config track=smoke      another track: config/<track>.yaml, or a YAML file
# snakemake --cores all --config track=efficiency parameters, MACs and, on a GPU, speed at full size
# snakemake --cores all partial                   the leaderboards of what is finished so far
# snakemake --cores all assets                    only download what the track needs


include: "workflow/rules/common.smk"


wildcard_constraints:
    model="[a-z][a-z0-9_]*",
    method="[a-z][a-z0-9_]*",
    sparsity=r"0\.[0-9]+",
    recovery="none|[a-z][a-z0-9_]*-[a-z0-9]+",
    selection="selection(-[a-z0-9_-]+)?",
    seed="[0-9]+",
    mask="[0-9]+",
    shard="[0-9]+",
    plan="[a-z][a-z0-9_]*",
    autoencoder="[a-z][a-z0-9_]*",
    text_encoder="[a-z][a-z0-9_]*",


onstart:
    plan_at_events_only()
    if workflow.local_exec:
        prepare_machine()
    elif workflow.executor_plugin.name == "slurm":
        cancel_leftover_jobs()
    adopt_unseen_records()
    # For `prunebench progress`.
    activity.mark_run(TRACK.name, workflow.local_exec, workflow.cores)


onsuccess:
    activity.unmark_run()
    report_failed_cells()


onerror:
    activity.unmark_run()
    report_unfinished_run()


localrules:
    all,
    everything,
    oracle,
    partial,


rule all:
    default_target: True
    input:
        METRICS[TRACK.default_division],  # targets of their own: a deleted record is made again
        LEADERBOARD[TRACK.default_division],


rule everything:
    input:
        METRICS.values(),
        LEADERBOARD.values(),
        f"{LAYOUT.root}/oracle/done" if ORACLE else [],


rule partial:
    input:
        partial_leaderboards,


for division in METRICS:

    rule:
        name:
            division
        input:
            METRICS[division],
            LEADERBOARD[division],


include: "workflow/rules/assets.smk"
include: "workflow/rules/dense.smk"
include: "workflow/rules/select.smk"
include: "workflow/rules/recover.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/score.smk"
include: "workflow/rules/leaderboard.smk"
include: "workflow/rules/oracle.smk"
include: "workflow/rules/efficiency.smk"
