# Scoring: quality against the reference, consistency with dense, everything on one record.


rule score:
    input:
        prompts,
        extractor=RECORD["extractor"],
        select=artefact("select"),
        cost=artefact("cost"),
        checkpoint=artefact("checkpoint"),
        sample=artefact("sample"),
        dense_sample=artefact("dense_sample"),
    output:
        RECORD["score"],
    log:
        LAYOUT.log(RECORD["score"]),
    # Cells are finished one after the other, the furthest first: results come early and
    # Snakemake's queue of ready jobs, which it walks at every step, stays short.
    priority: 60
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("score"),
    params:
        job=job("score"),
        settings=fingerprint("score"),
    shell:
        "prunebench score {params.job:q} --gpus {resources.gpu} --log {log:q} &> {log:q}"
