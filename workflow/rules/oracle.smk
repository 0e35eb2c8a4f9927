# The oracle: every layer mask of one sparsity, so that a selection's place among them is exact.


rule oracle:
    input:
        encoded,
        dense=dense,
        extractor=RECORD["extractor"],
    output:
        RECORD["oracle"],
    log:
        LAYOUT.log(RECORD["oracle"]),
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("oracle"),
    params:
        job=job("oracle"),
        settings=fingerprint("oracle"),
    shell:
        "prunebench oracle {params.job:q} --gpus {resources.gpu} --log {log:q} &> {log:q}"


# The target: makes the default division's tables again, with the masks.
rule masks:
    input:
        MASKS,
        BOARDS[TRACK.default_division],
    output:
        touch(f"{LAYOUT.root}/oracle/done"),
    log:
        LAYOUT.log(f"{LAYOUT.root}/oracle/done.json"),
    conda:
        "../../envs/prunebench.yaml"
    params:
        track=ARGUMENT,
    shell:
        "prunebench leaderboard --track {params.track:q} &> {log:q}"
