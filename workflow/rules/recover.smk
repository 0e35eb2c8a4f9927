# Recovery: the pruned model is trained on what selection has left of the budget.


rule recover:
    input:
        encoded,
        dense=dense,
        select=artefact("select"),
    output:
        RECORD["recover"],
    log:
        LAYOUT.log(RECORD["recover"]),
    priority: 20
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("recover"),
    params:
        job=job("recover"),
        settings=fingerprint("recover"),
    shell:
        "prunebench recover {params.job:q} --gpus {resources.gpu} --log {log:q} &> {log:q}"
