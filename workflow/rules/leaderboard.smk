# The leaderboard: a pure function of the records of the scored cells.


rule leaderboard:
    input:
        METRICS,
    output:
        LEADERBOARD,
    log:
        LAYOUT.log("leaderboard"),
    conda:
        "../../envs/prunebench.yaml"
    params:
        track=ARGUMENT,
    shell:
        "prunebench leaderboard --track {params.track} &> {log}"


rule partial:
    input:
        finished_metrics,
    output:
        touch(f"{LAYOUT.root}/partial.done"),
    log:
        LAYOUT.log("partial"),
    conda:
        "../../envs/prunebench.yaml"
    params:
        track=ARGUMENT,
    shell:
        "prunebench leaderboard --track {params.track} --partial &> {log}"
