"""The real workflow on a real Slurm: nodes, jobs, files and the controller fail, results do not."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import pytest
import yaml
from project import ROOT, Project

from prunebench import tracks
from prunebench.evaluation import metrics
from prunebench.records import sealed

BOX = ROOT / "tests" / "slurmbox.sh"
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
COMMAND = ("snakemake", "--cores", "all", "--profile", "slurm", "--config", "track=tiny")
STATE_SECONDS = 240  # the slowest that is waited for: a time limit of a minute, on a busy machine
RUN_SECONDS = 900
RETRIES = yaml.safe_load((ROOT / "slurm" / "config.yaml").read_text())["retries"]
MEMORY_MB = 2000
MINUTES = 10
LOST = "runs/tiny/dit/lost/0.25/selection-finetune-low/seed0"  # of the selection that trains
LOST_LOG = "runs/tiny/logs/dit/lost/0.25/selection-finetune-low/seed0/select.log"

# One model and seed, two methods; the rest of smoke. Its `needs` send what computes to the GPUs.
METHODS = ("dense", "random_layers")
CHANGES = {
    "seeds": [0],
    "checkpoint_seconds": 0,
    "methods": {"folders": ["few"]},
    "needs": {
        "default": {"mem_mb": MEMORY_MB, "runtime": MINUTES, "gpu": 1, "cpu_instead": True},
        "extractor": {"gpu": 0},
        "score": {"gpu": 0},
    },
}

FAULTY = '''"""{idea}."""

import copy
import time
from pathlib import Path

import torch

KIND = "layers"
{constants}


def select(context):
    model = copy.deepcopy(context.model)
    {fault}
    plan = context.plan_layers(context.layers())
    for layer in plan.layers:
        context.family.remove_layer(model, layer)
    return plan, model
'''
PLAIN, TRAINS = 'RECOVERY = "never"', 'TRAINS = True\nRECOVERY = "required"'
HOLD = (
    "Path('reached-{name}').touch()\n"
    "    while Path('hold-{name}').exists():\n        time.sleep(0.1)"
)
SIZES = ("parameters", "nonzero_parameters", "sparsity_reached", "macs")
RULES = {"extractor", "dense", "select", "cost", "recover", "sample", "score"}
HELD = ("lost", "cancelled", "slow")
TRAIN = "context.train(model, context.train_images // 2)\n    "
# Between what a first and a second attempt are given, whatever torch itself takes.
ALLOCATE = f"block = torch.ones({3 * MEMORY_MB // 4} << 18)\n    time.sleep(4)\n    del block"
LIMIT = (  # stands for a full disk where nothing may be mounted
    "import resource\n    if Path('hold-{name}').exists():\n"
    "        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))"
)

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Job:
    """A job of the workflow as Slurm's controller remembers it."""

    number: int
    rule: str
    cell: str  # its wildcards, joined by "_"
    state: str
    partition: str
    node: str
    memory: str
    minutes: int
    cpus: int
    gpus: int
    exclusive: bool

    @classmethod
    def read(cls, line: str) -> Self:
        """From a line of `scontrol show job`; Snakemake's comment says what it is."""
        said = dict(re.findall(r"(\S+?)=(\S*)", line))
        rule, _, cell = said["Comment"].removeprefix("rule_").partition("_wildcards_")
        hours, minutes, _ = map(int, said["TimeLimit"].split(":"))
        gpus = re.search(r"gpu:fake:(\d+)", said.get("JOB_GRES", ""))  # once it runs
        return cls(
            number=int(said["JobId"]),
            rule=rule,
            cell=cell,
            state=said["JobState"],
            partition=said["Partition"],
            node=said["NodeList"],
            memory=said["MinMemoryNode"],
            minutes=60 * hours + minutes,
            cpus=int(said["CPUs/Task"]),
            gpus=int(gpus.group(1)) if gpus else 0,
            exclusive=said["OverSubscribe"] == "NO",
        )

    @property
    def method(self) -> str:
        return self.cell.split("_")[2]  # after the model and its dense seed, which is empty here


