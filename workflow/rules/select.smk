# Selection: a method decides what goes. Cost: what the pruned architecture costs beside dense.


rule select:
    input:
        encoded,
        dense=dense,
        method=method_file,
    output:
        RECORD["select"],
    log:
        LAYOUT.log(RECORD["select"]),
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("select"),
    params:
        job=job("select"),
        settings=fingerprint("select"),
    shell:
        "prunebench select {params.job:q} --gpus {resources.gpu} --log {log:q} &> {log:q}"


rule cost:
    input:
        prompts,
        taught_steps,
        dense=dense,
        select=artefact("select"),
    output:
        RECORD["cost"],
    log:
        LAYOUT.log(RECORD["cost"]),
    # Locally it needs every core, so the others go first until they run out or all cores are free;
    # then all that can be measured is, before scores fill the cores again.
    priority: 50
    conda:
        "../../envs/prunebench.yaml"
    threads: alone
    resources:
        **needs("cost"),
    params:
        job=job("cost"),
        settings=fingerprint("cost"),
    shell:
        "prunebench cost {params.job:q} --gpus {resources.gpu} --log {log:q} &> {log:q}"
