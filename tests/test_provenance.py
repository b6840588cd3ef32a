"""Where a run says that it comes from."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from run import provenance

WORKERS = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "16", "RANK": "0", "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "0"}


@pytest.fixture
def copied(tmp_path):
    """A copy of run/provenance.py and what it imports, in a folder of a checkout; returns its folder."""
    for file in ("run/__init__.py", "run/provenance.py", "support/__init__.py", "support/processes.py"):
        (tmp_path / "program" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / "program" / file)
    checkout(tmp_path)
    return tmp_path / "program"


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    printed = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)
    return printed.stdout.decode()


def checkout(folder):
    """Make a folder a git checkout, all that it holds committed; return the commit as it is recorded."""
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    return f"commit {git(folder, 'rev-parse', 'HEAD')[:12]}"


def version_in(folder):
    """Return the version of the program that a copy in a folder records."""
    spec = importlib.util.spec_from_file_location("copied", folder / "run" / "provenance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.program_version()


def test_the_version_is_the_commit_of_a_checkout_of_its_own_and_whether_files_were_changed(copied, monkeypatch):
    assert version_in(copied) == "unknown"  # it lies in somebody's checkout
    monkeypatch.setenv("GIT_DIR", str(copied.parent / ".git"))  # as in a hook
    assert version_in(copied) == "unknown"
    monkeypatch.delenv("GIT_DIR")
    commit = checkout(copied)
    monkeypatch.setenv("GIT_DIR", str(copied.parent / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(copied.parent / ".git" / "index"))
    (copied / "results").touch()  # of runs
    os.utime(copied / "support" / "processes.py", (0, 0))
    index = (copied / ".git" / "index").read_bytes()
    assert version_in(copied) == commit
    assert (copied / ".git" / "index").read_bytes() == index  # git would lock and refresh it
    (copied / "support" / "processes.py").write_text("")
    assert version_in(copied) == f"{commit}, with changed files"
    (copied.parent / "link").symlink_to(copied)
    assert version_in(copied.parent / "link") == f"{commit}, with changed files"


@pytest.mark.parametrize("script", [None, "exit 0", "exit 1", "printf '\\377\\n'; exit 3"])
def test_a_git_that_is_missing_or_broken_stops_nothing(copied, monkeypatch, script):
    checkout(copied)
    (copied / "bin").mkdir()
    if script:
        (copied / "bin" / "git").write_text(f"#!{shutil.which('sh')}\n{script}\n")
        (copied / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(copied / "bin"))
    assert version_in(copied) == "unknown"


def test_a_folder_whose_name_is_no_text_stops_nothing_in_any_locale(copied):
    commit, folder = checkout(copied), copied.with_name("pr\udce9gram")
    try:
        copied.rename(folder)
    except OSError:
        pytest.skip("the file system wants names in UTF-8")
    script = "import json, sys, torch; from run.provenance import provenance; "
    script += "print(json.dumps(provenance(sys.argv[1:], torch.device('cpu'), [])))"
    locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    argv = [sys.executable, "-c", script, "--savename", os.fsencode("caf\udce9")]
    done = subprocess.run(argv, cwd=folder, env=os.environ | locale, capture_output=True, text=True, check=True)
    entry = json.loads(done.stdout)
    assert entry["program"] == commit
    assert entry["command"] == "python main.py --savename 'caf\udce9'"


def test_an_entry_is_plain_text_and_names_packages_where_they_are_used():
    entry = provenance.provenance([], torch.device("cpu"), ["timm/vit", "pml/TripletMarginLoss"])
    assert {type(value) for value in entry.values()} == {str}
    assert set(provenance.VERSIONS) <= {*entry}
    assert not {"timm", "pytorch-metric-learning"} & {*provenance.provenance([], torch.device("cpu"), ["resnet50"])}
    assert f"; torch {torch.__version__}; " in provenance.as_text(entry)
    assert provenance.version("no-such-package") == "unknown"


def test_commands_can_be_pasted_and_start_as_many_processes(monkeypatch):
    entry = provenance.provenance(["--savename", "a run's; name"], torch.device("cpu"), [])
    assert entry["command"] == "python main.py --savename 'a run'\"'\"'s; name'"
    resume = ["--resume", "a run"]
    assert provenance.command(resume, entry) == provenance.command(resume, {}) == "python main.py --resume 'a run'"
    standalone = "torchrun --standalone --nproc_per_node=4 main.py --resume 'a run'"
    assert provenance.command(resume, {"processes": "4"}) == standalone  # of a run from before machines were counted
    for name, value in WORKERS.items():
        monkeypatch.setenv(name, value)
    entry = provenance.provenance(["--bs", "8"], torch.device("cpu"), [])
    launcher = "torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 --nproc_per_node=8 main.py"
    assert entry["command"] == f"{launcher} --bs 8"
    assert provenance.command(resume, entry) == f"{launcher} --resume 'a run'"
    assert provenance.as_text(entry).endswith("; processes 16; machines 2")