class Cluster:
    """A running box."""

    def __init__(self, box: Path):
        self.environment = {
            "BOX": str(box),
            "SLURM_CONF": f"{box}/etc/slurm.conf",
            "PATH": f"{box}/bin:{os.environ['PATH']}",
        }

    def run(self, *command: str) -> str:
        environment = {**os.environ, **self.environment}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout

    def jobs(self) -> list[Job]:
        """Every job since the box was started, oldest first."""
        listing = self.run("scontrol", "show", "job", "--oneliner", "--details").splitlines()
        return [Job.read(line) for line in listing if "Comment=rule_" in line]

    def selections(self, method: str) -> list[Job]:
        return [job for job in self.jobs() if job.rule == "select" and job.method == method]

    def states(self, method: str) -> list[str]:
        """Of the jobs that a faulty method ran in."""
        return [job.state for job in self.selections(method)]


def until(condition: Callable[[], object], process: subprocess.Popen, what: str) -> None:
    """Wait for something that happens while the controller `process` runs."""
    deadline = time.monotonic() + STATE_SECONDS
    while not condition():
        assert process.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"gave up waiting for {what}"
        time.sleep(0.3)


def installed() -> bool:
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    programs = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
    return all(shutil.which(name, path=path) for name in programs)


def install() -> None:
    """Install Slurm, or skip; in CI .ci/run has installed it, or ended the run."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        if not installed():
            if not shutil.which("apt-get"):
                pytest.skip(f"no Slurm, and no apt-get to install {' '.join(PACKAGES)}")
            subprocess.run(["apt-get", "-qq", *command], env=quiet, check=False)
    if not installed():
        pytest.skip(f"apt-get could not install {' '.join(PACKAGES)}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A box that ends with this process, however that ends."""
    install()
    # Not below pytest's folder, which is closed to others: munge wants its socket to be reachable.
    cluster = Cluster(Path(tempfile.gettempdir()) / f"slurmbox-{secrets.token_hex(4)}")
    wait = "echo up; exec tail --pid=$0 --follow /dev/null"
    process = subprocess.Popen(
        [BOX, "run", "sh", "-c", wait, str(os.getpid())],
        env={**os.environ, **cluster.environment},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "up\n", "Slurm did not start"
        yield cluster
    finally:
        process.terminate()
        process.wait(120)


def make_project(folder: Path, environment: dict[str, str]) -> Project:
    project = Project(folder, environment)
    content = yaml.safe_load((folder / "config" / "smoke.yaml").read_text())
    content |= CHANGES
    content["models"] = {"dit": content["models"]["dit"]}
    content["divisions"] = {"matched": content["divisions"]["matched"]}
    del content["oracle"]
    (folder / "config" / "tiny.yaml").write_text(yaml.safe_dump(content))
    (folder / "few").mkdir()
    for name in METHODS:
        shutil.copy(folder / "methods" / f"{name}.py", folder / "few")
    return project


@pytest.fixture(scope="module")
def project(cluster, tmp_path_factory) -> Project:
    """The tiny track, finished on the cluster."""
    project = make_project(tmp_path_factory.mktemp("cluster"), cluster.environment)
    project.status, project.output = project.run(*COMMAND, timeout=RUN_SECONDS)
    project.jobs = cluster.jobs()
    return project


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Project:
    """The same track on this machine."""
    project = make_project(tmp_path_factory.mktemp("local"), {})
    project.status, project.output = project.run(
        *[word for word in COMMAND if word not in ("--profile", "slurm")]
    )
    return project


def tiny(project: Project) -> tracks.Track:
    here = Path.cwd()
    os.chdir(project.folder)  # a track's folders of methods are relative
    try:
        return tracks.load("tiny")
    finally:
        os.chdir(here)


def sound_records(project: Project) -> dict[Path, bytes]:
    """All records; each must vouch for whole files beside it."""
    records = project.records("tiny")
    for record in records:
        sealed.read(record)
    return records


def test_the_run_on_slurm_finishes(project):
    assert project.status == 0, project.output[-3000:]
    assert len(project.rows("tiny")) == len(tiny(project).cells())
    assert all(row["status"] == "ok" for row in project.rows("tiny"))


def test_every_compute_rule_is_a_job_with_what_it_asks_for(project):
    track, jobs = tiny(project), project.jobs
    assert {job.rule for job in jobs} == RULES
    records = [file for file in project.records("tiny") if file.name != "assets.json"]
    assert len(jobs) == len(records)  # each was made by one job; assets are the login node's
    assert {job.state for job in jobs} == {"COMPLETED"}
    for job in jobs:
        asked = track.needs(job.rule)
        assert job.partition == ("gpu" if asked["gpu"] else "cpu")
        assert job.node.startswith(job.partition)
        assert job.gpus == asked["gpu"]
        assert job.memory == f"{asked['mem_mb']}M"
        assert (job.minutes, job.cpus) == (asked["runtime"], asked["cpus"])
        assert job.exclusive == (job.rule == "cost")


def test_numbers_are_those_of_a_local_run(project, local):
    assert local.status == 0, local.output[-3000:]
    for file in project.scores("tiny"):
        ours, theirs = (
            json.loads((folder / file.relative_to(project.folder)).read_text())
            for folder in (project.folder, local.folder)
        )
        for part in ("quality", "size", "plan"):
            assert ours[part] == theirs[part], f"{part} of {file}"
    compared = {f"{name}_mean" for name in (*metrics.metrics(), *SIZES)}
    boards = [
        [{key: row[key] for key in row.keys() & {"method", "recovery", "rank", *compared}}
         for row in finished.rows("tiny")]
        for finished in (project, local)
    ]  # fmt: skip
    assert boards[0] == boards[1]
    assert boards[0][0]["fid_mean"]


# ---- faults


@dataclass
class Run:
    """A command given to the project: how it ended, and the records and jobs around it."""

    status: int
    output: str
    before: dict[Path, bytes]
    after: dict[Path, bytes]
    jobs: list[Job] = field(default_factory=list)  # the run's own


def add_method(project: Project, name: str, fault: str, hold: bool = False) -> None:
    constants = TRAINS if fault.startswith(TRAIN) else PLAIN
    fault = fault.format(name=name)
    text = FAULTY.format(idea=f"Faulty: {name}", name=name, constants=constants, fault=fault)
    (project.folder / "few" / f"{name}.py").write_text(text)
    if hold:
        (project.folder / f"hold-{name}").touch()


def release(project: Project, name: str) -> None:
    (project.folder / f"hold-{name}").unlink()


def reached(project: Project, *names: str) -> Callable[[], bool]:
    """Whether the methods have got where they wait for their release."""
    return lambda: all((project.folder / f"reached-{name}").exists() for name in names)


def perform(
    project: Project, cluster: Cluster, script: Callable[[subprocess.Popen], None] | None = None
) -> Run:
    """Give the command; `script` interferes while it runs."""
    before, done = sound_records(project), len(cluster.jobs())
    log = project.folder / "output"
    with log.open("w") as handle:
        process = project.start(*COMMAND, stdout=handle)
        try:
            if script:
                script(process)
            status = process.wait(RUN_SECONDS)
        finally:
            process.kill()
    return Run(status, log.read_text(), before, sound_records(project), cluster.jobs()[done:])


def nothing_lost(run: Run) -> bool:
    return {file: run.after.get(file) for file in run.before} == run.before


@pytest.fixture(scope="module")
def killed(project, cluster) -> Run:
    """The controller is killed while jobs of methods that misbehave run."""
    for name, fault, hold in (
        ("lost", TRAIN + HOLD, True),
        ("cancelled", HOLD, True),
        ("slow", HOLD, True),
        ("greedy", ALLOCATE, False),
        ("broken", "raise ValueError('no such luck')", False),
    ):
        add_method(project, name, fault, hold)

    def script(process):
        until(reached(project, *HELD), process, "the methods began")
        # Finished, but the controller has not looked yet.
        until(lambda: cluster.states("broken") == ["COMPLETED"], process, "a job ended")
        process.send_signal(signal.SIGKILL)

    return perform(project, cluster, script)


@pytest.fixture(scope="module")
def terminated(project, cluster, killed) -> Run:
    """The same command again: machine and users interfere, at last a SIGTERM.

    One job finds that what an earlier one saved of its training was cut short; its next attempt
    finds what it saved itself.
    """
    (saved,) = (project.folder / LOST).glob("training/select/*.pt")
    os.truncate(saved, saved.stat().st_size // 2)

    def begun(name: str) -> bool:
        states = cluster.states(name)
        return len(states) == 2 and states[1] == "RUNNING" and reached(project, name)()

    def script(process):
        for name in HELD:
            (project.folder / f"reached-{name}").unlink()
        until(lambda: all(map(begun, HELD)), process, "their second jobs")
        limited = cluster.selections("slow")[1].number
        cluster.run("scontrol", "update", f"JobId={limited}", "TimeLimit=1")
        project.lost_log = (project.folder / LOST_LOG).read_text()
        crashed = cluster.selections("lost")[1].node
        cluster.run(str(BOX), "node-crash", crashed)
        release(project, "lost")
        cluster.run("scancel", str(cluster.selections("cancelled")[1].number))
        release(project, "cancelled")
        until(lambda: "TIMEOUT" in cluster.states("slow"), process, "the time limit")
        release(project, "slow")
        cluster.run(str(BOX), "node-start", crashed)
        select = project.folder / "runs/tiny/dit/slow/0.25/selection/seed0/select.json"
        until(select.exists, process, "the job that timed out was repeated")
        process.send_signal(signal.SIGTERM)

    return perform(project, cluster, script)


def full_disk(folder: Path) -> bool:
    """Let nothing over 64 kB fit into the folder; False where mounting is not allowed."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def damaged(project, cluster, terminated) -> Run:
    """The same command again, after a file was cut short and while a disk is full.

    Without retries, which would only repeat both failures here.
    """
    weights = project.folder / "runs/tiny/dit/slow/0.25/selection/seed0/model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    small = project.folder / "runs/tiny/dit/full"
    mounted = full_disk(small)
    add_method(project, "full", "pass" if mounted else LIMIT, hold=not mounted)
    before, done = project.records("tiny"), len(cluster.jobs())
    try:
        status, output = project.run(*COMMAND, "--retries", "0", timeout=RUN_SECONDS)
        return Run(status, output, before, project.records("tiny"), cluster.jobs()[done:])
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", small], check=True)


@pytest.fixture(scope="module")
def mended(project, cluster, damaged) -> Run:
    """The same command again, after doing what the messages said: more space, a file deleted."""
    (project.folder / "hold-full").unlink(missing_ok=True)
    for record in advice(project, damaged, "cost", r"is corrupt.* delete (\S+) and run again"):
        (project.folder / record).unlink()
    return perform(project, cluster)


def advice(project: Project, run: Run, rule: str, pattern: str) -> set[str]:
    """What a pattern finds in the logs that the run's output names for failed jobs of a rule."""
    errors = re.findall(rf"Error in rule {rule}:\n.*?\n    log: ([^\s,]+)", run.output, re.DOTALL)
    logs = [(project.folder / log).read_text() for log in errors]
    return {match for log in logs for match in re.findall(pattern, log)}


def test_a_killed_controller_leaves_only_whole_records(killed):
    assert killed.status == -signal.SIGKILL
    assert nothing_lost(killed)


def test_jobs_left_by_a_killed_controller_are_cancelled(cluster, killed, terminated):
    left = [job for job in killed.jobs if job.state in ("PENDING", "RUNNING")]
    ended = {job.number: job.state for job in cluster.jobs()}
    assert set(HELD) <= {job.method for job in left}
    assert all(ended[job.number] in ("CANCELLED", "COMPLETED", "FAILED") for job in left)
    assert "Slurm jobs of a killed run" in terminated.output
    assert nothing_lost(terminated)


@pytest.mark.parametrize(
    ("method", "state"),
    [
        ("lost", "NODE_FAIL"),
        ("cancelled", "CANCELLED"),
        ("slow", "TIMEOUT"),
        ("greedy", "OUT_OF_MEMORY|FAILED"),
    ],
)
def test_a_job_that_fails_is_tried_again_with_more(terminated, method, state):
    jobs = [job for job in terminated.jobs if job.rule == "select" and job.method == method]
    assert 2 <= len(jobs) <= 1 + RETRIES
    assert re.fullmatch(state, jobs[0].state)
    assert jobs[-1].state == "COMPLETED"
    for attempt, job in enumerate(jobs, 1):
        assert job.memory == f"{attempt * MEMORY_MB}M"
        assert job.minutes == (1 if job.state == "TIMEOUT" else attempt * MINUTES)


def test_a_training_cut_short_is_done_anew_and_a_whole_one_goes_on(project, local, terminated):
    assert "a saved training can't be used and is done anew" in project.lost_log
    assert "is corrupt" in project.lost_log
    record = sealed.read(project.folder / LOST / "select.json")
    assert record.training.resumed == 1
    add_method(local, "lost", TRAIN + HOLD)
    cell = ("--model=dit", "--method=lost", "--sparsity=0.25", "--recovery=finetune-low")
    status, output = local.run("prunebench", "select", "--track=tiny", *cell, "--seed=0")
    assert status == 0, output
    uninterrupted = sealed.read(local.folder / LOST / "select.json")
    assert uninterrupted.training.resumed == 0
    assert record.files == uninterrupted.files


def test_sigterm_ends_the_run_in_good_order(terminated, damaged):
    assert terminated.status == 1
    assert "the same snakemake command tries them again" in terminated.output
    assert not [job for job in terminated.jobs if job.state in ("PENDING", "RUNNING")]
    # What was running was waited for, what would have followed it was not begun.
    assert any("/slow/" in str(file) for file in terminated.after)
    assert {job.rule for job in terminated.jobs if job.method == "slow"} == {"select"}
    assert nothing_lost(damaged)


def test_a_file_cut_short_is_named_and_stops_what_needs_it_only(project, damaged):
    assert damaged.status == 1
    assert "the same snakemake command tries them again" in damaged.output
    (record,) = advice(project, damaged, "cost", r"is corrupt.* delete (\S+) and run again")
    assert record.endswith("slow/0.25/selection/seed0/select.json")
    assert not any("/slow/" in str(file) for file in damaged.after.keys() - damaged.before.keys())


def test_a_full_disk_is_named_and_leaves_no_half_file(project, damaged):
    (message,) = advice(project, damaged, "select", r"cannot write .*")
    assert "/full/" in message
    assert "free space" in message
    jobs = [job for job in damaged.jobs if job.rule == "select" and job.method == "full"]
    assert [job.state for job in jobs] == ["FAILED"]
    assert not any("/full/" in str(file) for file in damaged.after)


def test_the_rest_goes_on(project, damaged):
    finished = {file.relative_to(project.folder).parts[3] for file in damaged.after
                if file.name == "score.json"}  # fmt: skip
    assert finished == {*METHODS, "lost", "cancelled", "greedy", "broken"}


def test_the_command_finishes_what_was_mended_and_nothing_else(project, mended):
    assert mended.status == 0, mended.output[-3000:]
    assert nothing_lost(mended)
    assert {job.method for job in mended.jobs} == {"slow", "full"}
    assert len(mended.jobs) == len(mended.after) - len(mended.before)
    rows = {row["method"]: row for row in project.rows("tiny")}
    assert {row["status"] for name, row in rows.items() if name != "broken"} == {"ok"}


def test_a_method_that_raises_is_a_row_with_its_reason_and_log(project, mended):
    assert "1 of 9 cells failed" in mended.output
    (row,) = [row for row in project.rows("tiny") if row["method"] == "broken"]
    assert row["status"] == "failed" and not row["fid_mean"]
    table = (project.folder / "runs/tiny/leaderboard/matched/leaderboard.md").read_text()
    assert "ValueError: no such luck" in table
    log = project.folder / re.search(r"runs/tiny/logs/dit/broken\S*?\.log", table).group()
    assert "no such luck" in log.read_text()
