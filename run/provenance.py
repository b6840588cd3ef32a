"""Where a run comes from: the program's version, the packages, the machine, the command."""

import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

from support import processes

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("program", "python", "torch", "torchvision", "faiss", "timm", "pytorch-metric-learning")
"""Entries that name a version; results may differ between two of them."""


def provenance(argv: Sequence[str], device: torch.device, names: Sequence[str]) -> dict[str, str]:
    """Return what starts a run now, all as plain text.

    argv: the command line behind the program's name. names: of the backbone and the losses, which may need packages.
    """
    entry = {"started": f"{datetime.now():%Y-%m-%d %H:%M:%S}", "command": command(argv), "program": program_version()}
    entry |= {"python": platform.python_version(), "torch": str(torch.__version__)}
    entry |= {"torchvision": version("torchvision"), "faiss": version("faiss-gpu", "faiss-cpu")}
    for package, prefix in (("timm", "timm/"), ("pytorch-metric-learning", "pml/")):
        if any(name.startswith(prefix) for name in names):
            entry[package] = version(package)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    cpu = f"CPU, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    n_processes, n_machines = processes.world_size(), processes.n_machines()
    counts = {"threads": torch.get_num_threads(), "processes": n_processes, "machines": n_machines}
    return entry | {"device": gpu or cpu} | {name: str(n) for name, n in counts.items()}


def command(argv: Sequence[str]) -> str:
    """Return the command line of this process, or of the processes of torchrun, as it can be pasted."""
    torchrun = f"torchrun --nnodes={processes.n_machines()} --nproc_per_node={processes.local_world_size()}"
    program = torchrun if processes.world_size() > 1 else "python"
    return f"{program} {shlex.join(['main.py', *argv])}"


def program_version() -> str:
    """Return the program's commit, and whether files were changed since, where it lies in a git checkout of its own."""

    def git(*arguments: str) -> str:
        """Return what git says of the program's folder."""
        done = subprocess.run(
            ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if git("rev-parse", "--show-toplevel") != str(ROOT):
            return "unknown: not in a git checkout"
        commit, changed = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown: git cannot be run"
    return f"commit {commit}{', with changed files' if changed else ''}"


def version(*packages: str) -> str:
    """Return the version of the first of some packages that is installed."""
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def as_text(entry: dict[str, str]) -> str:
    """Return the versions, the device and the numbers of threads and processes of an entry as one line."""
    versions = [f"{name} {entry[name]}" for name in VERSIONS[1:] if name in entry]
    several = f", processes {entry['processes']}, machines {entry['machines']}" if entry["processes"] != "1" else ""
    return f"{entry['program']}; {', '.join(versions)}; {entry['device']}, threads {entry['threads']}{several}"


def warning_of_threads(starts: Sequence[dict[str, str]]) -> str | None:
    """Return a warning where the last of a run's starts has another number of CPU threads than the one before."""
    *earlier, now = starts
    before = earlier[-1].get("threads") if earlier else None
    if before in (None, now["threads"]) or not now["device"].startswith("CPU"):
        return None
    return (
        f"warning: resumed on {now['threads']} CPU thread(s), after {before} before: the last digits will differ from "
        f"those of an uninterrupted run; set OMP_NUM_THREADS={before} to keep them"
    )
