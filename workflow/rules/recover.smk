# Recovery: the pruned model is trained on what selection has left of the budget.


rule recover:
    input:
        dense=LAYOUT.trained("{model}"),
        select=artefact("select"),
    output:
        LAYOUT.cell("recover", "{model}", "{method}", "{sparsity}", "{recovery}", "{seed}"),
    log:
        LAYOUT.log("recover", "{model}", "{method}", "{sparsity}", "{recovery}", "seed{seed}"),
    params:
        settings=fingerprint("recover"),
    conda:
        "../../envs/prunebench.yaml"
    shell:
        "prunebench recover --track {ARGUMENT} --model {wildcards.model} "
        "--method {wildcards.method} --sparsity {wildcards.sparsity} "
        "--recovery {wildcards.recovery} --seed {wildcards.seed} --log {log} &> {log}"
