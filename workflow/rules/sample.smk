# Sampling: image i of a cell depends on seed and i only, so that shards of the images, jobs of
# their own where the track asks for several, are gathered into the very file that one job draws.


rule shard:
    input:
        prompts,
        checkpoint=artefact("checkpoint"),
    output:
        # Until they are gathered, images too: that Snakemake then removes them.
        record=temp(RECORD["shard"]),
        images=temp(tracks.layout.images_of(RECORD["shard"])),
    log:
        LAYOUT.log(RECORD["shard"]),
    # A cell is gathered before the next one is drawn.
    priority: 25
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("shard"),
    params:
        job=job("shard"),
        settings=fingerprint("shard"),
    # The record of a failed cell has no images beside it, which Snakemake would miss.
    shell:
        "prunebench shard {params.job:q} --gpus {resources.gpu} --log {log:q} &> {log:q} "
        "&& touch -a {output.images:q}"


rule sample:
    input:
        prompts,
        checkpoint=artefact("checkpoint"),
        shards=shards,
    output:
        RECORD["sample"],
    log:
        LAYOUT.log(RECORD["sample"]),
    priority: 30
    conda:
        "../../envs/prunebench.yaml"
    resources:
        **needs("sample"),
    params:
        job=job("sample"),
        settings=fingerprint("sample"),
    shell:
        "prunebench sample {params.job:q} --gpus {resources.gpu} --log {log:q} &> {log:q}"
