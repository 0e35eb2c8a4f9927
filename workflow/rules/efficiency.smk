# Rows of an efficiency track: a network and a plan each, counted and, on a GPU, measured.


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
