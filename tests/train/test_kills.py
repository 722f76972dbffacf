"""A part of the kill table (``kills.py``): what CI can afford of it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).parent / "kills.py"


def kill(corpus, root: Path, *arguments: str) -> str:
    """What the command prints, asserted to have found no fault.

    A process of its own: it forks, which this one, with its threads, must not.
    """
    done = subprocess.run(
        [sys.executable, str(KILLS), "--corpus", corpus.path, "--root", root, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_runs_killed_at_random_end_as_if_undisturbed(corpus, tmp_path):
    printed = kill(corpus, tmp_path, "--runs", "4", "--kills", "20", "--seed", "1")
    found = re.search(r"(\d+) kills in (\d+) runs", printed)
    assert found
    assert int(found.group(1)) >= 20
    assert int(found.group(2)) >= 4


@pytest.mark.slow
def test_a_kill_at_any_boundary_of_a_commit_leaves_the_last_checkpoint_or_the_new_one(
    corpus, tmp_path
):
    printed = kill(corpus, tmp_path, "--points", "999")
    for what in ("half of save_file", "before fsync", "before rename", "after rename", "rmdir"):
        assert what in printed


@pytest.mark.slow
def test_a_rank_killed_in_a_save_ends_the_others_and_the_run_goes_on(corpus, tmp_path):
    kill(corpus, tmp_path, "--points", "6", "--ranks", "2", "--stage", "2")
