"""Where a run says that it comes from."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from run import provenance

SCRIPT = """
import json, sys, torch
from run.provenance import as_text, provenance
entry = provenance(sys.argv[1:], torch.device("cpu"), ["resnet50", "marginloss"])
print(json.dumps([entry, as_text(entry)]))
"""


def entry_of(folder, *argv, **environment):
    """Return what a copy of the program in a folder says, as a dict and as a line."""
    command = [sys.executable, "-c", SCRIPT, *argv]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture
def copied(tmp_path):
    """A copy of what provenance needs, not in a checkout; returns its folder."""
    for room in ("run", "support"):
        (tmp_path / "program" / room).mkdir(parents=True)
    for file in ("run/__init__.py", "run/provenance.py", "support/__init__.py", "support/processes.py"):
        (tmp_path / "program" / file).write_text((ROOT / file).read_text())
    return tmp_path / "program"


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_version_is_the_commit_and_whether_files_were_changed(copied):
    assert entry_of(copied)[0]["program"] == "unknown: not in a git checkout"
    git(copied, "init")
    git(copied, "add", ".")
    git(copied, "commit", "-m", "first")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=copied, capture_output=True, text=True).stdout[:12]
    entry, line = entry_of(copied)
    assert entry["program"] == f"commit {commit}"
    assert line.startswith(f"commit {commit}; python ")
    (copied / "results").mkdir()  # of runs
    (copied / "results" / "new").touch()
    assert entry_of(copied)[0]["program"] == f"commit {commit}"
    with open(copied / "support" / "processes.py", "a") as file:
        file.write("\n")
    assert entry_of(copied)[0]["program"] == f"commit {commit}, with changed files"


def test_a_checkout_that_the_program_lies_in_is_not_its_own(copied):
    git(copied.parent, "init")
    git(copied.parent, "add", ".")
    git(copied.parent, "commit", "-m", "first")
    assert entry_of(copied)[0]["program"] == "unknown: not in a git checkout"
    assert entry_of(copied, PATH=str(copied))[0]["program"] == "unknown: git cannot be run"


def test_the_command_can_be_pasted_and_all_values_are_plain_text(copied):
    entry, line = entry_of(copied, "--savename", "a run's; name")
    assert entry["command"] == "python main.py --savename 'a run'\"'\"'s; name'"
    assert {type(value) for value in entry.values()} == {str}
    assert entry["torch"] == torch.__version__
    assert (entry["processes"], entry["machines"]) == ("1", "1")
    assert line.endswith(f", threads {entry['threads']}")
    assert f"torch {torch.__version__}" in line
    assert "processes" not in line
    workers = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "4", "RANK": "0", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    entry, line = entry_of(copied, "--bs", "8", **workers)
    assert entry["command"] == "torchrun --nnodes=2 --nproc_per_node=2 main.py --bs 8"
    assert line.endswith(", processes 4, machines 2")


def test_versions_of_optional_packages_are_told_where_they_are_used():
    entry = provenance.provenance([], torch.device("cpu"), ["timm/vit", "pml/TripletMarginLoss"])
    others = {"started", "command", "device", "threads", "processes", "machines"}
    assert set(provenance.VERSIONS) == {*entry} - others
    assert provenance.version("no-such-package") == "unknown"
