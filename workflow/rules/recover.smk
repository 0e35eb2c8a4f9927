# Recovery: the pruned model is trained on what selection has left of the budget.


rule recover:
    input:
        latents,
        dense=LAYOUT.trained("{model}"),
        select=artefact("select"),
    output:
        LAYOUT.cell("recover", "{model}", "{method}", "{sparsity}", "{recovery}", "{seed}"),
    log:
        LAYOUT.log("recover", "{model}", "{method}", "{sparsity}", "{recovery}", "seed{seed}"),
    priority: 20
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("recover"),
    params:
        track=ARGUMENT,
        settings=fingerprint("recover"),
    shell:
        "prunebench recover --gpus {resources.gpu} --track {params.track} "
        "--model {wildcards.model} --method {wildcards.method} --sparsity {wildcards.sparsity} "
        "--recovery {wildcards.recovery} --seed {wildcards.seed} --log {log} &> {log}"
