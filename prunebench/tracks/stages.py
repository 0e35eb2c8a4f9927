"""The table of the stages: what each writes, depends on and needs, and which function runs it.

Command line, rules, layout and the live view derive from it. Free of torch: only the command line
imports the functions.
"""

import string
from collections.abc import Mapping
from dataclasses import dataclass, field

from prunebench.tracks.cells import DEFAULT

MODEL = ("model", "dense_seed")
CELL = (*MODEL, "method", "sparsity", "recovery", "seed")  # what is selected and recovered
DRAWN = (*CELL, "precision", "sampling")  # and then sampled and timed
SAMPLING = "models.*.sampling"  # with another sampling than the default: models.*.samplings.NAME
SELECTED = "{model}{dense_seed}/{method}/{sparsity}/{selection}"
RECOVERED = "{model}{dense_seed}/{method}/{sparsity}/{recovery}"
LOGS = "logs"  # folder of a track, as the records' folders are


def _needs(runtime: int) -> dict[str, int]:
    """What a job needs of a cluster where the track's `needs` say nothing.

    Enough for the embedded track on one CPU core, several times over; a track of larger models
    states its own. Memory (MB): a job peaks at 1,000 to 1,200, most of it imports, and Snakemake's
    own two processes in a Slurm job take 250. Time (minutes): several times the longest job's on
    one slow core.
    """
    return {"mem_mb": 2000, "runtime": runtime, "gpu": 0, "cpus": 1, "cpu_instead": False}


@dataclass(frozen=True)
class Stage:
    """One step of the work, called the same as rule, command, record, function and in the docs.

    Attributes:
        help: what it does, as the command line says it.
        record: where its record lies beneath the track's folder, with the names of wildcards as in
            the Snakefile. An axis of which the track has one value has no folder.
        names: what it is called with; each is an option of its command.
        depends: keys of the track that it depends on besides its input files. Editing one of them
            recomputes the stage, editing anything else does not. "*" stands for the job's model,
            method or coder.
        needs: what a job needs of a machine: mem_mb, runtime (minutes), gpu and cpus; and whether
            the CPU will do where a GPU can't be used (cpu_instead).
        several_gpus: it trains data-parallel; a job of another stage uses one GPU at most.
    """

    name: str
    help: str
    record: str
    names: tuple[str, ...] = ()
    depends: tuple[str, ...] = ()
    needs: Mapping[str, int] = field(default_factory=lambda: _needs(20))
    several_gpus: bool = False

    @property
    def function(self) -> str:
        """What runs it, as "module:name"."""
        return f"prunebench.stages.{self.name}:{self.name}"

    @property
    def of_cells(self) -> bool:
        return "method" in self.names

    def depends_on(self, sampling: str) -> tuple[str, ...]:
        """The keys that a job of it depends on whose cell is drawn with a sampling."""
        if sampling == DEFAULT or "sampling" not in self.names or SAMPLING not in self.depends:
            return self.depends
        # `cost` times the dense model, with its default sampling, beside it.
        kept = [key for key in self.depends if key != SAMPLING or self.name == "cost"]
        return (*kept, f"models.*.samplings.{sampling}")

    @property
    def wildcards(self) -> tuple[str, ...]:
        """Names of the wildcards in its record's path, in their order."""
        return tuple(name for _, name, _, _ in string.Formatter().parse(self.record) if name)


_TRAINED = ("budgets", "models.*.recovery", "recoveries.*")
_DRAWN = (
    SAMPLING,
    "sampling.count",
    "sampling.lanes",
    "sampling.size",
    "autoencoders.*",
)
_TIMED = ("latency.batch", "latency.rounds", "latency.warmup")

