"""Provenance of a run: versions of the program and the packages, the machine, the command."""

import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

from support import processes

VERSIONS = ("program", "python", "torch", "torchvision", "faiss", "timm", "pytorch-metric-learning")
"""Entries that name a version; results may differ between two versions."""


def provenance(argv: Sequence[str], device: torch.device, names: Sequence[str]) -> dict[str, str]:
    """Return the provenance of a start of a run as plain text.

    Args:
        argv: the command line after the program's name.
        device: the device that the run uses.
        names: names of the backbone and the losses, which may need packages.
    """
    counts = {"processes": str(processes.world_size()), "machines": str(processes.n_machines())}
    entry = {"started": f"{datetime.now():%Y-%m-%d %H:%M:%S}", "command": command(argv, counts)}
    entry |= {"program": program_version(), "python": platform.python_version(), "torch": str(torch.__version__)}
    entry |= {"torchvision": version("torchvision"), "faiss": version("faiss-gpu", "faiss-cpu")}
    for package, prefix in (("timm", "timm/"), ("pytorch-metric-learning", "pml/")):
        if any(name.startswith(prefix) for name in names):
            entry[package] = version(package)
    cpu = f"CPU, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    entry["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return entry | {"threads": str(torch.get_num_threads())} | counts


def command(argv: Sequence[str], start: Mapping[str, str]) -> str:
    """Return a command line of main.py to paste, for as many processes and machines as an earlier start used.

    With several machines it has to be run on each of them, with one of them in place of HOST.

    Args:
        argv: the command line after the program's name.
        start: provenance of that start.
    """
    n_processes, n_machines = (int(start.get(name, "1")) for name in ("processes", "machines"))
    several = f"--nnodes={n_machines} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
    launcher = f"torchrun {several if n_machines > 1 else '--standalone'} --nproc_per_node={n_processes // n_machines}"
    return f"{launcher if n_processes > 1 else 'python'} {shlex.join(['main.py', *argv])}"


def program_version() -> str:
    """Return the commit of the program's git checkout and whether files were changed since; "unknown" without one."""
    words = "git --no-optional-locks --git-dir=.git --work-tree=. status --porcelain=v2 --branch --untracked-files=no"
    # Git sets GIT_* variables for hooks; they may point to another repository
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    options = {"cwd": Path(__file__).parent.parent, "env": environment, "stderr": subprocess.DEVNULL, "timeout": 20}
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        commit, *lines = subprocess.check_output(words.split(), **options).decode(errors="replace").splitlines()
        changed = any(not line.startswith("#") for line in lines)
        return f"commit {commit.removeprefix('# branch.oid ')[:12]}{', with changed files' if changed else ''}"
    return "unknown"


def version(*packages: str) -> str:
    """Return the version of the first of some packages that is installed; "unknown" if none is."""
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return "unknown"


def as_text(entry: Mapping[str, str]) -> str:
    """Return an entry as one line, without time and command."""
    return "; ".join(f"{name} {text}" for name, text in entry.items() if name not in ("started", "command"))


def warning_of_threads(starts: Sequence[dict[str, str]]) -> str | None:
    """Return a warning if a run on the CPU was resumed with another number of threads, else None.

    Args:
        starts: provenance of each start of the run, oldest first.
    """
    *earlier, now = starts
    before = earlier[-1].get("threads") if earlier else None
    if before in (None, now["threads"]) or not now["device"].startswith("CPU"):
        return None
    return (
        f"resumed on {now['threads']} CPU thread(s), after {before} before: the last digits will differ from "
        f"those of an uninterrupted run; set OMP_NUM_THREADS={before} to keep them"
    )
