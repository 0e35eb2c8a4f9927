# Sampling: image i of a cell depends on seed and i only, so that shards of the images, jobs of
# their own where the track asks for several, are gathered into the very file that one job draws.

SHARD_RECORD, SHARD_IMAGES = LAYOUT.shard(
    "{shard}", TRACK.shards, "{model}", "{method}", "{sparsity}", "{recovery}", "{seed}"
)


rule shard:
    input:
        prompts,
        checkpoint=artefact("checkpoint"),
    output:
        # Until they are gathered, images too: that Snakemake then removes them.
        record=temp(SHARD_RECORD),
        images=temp(SHARD_IMAGES),
    log:
        LAYOUT.log(
            "shard",
            "{model}",
            "{method}",
            "{sparsity}",
            "{recovery}",
            "seed{seed}",
            "shard{shard}",
        ),
    # A cell is gathered before the next one is drawn.
    priority: 25
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("sample"),
    params:
        track=ARGUMENT,
        settings=fingerprint("sample"),
    # The record of a failed cell has no images beside it, which Snakemake would miss.
    shell:
        "prunebench sample --gpus {resources.gpu} --track {params.track} --model {wildcards.model} "
        "--method {wildcards.method} --sparsity {wildcards.sparsity} "
        "--recovery {wildcards.recovery} --seed {wildcards.seed} --shard {wildcards.shard} "
        "--log {log} &> {log} && touch -a {output.images}"


rule sample:
    input:
        prompts,
        checkpoint=artefact("checkpoint"),
        shards=shards,
    output:
        LAYOUT.cell("sample", "{model}", "{method}", "{sparsity}", "{recovery}", "{seed}"),
    log:
        LAYOUT.log("sample", "{model}", "{method}", "{sparsity}", "{recovery}", "seed{seed}"),
    priority: 30
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("sample" if TRACK.shards == 1 else "gather"),
    params:
        track=ARGUMENT,
        settings=fingerprint("sample"),
    shell:
        "prunebench sample --gpus {resources.gpu} --track {params.track} --model {wildcards.model} "
        "--method {wildcards.method} --sparsity {wildcards.sparsity} "
        "--recovery {wildcards.recovery} --seed {wildcards.seed} --log {log} &> {log}"
