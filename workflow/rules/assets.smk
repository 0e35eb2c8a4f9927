# What the track needs from outside. Both rules run on the machine that runs Snakemake, a cluster's
# login node, and nothing else uses the network; progress is shown as well as logged. They do not
# wait for the warm server, whose imports they have no use for.


rule assets:
    output:
        RECORD["assets"],
    log:
        LAYOUT.log(RECORD["assets"]),
    priority: 200
    localrule: True
    conda:
        "../../envs/prunebench.yaml"
    params:
        track=ARGUMENT,
        names=TRACK.assets(),
    shell:
        "PRUNEBENCH_WARM= prunebench assets fetch --track {params.track:q} --record {output:q} 2>&1 "
        "| tee {log:q}"


# A target: has no output and so always runs, and fetches what has gone from the cache since.
rule fetch:
    log:
        LAYOUT.log(f"{LAYOUT.root}/fetch.json"),
    localrule: True
    conda:
        "../../envs/prunebench.yaml"
    params:
        track=ARGUMENT,
    shell:
        "PRUNEBENCH_WARM= prunebench assets fetch --track {params.track:q} 2>&1 | tee {log:q}"
