"""Files of weights and checkpoints, read without executing any code in them."""

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from support.errors import OUT_OF_MEMORY, InputError, line_with
from support.packages import imported

CHECKPOINT_FORMAT = 4
"""Version of the checkpoint layout; checkpoints of other versions are rejected."""

OTHER_VERSION = "is not a checkpoint of this version of the program"


class Part(dict):
    """A part of a checkpoint. A missing key means that another version of the program wrote the checkpoint."""

    def __init__(self, path: Path, values: Mapping[str, object]):
        super().__init__(values)
        self.path = path

    def __missing__(self, key: str) -> None:
        raise InputError(f"{self.path}: {OTHER_VERSION}")


def read_file(path: str | Path, source: str) -> object:
    """Read a file written by torch.save, or a .safetensors file; no code in the file is executed.

    Args:
        source: name of the file in messages.

    Raises:
        InputError: the file is missing or damaged, or holds more than tensors and plain values, or safetensors cannot
            be imported.
    """
    if os.path.isdir(path):
        raise InputError(f"{source}: is a folder; give a file, such as the checkpoint.pth.tar of a run folder")
    if not os.path.isfile(path):
        raise InputError(f"{source}: no such file; give a torchvision state dict (.pth) or a checkpoint (.pth.tar)")
    library = None
    if Path(path).suffix == ".safetensors":
        library = imported("safetensors.torch", "safetensors", source)
    try:
        if library:
            return library.load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not check the checksums
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror})") from error
    except Exception as error:  # the unpickler raises almost anything on untrusted bytes
        if line_with(error, OUT_OF_MEMORY):
            raise
        reason = (
            f"cannot be read ({type(error).__name__}); it is damaged or truncated, or was not written by torch.save"
        )
        pickled = re.search(r"GLOBAL ([\w.]+)", str(error))
        if pickled:
            reason = f"holds a pickled object ({pickled[1][:80]}), which could run code when loaded; store tensors only"
        raise InputError(f"{source}: {reason}") from error


def is_state_dict(value: object) -> bool:
    """Tell whether a value is a non-empty dict of tensors by name."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def is_provenance(value: object) -> bool:
    """Tell whether a value is a list of the starts of a run, each a dict of plain text."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return False
    return all(isinstance(text, str) for entry in value for pair in entry.items() for text in pair)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in a file given with --weights, which may be a checkpoint.

    Raises:
        InputError: the file cannot be read, or holds no state dict.
    """
    source = f"--weights {path}"
    content = read_file(path, source)
    state = content["state_dict"] if isinstance(content, dict) and "state_dict" in content else content
    if not is_state_dict(state):
        raise InputError(f"{source}: holds no state dict of tensors; give one of torchvision (.pth) or a checkpoint")
    return state


def checkpoint_path(path: str | Path, checkpoint: str) -> Path:
    """Return the path of `checkpoint` in the run folder `path`, or `path` itself if it is a file.

    Raises:
        InputError: there is no such file.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path}: no such run folder or checkpoint file")
    if not (path / checkpoint).is_file():
        others = ", ".join(sorted(file.name for file in path.glob("*.pth.tar")))
        hint = f"name one of its checkpoints: {others}" if others else "it holds no checkpoint (*.pth.tar) at all"
        raise InputError(f"{path}: no {checkpoint} in this folder; {hint}")
    return path / checkpoint


def checkpoints_of(run: Path, checkpoint: str | None) -> list[Path]:
    """Return the checkpoints to score: the given one, or all best ones of a run.

    Raises:
        InputError: the run has none.
    """
    if checkpoint:
        return [run / checkpoint if (run / checkpoint).is_file() else Path(checkpoint)]
    return sorted(run.glob("checkpoint*.pth.tar")) or [checkpoint_path(run, "checkpoint.pth.tar")]


def read_checkpoint(path: str | Path, checkpoint: str = "checkpoint.pth.tar") -> dict[str, dict]:
    """Read a checkpoint; no code in the file is executed.

    Args:
        path: a run folder, or a checkpoint file.
        checkpoint: name of the checkpoint in the run folder.

    Returns:
        {"state_dict", "flags", "progress"} and, if it can be resumed, "training".

    Raises:
        InputError: the checkpoint cannot be used; the message is one line.
    """
    path = checkpoint_path(path, checkpoint)
    stored = read_file(path, str(path))
    stored = Part(path, stored if isinstance(stored, dict) else {})
    is_ours = isinstance(stored["format"], int) and stored["format"] == CHECKPOINT_FORMAT
    is_ours = is_ours and is_state_dict(stored["state_dict"]) and is_provenance(stored["provenance"])
    parts = {"flags", "progress", *({"training"} & stored.keys())}
    is_ours = is_ours and all(isinstance(stored[name], dict) for name in parts)
    mined = stored["progress"].get("mined_labels") if is_ours else None
    if not is_ours or not (mined is None or (isinstance(mined, Tensor) and mined.ndim == 2)):
        raise InputError(f"{path}: {OTHER_VERSION}")
    return stored | {name: Part(path, stored[name]) for name in parts}
