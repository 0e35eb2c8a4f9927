# Sampling: image i of a cell depends on seed and i only.


rule sample:
    input:
        checkpoint=artefact("checkpoint"),
    output:
        LAYOUT.cell("sample", "{model}", "{method}", "{sparsity}", "{recovery}", "{seed}"),
    log:
        LAYOUT.log("sample", "{model}", "{method}", "{sparsity}", "{recovery}", "seed{seed}"),
    params:
        settings=fingerprint("sample"),
    conda:
        "../../envs/prunebench.yaml"
    shell:
        "prunebench sample --track {ARGUMENT} --model {wildcards.model} "
        "--method {wildcards.method} --sparsity {wildcards.sparsity} "
        "--recovery {wildcards.recovery} --seed {wildcards.seed} --log {log} &> {log}"
