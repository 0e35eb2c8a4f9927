# Sampling: image i of a cell depends on seed and i only.


rule sample:
    input:
        checkpoint=artefact("checkpoint"),
    output:
        LAYOUT.cell("sample", "{model}", "{method}", "{sparsity}", "{recovery}", "{seed}"),
    log:
        LAYOUT.log("sample", "{model}", "{method}", "{sparsity}", "{recovery}", "seed{seed}"),
    priority: 30
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("sample"),
    params:
        track=ARGUMENT,
        settings=fingerprint("sample"),
    shell:
        "prunebench sample --gpus {resources.gpu} --track {params.track} --model {wildcards.model} "
        "--method {wildcards.method} --sparsity {wildcards.sparsity} "
        "--recovery {wildcards.recovery} --seed {wildcards.seed} --log {log} &> {log}"
