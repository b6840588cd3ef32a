"""Checkpoints of a run: saving them, and restoring a run from one."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import auxiliaries
from run.history import LOGS, History
from support import processes, weights
from support.errors import InputError, first_few
from support.files import locked, replaced_file

LAST = "last.pth.tar"


@dataclass(frozen=True)
class StoredRun:
    """A run to resume: its folder and the content of its last.pth.tar."""

    folder: Path
    content: dict[str, dict]


def save(
    path: Path,
    history: History,
    minings: Sequence[np.ndarray],
    network: torch.nn.Module,
    parts: Mapping[str, object] | None = None,
) -> None:
    """Write a checkpoint. It holds only tensors and plain values.

    Args:
        minings: mined labels (N,) of all training images, for each mining.
        parts: what else has a state_dict ("optimizer", ...) and is needed to resume; None: do not store the training.
    """
    progress = {"rows": history.rows, "initial_scores": history.initial_scores, "contents": history.image_sets}
    progress["mined_labels"] = torch.from_numpy(in_smallest_type(np.stack(minings))) if minings else None
    content = {"format": weights.CHECKPOINT_FORMAT, "state_dict": network.state_dict()}
    content |= {"flags": history.flags, "provenance": history.provenance, "progress": progress}
    if parts is not None:
        training = {name: part.state_dict() for name, part in parts.items()}
        training |= {"epoch": history.epoch, "seconds": history.seconds, "spent": dict(history.spent)}
        content["training"] = training | {"random": auxiliaries.random_states(network.mean.device)}
    with replaced_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # PyTorch's archive writer raises this on a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_to_resume(path: Path, locks: contextlib.ExitStack) -> StoredRun:
    """Lock a run to resume, in the first process only, and read its last.pth.tar.

    Args:
        path: the run folder, or its last.pth.tar.
        locks: takes over the lock.

    Raises:
        InputError: another process trains the run, or it has no checkpoint to resume from.
    """
    folder = path.parent if path.name == LAST else path
    if not folder.is_dir():
        raise InputError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    if not (folder / LAST).is_file():
        inside = first_few(sorted(str(last.parent) for last in folder.glob(f"*/{LAST}")))
        hint = f"there are runs in it: {inside}" if inside else "it has no complete epoch, or is not a run folder"
        raise InputError(f"{folder}: no {LAST}; {hint}")
    if processes.is_first():
        locks.enter_context(locked(folder))
    content = weights.read_checkpoint(folder / LAST)
    if "training" not in content:
        raise InputError(f"{folder / LAST}: holds a network without the state of its training")
    return StoredRun(folder, content)


def restore_history(history: History, content: Mapping[str, dict]) -> list[np.ndarray]:
    """Restore a history from a checkpoint.

    Returns:
        The mined labels (N,) of each mining.

    Raises:
        InputError: the checkpoint is damaged.
    """
    progress, training = content["progress"], content["training"]
    try:
        history.rows, history.initial_scores = progress["rows"], dict(progress["initial_scores"])
        history.image_sets, history.spent = dict(progress["contents"]), training["spent"] | {}
        history.epoch, history.seconds = int(training["epoch"]), float(training["seconds"])
        mined = progress["mined_labels"]
        minings = [] if mined is None else list(mined.numpy())
        if len(minings) != len(history.mined_epochs) or history.rows.keys() != LOGS.keys() or history.epoch < 0:
            raise ValueError("its logs are not whole")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{history.folder / LAST}: {weights.OTHER_VERSION} ({error})") from error
    return minings


def complete_history(history: History) -> None:
    """Add to the history of an earlier version's run the values that are only in its last.pth.tar, if that exists.

    Raises:
        InputError: the checkpoint is damaged.
    """
    path = history.folder / LAST
    if path.exists():
        content = weights.read_checkpoint(path)
        history.initial_scores, history.image_sets = (
            content["progress"][part] for part in ("initial_scores", "contents")
        )
        training = content.get("training", {})
        history.seconds, history.spent = training.get("seconds", 0.0), training.get("spent", {})


def restore(content: Mapping[str, dict], network: torch.nn.Module, parts: Mapping[str, object]) -> None:
    """Restore network, parts and random states to what `save` wrote.

    Raises:
        InputError: the checkpoint does not fit them.
    """
    training = content["training"]
    try:
        network.load_state_dict(content["state_dict"])
        for name, part in parts.items():
            part.load_state_dict(training[name])
        auxiliaries.set_random_states(training["random"], network.mean.device)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{LAST}: does not hold the training state of this run ({reason})") from error


def in_smallest_type(labels: np.ndarray) -> np.ndarray:
    """Convert labels to the smallest integer type that holds them, of those that a checkpoint can hold."""
    return labels.astype(next(kind for kind in (np.uint8, np.int16, np.int32) if labels.max() <= np.iinfo(kind).max))
