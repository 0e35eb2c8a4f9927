# Rows of an efficiency track: a network and a plan each, counted and, on a GPU, measured.


rule efficiency:
    output:
        RECORD["efficiency"],
    log:
        LAYOUT.log(RECORD["efficiency"]),
    conda:
        "../../envs/prunebench.yaml"
    threads: alone_if_measured
    resources:
        **needs("efficiency"),
    params:
        job=job("efficiency"),
        settings=fingerprint("efficiency"),
    shell:
        "prunebench efficiency {params.job:q} --gpus {resources.gpu} --log {log:q} &> {log:q}"
