# Selection: a method decides what goes. Cost: what the pruned architecture costs beside dense.


rule select:
    input:
        latents,
        dense=LAYOUT.trained("{model}"),
        method=method_file,
    output:
        LAYOUT.selection("select", "{model}", "{method}", "{sparsity}", "{seed}", "{selection}"),
    log:
        LAYOUT.log("select", "{model}", "{method}", "{sparsity}", "{selection}", "seed{seed}"),
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("select"),
    params:
        track=ARGUMENT,
        settings=fingerprint("select"),
        recovery=recovery_of,
    shell:
        "prunebench select --gpus {resources.gpu} --track {params.track} --model {wildcards.model} "
        "--method {wildcards.method} --sparsity {wildcards.sparsity} "
        "--recovery {params.recovery} --seed {wildcards.seed} --log {log} &> {log}"


rule cost:
    input:
        prompts,
        dense=LAYOUT.trained("{model}"),
        select=rules.select.output,
    output:
        LAYOUT.selection("cost", "{model}", "{method}", "{sparsity}", "{seed}", "{selection}"),
    log:
        LAYOUT.log("cost", "{model}", "{method}", "{sparsity}", "{selection}", "seed{seed}"),
    # Locally it needs every core, so the others go first until they run out or all cores are free;
    # then all that can be measured is, before scores fill the cores again.
    priority: 50
    conda:
        "../../envs/prunebench.yaml"
    threads: alone
    resources:
        **needs("cost"),
    params:
        track=ARGUMENT,
        settings=fingerprint("cost"),
        recovery=recovery_of,
    shell:
        "prunebench cost --gpus {resources.gpu} --track {params.track} --model {wildcards.model} "
        "--method {wildcards.method} --sparsity {wildcards.sparsity} "
        "--recovery {params.recovery} --seed {wildcards.seed} --log {log} &> {log}"