# In the order of the work.
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "assets",
            "list, fetch or verify what is downloaded",
            "assets.json",
        ),
        Stage(
            "extractor",
            "train or take the feature extractor",
            "extractor/extractor.json",
            depends=("dataset", "extractor"),
        ),
        Stage(
            "coder",
            "train an autoencoder of the track's own, or make its text encoder",
            "coder/{coder}/coder.json",
            names=("coder",),
            depends=("dataset", "autoencoders.*.own", "text_encoders.*.own"),
        ),
        Stage(
            "encode",
            "encode the training images by an autoencoder, or the captions, once",
            "encode/{coder}/encode.json",
            names=("coder",),
            depends=("dataset", "autoencoders.*", "text_encoders.*"),
        ),
        Stage(
            "dense",
            "train a dense model, or take a released one",
            "{model}{dense_seed}/dense/dense.json",
            names=MODEL,
            depends=(
                "dataset",
                "models.*.family",
                "models.*.config",
                "models.*.objective",
                "models.*.training",
                "models.*.weights",
                "models.*.autoencoder",
                "models.*.text_encoder",
            ),
            several_gpus=True,
        ),
        Stage(
            "decoder",
            "train a narrow decoder on what a dense model draws",
            "{model}{dense_seed}/decoder/decoder.json",
            names=MODEL,
            depends=("models.*.decoder", "seeds", *_DRAWN, "evaluation.batch", *_TIMED),
        ),
        Stage(
            "select",
            "run a method on the dense model",
            f"{SELECTED}/seed{{seed}}/select.json",
            names=CELL,
            depends=(SAMPLING, "methods.parameters.*"),
        ),
        Stage(
            "cost",
            "measure multiply-accumulates, memory and latency",
            f"{SELECTED}{{precision}}{{sampling}}/seed{{seed}}/cost.json",
            names=DRAWN,
            depends=(  # but not latency.wait, which changes no result
                SAMPLING,
                *_TIMED,
                "latency.images",
                "latency.variants",
            ),
            needs=_needs(10),
        ),
        Stage(
            "recover",
            "train a pruned model on what is left of its budget",
            f"{RECOVERED}/seed{{seed}}/recover.json",
            names=CELL,
            depends=_TRAINED,
            several_gpus=True,
        ),
        Stage(
            "shard",
            "draw a part of a cell's images, where sampling.shards asks for several",
            f"{RECOVERED}{{precision}}{{sampling}}/seed{{seed}}/shard{{shard}}of{{shards}}.json",
            names=(*DRAWN, "shard"),
            depends=_DRAWN,
            needs=_needs(10),
        ),
        Stage(
            "sample",
            "draw a cell's images, or gather what its shards drew",
            f"{RECOVERED}{{precision}}{{sampling}}/seed{{seed}}/sample.json",
            names=DRAWN,
            depends=_DRAWN,
            needs=_needs(10),
        ),
        Stage(
            "score",
            "compute quality and gather everything that is known of a cell",
            f"{RECOVERED}{{precision}}{{sampling}}/seed{{seed}}/score.json",
            names=DRAWN,
            depends=("evaluation", "models.*.reference"),
            needs=_needs(10),
        ),
        Stage(
            "oracle",
            "run one of all layer masks of the oracle's sparsity",
            "oracle/{model}{dense_seed}/{recovery}/seed{seed}/mask{mask}/oracle.json",
            names=(*MODEL, "recovery", "seed", "mask"),
            depends=(*_TRAINED, *_DRAWN, "oracle.sparsity", "oracle.masks", "evaluation.batch"),
        ),
        Stage(
            "efficiency",
            "count, and on a GPU measure, a row of an efficiency track",
            "{model}/{plan}/efficiency.json",
            names=("model", "plan"),
        ),
        Stage(
            "leaderboard",
            "build the tables, plots and page of a division",
            "leaderboard/{division}/leaderboard.csv",
            names=("division",),
        ),
    )
}

SEVERAL_GPUS = tuple(name for name, stage in STAGES.items() if stage.several_gpus)
# Jobs of these are of a track and may ask for something; the others run where Snakemake does.
NEEDY = tuple(name for name in STAGES if name not in ("assets", "leaderboard"))
# Folders of a track beside those of its models, which no model may be called.
FOLDERS = (LOGS, "extractor", "coder", "encode", "oracle", "leaderboard")
# Targets and rules of the workflow, which no division may be called.
RESERVED = ("all", "everything", "partial", "masks", "fetch", *STAGES)


SELECT_MINUTES = 120  # that a method may take where a track's needs say nothing


def limit_of(content: Mapping) -> float:
    """Minutes after which a method is taken for one without end."""
    given = content.get("needs", {})
    said = {**given.get("default", {}), **given.get("select", {})}
    return said.get("runtime", SELECT_MINUTES)


def needs_of(content: Mapping, stage: str) -> dict[str, int]:
    """What a job of a stage needs, by the content of a track of either kind."""
    given = content.get("needs", {})
    return {**STAGES[stage].needs, **given.get("default", {}), **given.get(stage, {})}
