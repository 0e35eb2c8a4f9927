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


rule coder:
    input:
        ancient(RECORD["assets"]),
    output:
        RECORD["coder"],
    log:
        LAYOUT.log(RECORD["coder"]),
    priority: 100
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("coder"),
    params:
        job=job("coder"),
        settings=fingerprint("coder"),
    shell:
        "prunebench coder {params.job:q} --gpus {resources.gpu} --log {log:q} &> {log:q}"


rule encode:
    input:
        ancient(RECORD["assets"]),
        own_coder,
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


rule decoder:
    input:
        prompts,
        RECORD["extractor"],
        dense=dense,
    output:
        RECORD["decoder"],
    log:
        LAYOUT.log(RECORD["decoder"]),
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("decoder"),
    params:
        job=job("decoder"),
        settings=fingerprint("decoder"),
    shell:
        "prunebench decoder {params.job:q} --gpus {resources.gpu} --log {log:q} &> {log:q}"
