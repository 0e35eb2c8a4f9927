# Rows of an efficiency track: a network and a plan each, counted and, on a GPU, measured.


def alone_if_measured(wildcards):
    """Counting needs no quiet machine."""
    measured = TRACK.content["device"] == "cpu" or gpus.devices()
    return alone(wildcards) if measured else 1


rule efficiency:
    output:
        f"{LAYOUT.root}/{{model}}/{{plan}}/efficiency.json",
    log:
        LAYOUT.log("efficiency", "{model}", "{plan}"),
    conda:
        "../../envs/prunebench.yaml"
    threads: alone_if_measured
    resources:
        **needs("efficiency"),
    params:
        track=ARGUMENT,
        settings=inspected(
            lambda wildcards: stage_fingerprint("efficiency", wildcards.model, wildcards.plan)
        ),
    shell:
        "prunebench efficiency --gpus {resources.gpu} --track {params.track} "
        "--model {wildcards.model} --plan {wildcards.plan} &> {log}"
