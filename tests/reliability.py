"""What docs/reliability.md counts: which tests try which kind of harm, and how each has to end.

A test counts as one input per case, or as many as it says by `record_property`: "refused" (one line
that names what is wrong), "survived" (the right result all the same). A test that fails is an input
that was wrong in silence, or worse; a kind needs 0 of these.
"""

import json
import os
from collections import Counter
from pathlib import Path

OUTCOMES = ("refused", "survived")
VARIABLE = "PRUNEBENCH_RELIABILITY"  # where the counts of a session go

# Kind -> outcome -> tests, by file.
KINDS: dict[str, dict[str, dict[str, list[str]]]] = {
    "records: bits flipped, cut, edited, swapped, copied from other cells": {
        "refused": {
            "test_records": [
                "test_500_corruptions_of_a_finished_run_are_refused_by_name_or_harmless",
                "test_what_is_no_record_is_refused_by_name",
                "test_a_wrong_key_is_named",
                "test_another_cells_record_and_another_stages_are_refused",
                "test_what_a_record_was_made_from_is_checked",
            ],
            "test_leaderboard": [
                "test_rows_that_can_not_be_compared_are_refused",
                "test_a_copied_cell_and_a_changed_picture_are_refused",
            ],
            "test_again": ["test_a_forged_selection_fails_its_cell"],
        }
    },
    "tracks: slips of the keyboard at every key": {
        "refused": {
            "test_mutations": [
                "test_mutated_tracks_are_refused_by_name_or_harmless",
                "test_what_yaml_takes_in_another_sense",
                "test_what_is_no_text_file",
                "test_a_name_that_is_no_folder",
            ]
        }
    },
    "files outside runs/: changed, exchanged, known by a part of a hash": {
        "refused": {
            "test_outside": [
                "test_an_asset_is_the_file_that_the_run_began_with",
                "test_a_data_set_that_was_exchanged_under_a_run_is_refused",
                "test_a_record_of_another_data_set_is_refused",
                "test_weights_that_are_changed_while_they_are_read_are_refused",
                "test_a_part_of_a_hash_is_not_taken_for_the_whole",
            ],
            "test_latents": ["test_a_corrupt_part_is_found_when_it_is_drawn_and_mended_alone"],
        }
    },
    "checkpoints and pictures: damaged, foreign, several averages": {
        "refused": {
            "test_official": [
                "test_an_average_is_taken_or_refused_by_its_keys",
                "test_weights_that_are_not_finite_are_named",
                "test_what_a_download_left_in_place_of_a_file_is_named",
                "test_nothing_else_is_unpickled",
                "test_bad_files_are_named",
            ],
            "test_convert": [
                "test_what_is_no_picture_is_named_for_what_it_is",
                "test_a_broken_picture_of_an_archive_is_named_and_no_fork_is_one",
                "test_an_incomplete_imagenet_is_refused",
            ],
        }
    },
    "methods: that exit, crash, never end, train past the meter or break the contract": {
        "survived": {
            "test_child": [
                "test_work_that_does_not_end_says_why",
                "test_work_without_end_is_ended",
            ],
            "test_stages": ["test_a_method_that_does_not_come_back_fails_its_own_cell"],
            "test_methods": ["test_a_broken_file", "test_what_editors_leave_stops_no_method"],
        },
        "refused": {
            "test_selection": [
                "test_a_training_without_a_step_excuses_no_other",
                "test_a_training_excuses_no_change_that_comes_after_it",
            ]
        },
    },
    "GPUs: asked for and not usable": {
        "refused": {
            "test_gpus": [
                "test_a_job_that_cannot_use_its_gpu_fails_at_once_and_says_why",
                "test_what_torch_says_is_handed_on",
                "test_a_run_without_gpus_ends_before_its_first_job",
            ]
        }
    },
    "file systems: full, read-only, without locks, no home": {
        "survived": {
            "test_run": ["test_without_locks_the_mark_of_the_last_run_says_whether_it_lives"],
            "test_warm": [
                "test_a_run_goes_without_a_server_where_no_folder_can_be_made",
                "test_a_full_tmp_leaves_tmpdir",
            ],
            "test_fetch": ["test_a_cache_without_locks_is_written_all_the_same"],
        },
        "refused": {
            "test_artefacts": ["test_a_full_disk_is_the_users", "test_a_folder_that_is_a_file"],
            "test_fetch": ["test_a_full_disk", "test_a_read_only_cache"],
            "test_gpus": ["test_without_locks_one_gpu_is_taken_and_of_several_none"],
            "test_outside": [
                "test_without_a_home_the_remedy_is_named",
                "test_a_home_that_cannot_be_written_is_named_before_make_begins",
            ],
        },
    },
    "kills: of trainings, downloads, servers and their clients": {
        "survived": {
            "test_checkpoints": ["test_a_stage_killed_five_times_writes_the_same_weights"],
            "test_fetch": [
                "test_a_killed_download_goes_on_where_it_was",
                "test_a_killed_conversion_leaves_nothing_that_stays",
            ],
            "test_warm": [
                "test_killing_the_client_kills_the_whole_job",
                "test_jobs_do_not_outlive_the_owner",
                "test_what_killed_runs_left_goes_with_the_next_one",
                "test_what_a_job_leaves_running_is_ended",
            ],
            "test_artefacts": ["test_what_killed_processes_left_goes_with_the_next_write"],
        }
    },
}


def tests() -> dict[str, tuple[str, str]]:
    """Test, as "file::function" -> its kind and how it has to end."""
    return {
        f"{file}::{name}": (kind, outcome)
        for kind, outcomes in KINDS.items()
        for outcome, files in outcomes.items()
        for file, names in files.items()
        for name in names
    }


class Counts:
    """A plugin that counts what the tests of a session tried."""

    def __init__(self) -> None:
        self.found = {kind: Counter() for kind in KINDS}
        self.known = tests()

    def pytest_runtest_logreport(self, report) -> None:
        file, _, name = report.nodeid.partition("::")
        kind, outcome = self.known.get(f"{Path(file).stem}::{name.partition('[')[0]}", (None, ""))
        if kind is None or (report.when != "call" and not report.failed) or report.skipped:
            return
        told = {key: count for key, count in report.user_properties if key in OUTCOMES}
        self.found[kind].update({"wrong": 1} if report.failed else told or {outcome: 1})

    def pytest_sessionfinish(self, session) -> None:
        Path(os.environ[VARIABLE]).write_text(json.dumps(self.found))


def row(kind: str, counts: dict[str, int]) -> str:
    numbers = [counts.get(name, 0) for name in (*OUTCOMES, "wrong")]
    return f"| {kind} | {sum(numbers)} | {' | '.join(map(str, numbers))} |"
