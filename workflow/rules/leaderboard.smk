# The leaderboards, one per division: each a pure function of the records of its scored cells.

for division in SCORES:

    rule:
        name:
            f"leaderboard_{division}"
        input:
            SCORES[division],
            DECODERS,
            finished_oracle(division),
        output:
            BOARDS[division],
        log:
            LAYOUT.log(BOARDS[division][0]),
        localrule: True
        conda:
            "../../envs/prunebench.yaml"
        params:
            track=ARGUMENT,
            division=division,
        shell:
            "prunebench leaderboard --track {params.track:q} --division {params.division:q} &> {log:q}"

    rule:
        name:
            f"partial_{division}"
        input:
            finished_cells(division),
        output:
            touch(f"{LAYOUT.leaderboard(division)}/partial.done"),
        log:
            LAYOUT.log(f"{LAYOUT.leaderboard(division)}/partial.done"),
        localrule: True
        conda:
            "../../envs/prunebench.yaml"
        params:
            track=ARGUMENT,
            division=division,
        shell:
            "prunebench leaderboard --track {params.track:q} --division {params.division:q} "
            "--partial &> {log:q}"
