# The leaderboards, one per division: each a pure function of the records of its scored cells.

for division in METRICS:

    rule:
        name:
            f"leaderboard_{division}"
        input:
            METRICS[division],
            finished_oracle(division),
        output:
            LEADERBOARD[division],
        log:
            LAYOUT.log("leaderboard", division),
        localrule: True
        conda:
            "../../envs/prunebench.yaml"
        params:
            track=ARGUMENT,
            division=division,
        shell:
            "prunebench leaderboard --track {params.track} --division {params.division} &> {log}"

    rule:
        name:
            f"partial_{division}"
        input:
            finished_cells(division),
        output:
            touch(f"{LAYOUT.root}/partial_{division}.done"),
        log:
            LAYOUT.log("partial", division),
        localrule: True
        conda:
            "../../envs/prunebench.yaml"
        params:
            track=ARGUMENT,
            division=division,
        shell:
            "prunebench leaderboard --track {params.track} --division {params.division} --partial "
            "&> {log}"
