# snakemake --cores all                           the embedded track's first division (matched)
# snakemake --cores all as_published recovery      other divisions of the track
# snakemake --cores all masks                     the oracle: every layer mask of one sparsity
# snakemake --cores all everything                all divisions and the oracle
# snakemake --cores all --config track=smoke      another track: config/<track>.yaml, or a YAML file
# snakemake --cores all --config track=efficiency parameters, MACs and, on a GPU, speed at full size
# snakemake --cores all partial                   the leaderboards of what is finished so far
# snakemake --cores all fetch                     only download what the track needs


include: "workflow/rules/common.smk"


# What a run leaves in runs/<track>: a record per job, called as its stage, and beside it the files
# that it vouches for.
# {dense_seed}, {precision} and {sampling} are folders, such as /dense_seed-1, and empty where the
# track has one value; {selection} names the recovery where a method trains while it selects.
TREE = {
    "assets": "assets.json",
    "extractor": "extractor/extractor.json",  # features of the reference images
    "coder": "coder/{coder}/coder.json",  # an autoencoder or text encoder of the track's own
    "encode": "encode/{coder}/encode.json",  # latents or embeddings
    "dense": "{model}{dense_seed}/dense/dense.json",  # weights
    "decoder": "{model}{dense_seed}/decoder/decoder.json",  # weights of a narrow one
    "select": "{model}{dense_seed}/{method}/{sparsity}/{selection}/seed{seed}/select.json",  # plan, weights
    "cost": "{model}{dense_seed}/{method}/{sparsity}/{selection}{precision}{sampling}/seed{seed}/cost.json",
    "recover": "{model}{dense_seed}/{method}/{sparsity}/{recovery}/seed{seed}/recover.json",  # weights
    "shard": "{model}{dense_seed}/{method}/{sparsity}/{recovery}{precision}{sampling}/seed{seed}/shard{shard}of{shards}.json",
    "sample": "{model}{dense_seed}/{method}/{sparsity}/{recovery}{precision}{sampling}/seed{seed}/sample.json",  # images
    "score": "{model}{dense_seed}/{method}/{sparsity}/{recovery}{precision}{sampling}/seed{seed}/score.json",  # grid.png
    "oracle": "oracle/{model}{dense_seed}/{recovery}/seed{seed}/mask{mask}/oracle.json",
    "efficiency": "{model}/{plan}/efficiency.json",  # of an efficiency track
    "leaderboard": "leaderboard/{division}/leaderboard.csv",  # and .md, .tex, .html, .bib, raw/
}
RECORD = {stage: f"{LAYOUT.root}/{path}" for stage, path in TREE.items()}


wildcard_constraints:
    coder="[a-z][a-z0-9_]*",
    model="[a-z][a-z0-9_]*",
    dense_seed="(/dense_seed-[0-9]+)?",
    method="[a-z][a-z0-9_]*",
    sparsity=r"0\.[0-9]+",
    selection="selection(-[a-z0-9_-]+)?",
    recovery="none|[a-z][a-z0-9_]*-[a-z0-9]+",
    precision="(/precision-[a-z0-9]+)?",
    sampling="(/sampling-[a-z0-9_]+)?",
    seed="[0-9]+",
    shard="[0-9]+",
    shards=str(TRACK.shards),
    mask="[0-9]+",
    plan="[a-z][a-z0-9_]*",


onstart:
    run.plan_at_events_only(workflow.scheduler)
    prepare()
    # For `prunebench progress`.
    run.mark_run(TRACK.name, workflow.local_exec, workflow.cores)


onsuccess:
    run.unmark_run()
    report_failed_cells()


onerror:
    run.unmark_run()
    report_unfinished_run()


localrules:
    all,
    everything,
    masks,
    partial,


rule all:
    default_target: True
    input:
        SCORES[TRACK.default_division],  # targets of their own: a deleted record is made again
        BOARDS[TRACK.default_division],


rule everything:
    input:
        SCORES.values(),
        BOARDS.values(),
        f"{LAYOUT.root}/oracle/done" if MASKS else [],


rule partial:
    input:
        partial_leaderboards,


for division in SCORES:

    rule:
        name:
            division
        input:
            SCORES[division],
            BOARDS[division],


include: "workflow/rules/assets.smk"
include: "workflow/rules/dense.smk"
include: "workflow/rules/select.smk"
include: "workflow/rules/recover.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/score.smk"
include: "workflow/rules/oracle.smk"
include: "workflow/rules/leaderboard.smk"
include: "workflow/rules/efficiency.smk"
