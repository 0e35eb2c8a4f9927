# What every cell starts from: the feature extractor and the dense models.


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


rule dense:
    input:
        ancient(LAYOUT.assets),
        checkpoint_file,
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
