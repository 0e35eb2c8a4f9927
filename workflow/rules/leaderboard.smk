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
    shell:
        "prunebench leaderboard --track {ARGUMENT} --out {RESULTS} &> {log}"


rule partial:
    input:
        finished_metrics,
    output:
        touch(f"{LAYOUT.root}/partial.done"),
    log:
        LAYOUT.log("partial"),
    conda:
        "../../envs/prunebench.yaml"
    shell:
        "prunebench leaderboard --track {ARGUMENT} --out {RESULTS} --partial &> {log}"
