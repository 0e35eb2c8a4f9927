# The leaderboards, one per division: each a pure function of the records of its scored cells.

for division in METRICS:

    rule:
        name:
            f"leaderboard_{division}"
        input:
            METRICS[division],
            # A finished oracle joins the tables; it is never made for them.
            ORACLE
            if division == TRACK.default_division and len(finished(ORACLE)) == len(ORACLE)
            else [],
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
            finished(METRICS[division]),
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
