# What every cell starts from: the feature extractor, the training set as models see it, and the
# dense models. Every cell waits for these: first in line.


rule extractor:
    input:
        ancient(RECORD["assets"]),
    output:
        RECORD["extractor"],
    log:
        LAYOUT.log(RECORD["extractor"]),
    priority: 100
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("extractor"),
    params:
        job=job("extractor"),
        settings=fingerprint("extractor"),
    shell:
        "prunebench extractor {params.job:q} --gpus {resources.gpu} --log {log:q} &> {log:q}"


rule encode:
    input:
        ancient(RECORD["assets"]),
    output:
        RECORD["encode"],
    log:
        LAYOUT.log(RECORD["encode"]),
    priority: 100
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("encode"),
    params:
        job=job("encode"),
        settings=fingerprint("encode"),
    shell:
        "prunebench encode {params.job:q} --gpus {resources.gpu} --log {log:q} &> {log:q}"


rule dense:
    input:
        ancient(RECORD["assets"]),
        checkpoint_file,
        encoded,
    output:
        RECORD["dense"],
    log:
        LAYOUT.log(RECORD["dense"]),
    priority: 100
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("dense"),
    params:
        job=job("dense"),
        settings=fingerprint("dense"),
    shell:
        "prunebench dense {params.job:q} --gpus {resources.gpu} --log {log:q} &> {log:q}"
