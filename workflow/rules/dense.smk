# What every cell starts from: the feature extractor, latents of the training set for models that
# work on these, and the dense models.


rule extractor:
    input:
        ancient(LAYOUT.assets),
    output:
        LAYOUT.extractor,
    log:
        LAYOUT.log("extractor"),
    # Every cell waits for these two: first in line.
    priority: 100
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("extractor"),
    params:
        track=ARGUMENT,
        settings=fingerprint("extractor"),
    shell:
        "prunebench extractor --gpus {resources.gpu} --track {params.track} &> {log}"


rule encode:
    input:
        ancient(LAYOUT.assets),
    output:
        LAYOUT.latents("{autoencoder}"),
    log:
        LAYOUT.log("encode", "{autoencoder}"),
    priority: 100
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("encode"),
    params:
        track=ARGUMENT,
        settings=encode_fingerprint,
    shell:
        "prunebench encode --gpus {resources.gpu} --track {params.track} "
        "--autoencoder {wildcards.autoencoder} &> {log}"


rule prompts:
    input:
        ancient(LAYOUT.assets),
    output:
        LAYOUT.prompts("{text_encoder}"),
    log:
        LAYOUT.log("prompts", "{text_encoder}"),
    priority: 100
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("encode"),
    params:
        track=ARGUMENT,
        settings=encode_fingerprint,
    shell:
        "prunebench encode --gpus {resources.gpu} --track {params.track} "
        "--text-encoder {wildcards.text_encoder} &> {log}"


rule dense:
    input:
        ancient(LAYOUT.assets),
        checkpoint_file,
        latents,
    output:
        LAYOUT.trained("{model}"),
    log:
        LAYOUT.log("dense", "{model}"),
    priority: 100
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("dense"),
    params:
        track=ARGUMENT,
        settings=fingerprint("dense"),
    shell:
        "prunebench dense --gpus {resources.gpu} --track {params.track} --model {wildcards.model} "
        "&> {log}"
