"""What a run asks of Slurm, with scripts for squeue and scancel; test_slurm.py has a real Slurm."""

import asyncio
from types import SimpleNamespace

import pytest

from prunebench.errors import UserError
from prunebench.runtime import slurm

RUN = "38700f2b-2539-4467-ab2b-6fb74a530f18"


def test_only_this_folders_jobs_of_snakemake_are_found(tmp_path):
    here, link = tmp_path / "here", tmp_path / "link"
    here.mkdir()
    link.symlink_to(here)
    queue = f"""
        1|prunebench_{RUN}|{here}
        2|prunebench_{RUN}|{tmp_path}
        3|prunebench_controller|{here}
        4|other_{RUN}|{here}
        5|prunebench_{RUN}|{link}
        6|{RUN}|{here}
        7|interactive|{here}
    """
    assert slurm.submitted(queue.strip(), "prunebench", here) == ["1", "5"]
    assert slurm.submitted(queue.strip(), "", link) == ["6"]
    assert slurm.submitted("", "prunebench", here) == []


def test_a_folder_may_have_any_name(tmp_path):
    odd = tmp_path / "a|b c"
    odd.mkdir()
    assert slurm.submitted(f"12|p_{RUN}|{odd}\n", "p", odd) == ["12"]


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Puts shell scripts in the place of squeue and scancel; `queue.txt` is what squeue prints."""

    def put(**scripts: str) -> None:
        for name, script in scripts.items():
            file = tmp_path / name
            file.write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
            file.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.01)
    return put


def test_a_silent_slurm_stops_the_run_with_its_words(commands, tmp_path):
    commands(squeue="echo 'Unable to contact slurm controller' >&2\nexit 1")
    with pytest.raises(UserError, match=r"Slurm does not answer.*Unable to contact"):
        slurm.cancel("prunebench", tmp_path)


def test_a_machine_without_slurm_is_told_where_to_go(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"squeue can't be run here.*login node"):
        slurm.cancel("prunebench", tmp_path)


def test_lines_that_are_no_jobs_are_passed_over(tmp_path):
    queue = f"CLUSTER: one\n1|prunebench_{RUN}|{tmp_path}\n\nCLUSTER: two\n"
    assert slurm.submitted(queue, "prunebench", tmp_path) == ["1"]


def test_old_squeues_are_asked_in_words_that_they_know(commands, tmp_path):
    commands(squeue='case "$*" in *--me*) echo "unrecognized option" >&2; exit 1;; esac')
    assert slurm.cancel("prunebench", tmp_path) == ([], [])


def test_a_job_that_ended_before_it_was_cancelled_is_gone(commands, tmp_path):
    (tmp_path / "queue.txt").write_text(f"7|prunebench_{RUN}|{tmp_path}\n")
    commands(squeue="cat queue.txt", scancel="echo -n > queue.txt; echo invalid >&2; exit 1")
    assert slurm.cancel("prunebench", tmp_path) == (["7"], [])


def test_preempted_jobs_are_submitted_again_as_failed_ones_are():
    async def query_job_status(command, logger):
        return (None, None) if command == "down" else ({"1": "PREEMPTED", "2": "RUNNING"}, 0.1)

    plugin = SimpleNamespace(query_job_status=query_job_status)
    slurm.resubmit_preempted(plugin)
    found = asyncio.run(plugin.query_job_status("squeue", None))
    assert found == ({"1": "FAILED", "2": "RUNNING"}, 0.1)
    assert asyncio.run(plugin.query_job_status("down", None)) == (None, None)


def test_the_plugin_asks_for_states_where_they_are_changed():
    import snakemake_executor_plugin_slurm as plugin

    assert "query_job_status" in plugin.Executor.check_active_jobs.__code__.co_names
