# Scoring: quality against the reference, consistency with dense, everything on one record.


rule score:
    input:
        prompts,
        extractor=LAYOUT.extractor,
        select=artefact("select"),
        cost=artefact("cost"),
        checkpoint=artefact("checkpoint"),
        sample=artefact("sample"),
        dense_sample=artefact("dense_sample"),
    output:
        LAYOUT.cell("metrics", "{model}", "{method}", "{sparsity}", "{recovery}", "{seed}"),
    log:
        LAYOUT.log("score", "{model}", "{method}", "{sparsity}", "{recovery}", "seed{seed}"),
    # Cells are finished one after the other, the furthest first: results come early and
    # Snakemake's queue of ready jobs, which it walks at every step, stays short.
    priority: 60
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("score"),
    params:
        track=ARGUMENT,
        settings=fingerprint("score"),
    shell:
        "prunebench score --gpus {resources.gpu} --track {params.track} --model {wildcards.model} "
        "--method {wildcards.method} --sparsity {wildcards.sparsity} "
        "--recovery {wildcards.recovery} --seed {wildcards.seed} --log {log} &> {log}"
