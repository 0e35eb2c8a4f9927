"""Which jobs of a queue a killed run left. Cancelling them is tested against a real Slurm."""

import pytest

from prunebench.errors import UserError
from prunebench.runtime import leftovers

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
    assert leftovers.submitted(queue.strip(), "prunebench", here) == ["1", "5"]
    assert leftovers.submitted(queue.strip(), "", link) == ["6"]
    assert leftovers.submitted("", "prunebench", here) == []


def test_a_folder_may_have_any_name(tmp_path):
    odd = tmp_path / "a|b c"
    odd.mkdir()
    assert leftovers.submitted(f"12|p_{RUN}|{odd}\n", "p", odd) == ["12"]


def test_a_silent_slurm_stops_the_run_with_its_words(monkeypatch, tmp_path):
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match=r"Slurm does not answer.*Unable to contact"):
        leftovers.cancel("prunebench", tmp_path)
