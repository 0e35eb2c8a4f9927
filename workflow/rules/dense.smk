# What every cell starts from: the feature extractor and the dense models.


rule extractor:
    output:
        LAYOUT.extractor,
    log:
        LAYOUT.log("extractor"),
    params:
        settings=fingerprint("extractor"),
    conda:
        "../../envs/prunebench.yaml"
    shell:
        "prunebench extractor --track {ARGUMENT} &> {log}"


rule dense:
    output:
        LAYOUT.trained("{model}"),
    log:
        LAYOUT.log("dense", "{model}"),
    params:
        settings=fingerprint("dense"),
    # Long and needed by all: first in line.
    priority: 10
    conda:
        "../../envs/prunebench.yaml"
    shell:
        "prunebench dense --track {ARGUMENT} --model {wildcards.model} &> {log}"
