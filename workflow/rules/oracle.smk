# The oracle: every layer mask of one sparsity, so that a selection's place among them is exact.


rule mask:
    input:
        latents,
        dense=LAYOUT.trained("{model}"),
        extractor=LAYOUT.extractor,
    output:
        LAYOUT.oracle("{model}", "{recovery}", "{seed}", "{mask}"),
    log:
        LAYOUT.log("oracle", "{model}", "{recovery}", "seed{seed}", "mask{mask}"),
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("mask"),
    params:
        track=ARGUMENT,
        settings=fingerprint("oracle"),
    shell:
        "prunebench oracle --gpus {resources.gpu} --track {params.track} --model {wildcards.model} "
        "--recovery {wildcards.recovery} --seed {wildcards.seed} --mask {wildcards.mask} &> {log}"


rule oracle:
    input:
        ORACLE,
        LEADERBOARD[TRACK.default_division],  # which is made again with the masks
    output:
        touch(f"{LAYOUT.root}/oracle/done"),
    log:
        LAYOUT.log("oracle"),
    conda:
        "../../envs/prunebench.yaml"
    params:
        track=ARGUMENT,
    shell:
        "prunebench leaderboard --track {params.track} &> {log}"
