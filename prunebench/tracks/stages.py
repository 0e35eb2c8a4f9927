"""The stages: what of a track each depends on, and what it needs of a machine."""

from collections.abc import Mapping

# What of a track each stage depends on, besides its input files: editing one of these entries
# recomputes the stage, editing anything else does not. "*" stands for the cell's model or method.
DEPENDS = {
    "extractor": ("dataset", "extractor"),
    "encode": ("dataset", "autoencoders.*", "text_encoders.*"),
    "dense": (
        "dataset",
        "models.*.family",
        "models.*.config",
        "models.*.objective",
        "models.*.training",
        "models.*.weights",
        "models.*.autoencoder",
        "models.*.text_encoder",
    ),
    "select": ("models.*.sampling", "methods.parameters.*"),
    "recover": ("budgets", "models.*.recovery"),
    "sample": (
        "models.*.sampling",
        "sampling.count",
        "sampling.lanes",
        "sampling.size",
        "autoencoders.*",
    ),
    "cost": (  # but not latency.wait, which changes no result
        "models.*.sampling",
        "latency.batch",
        "latency.rounds",
        "latency.warmup",
        "latency.images",
        "latency.variants",
    ),
    "score": ("evaluation", "models.*.reference"),
    "oracle": (
        "models.*.recovery",
        "models.*.sampling",
        "budgets",
        "oracle.sparsity",
        "oracle.masks",
        "sampling.count",
        "sampling.lanes",
        "sampling.size",
        "autoencoders.*",
        "evaluation.batch",
    ),
}


# What a job of each rule needs of a cluster where the track's `needs` say nothing. Enough for the
# embedded track on one CPU core, several times over; a track of larger models states its own.
# Memory (MB): a job peaks at 1,000 to 1,200, most of it imports, and Snakemake's own two processes
# in a Slurm job take 250. Time (minutes): several times the longest job's on one slow core.
NEEDS = {
    "extractor": {"mem_mb": 2000, "runtime": 20, "gpu": 0, "cpus": 1},
    "encode": {"mem_mb": 2000, "runtime": 20, "gpu": 0, "cpus": 1},
    "dense": {"mem_mb": 2000, "runtime": 20, "gpu": 0, "cpus": 1},
    "select": {"mem_mb": 2000, "runtime": 20, "gpu": 0, "cpus": 1},
    "recover": {"mem_mb": 2000, "runtime": 20, "gpu": 0, "cpus": 1},
    "sample": {"mem_mb": 2000, "runtime": 10, "gpu": 0, "cpus": 1},
    "gather": {"mem_mb": 2000, "runtime": 10, "gpu": 0, "cpus": 1},  # `sample`, drawn in shards
    "cost": {"mem_mb": 2000, "runtime": 10, "gpu": 0, "cpus": 1},
    "score": {"mem_mb": 2000, "runtime": 10, "gpu": 0, "cpus": 1},
    "mask": {"mem_mb": 2000, "runtime": 20, "gpu": 0, "cpus": 1},
    "efficiency": {"mem_mb": 2000, "runtime": 20, "gpu": 0, "cpus": 1},  # of a track of that kind
}
SEVERAL_GPUS = ("dense", "recover")  # rules that train data-parallel; one job of another uses one


# Targets and rules of the workflow and folders of results, which no division may be called.
RESERVED = (
    *("all", "everything", "partial", "assets", "fetch", "oracle", "mask", "raw", "shard"),
    "prompts",
    "efficiency",
    *DEPENDS,
)


def needs_of(content: Mapping, rule: str) -> dict[str, int]:
    """What a job of a rule needs, by the content of a track of either kind."""
    given = content.get("needs", {})
    return {**NEEDS[rule], **given.get("default", {}), **given.get(rule, {})}
