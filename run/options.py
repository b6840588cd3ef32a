"""Flags of main.py: their types, checks of their combinations, and which ones a resumed run keeps."""

import argparse
import contextlib
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import torch

import losses
from data.locate import check_name
from data.published import dataset_info
from run.checkpoint import LAST, StoredRun, read_to_resume
from run.history import read_flags, shown
from support import packages, processes
from support.errors import InputError, OneLineParser
from support.output import log

TASKS = ("Class", "Shared")
PAIRS = ("task_p", "cs_per_bs", "embed_sizes", "losses", "sampling", "proxy_lr", "beta", "beta_lr", "nu", "margin")
"""Flags with one value for the Class task and one for the Shared task."""

MACHINE = ("gpu", "kernels", "cache", "source_path")
"""Flags that change no result and may be changed when a run is resumed."""

START = ("resume", "go_on")
"""Flags that say which run is meant; they are not stored with it."""

OUTPUT = (*START, "savename", "save_path", "tensorboard", "make_graph", "eval_shared")
"""Flags that change no result, only what is written and where; a resumed run keeps those that are stored."""

GIVEN_ANEW = f"{', '.join(f'--{flag}' for flag in MACHINE)} and a larger --n_epochs"
"""What may be changed when a run is resumed, in words."""


class FlagHelpFormatter(argparse.HelpFormatter):
    """Help formatter that shows list defaults as they are typed."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False or action.default == argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: {shown(action.default) or 'empty'})"


def as_typed(flag: str, value: object) -> str:
    """Return a flag with its value, to paste into a command line; "no --flag" if the flag is not given."""
    if value is None or value is False:
        return f"no --{flag}"
    values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
    return shlex.join([f"--{flag}", *map(str, values)])


def number(kind: type, holds: Callable[[float], bool], words: str) -> Callable[[str], float]:
    """Return an argparse type for numbers.

    Args:
        kind: int or float.
        holds: condition on the number; it must be false for NaN.
        words: the condition in words, for the error message.
    """

    def convert(text: str) -> float:
        """Return the number; see argparse."""
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {words}")
        return value

    return convert


def whole(least: int, most: int = 10**9) -> Callable[[str], int]:
    """Return an argparse type: a whole number from `least` to `most`."""
    return number(int, lambda value: least <= value <= most, f"a whole number of at least {least}, at most {most:,}")


def name_of(registry: Iterable[str], prefix: str) -> Callable[[str], str]:
    """Return an argparse type: a name in a registry, or any name that begins with a prefix."""

    def convert(text: str) -> str:
        """Return the name; see argparse."""
        if text not in registry and not (text.startswith(prefix) and text != prefix):
            known = ", ".join([*registry, f"{prefix}NAME"])
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {known})")
        return text

    return convert


POSITIVE = number(float, lambda value: 0 < value <= 1e9, "a number above 0, at most 1e9")
NOT_NEGATIVE = number(float, lambda value: 0 <= value <= 1e9, "a number of at least 0, at most 1e9")
SEED = number(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")
PROBABILITY = number(float, lambda value: 0 <= value <= 1, "a probability from 0 to 1")
PATH = os.path.expanduser
"""An argparse type: a path. It expands ~, because shells do not in --flag=~/path."""
FRACTION = number(float, lambda value: 0 <= value < 1, "a fraction from 0 up to, but not including, 1")


def resolve(
    argv: Sequence[str] | None, parser: OneLineParser, locks: contextlib.ExitStack
) -> tuple[argparse.Namespace, StoredRun | None]:
    """Return the flags of the run that a command line asks for, and the stored run that it resumes, if any.

    The flags are those of a new run, or of the stored run that --resume or --go_on finds, except for those that may be
    changed on resuming.

    Args:
        argv: the command line after the program's name; None: that of this process.
        parser: the parser of all flags; its `error` reports flags that cannot be used.
        locks: takes over the lock of the stored run.

    Raises:
        InputError: the stored run cannot be resumed.
    """
    args, defaults = parser.parse_args(argv), vars(parser.parse_args([]))
    stored = None
    if args.resume is not None:
        stored = read_to_resume(Path(args.resume), locks)
        parser.set_defaults(**{flag: value for flag, value in stored.content["flags"].items() if flag in defaults})
        args = parser.parse_args(argv)
    args = check(args, parser)
    if args.go_on:
        stored = find_run_to_resume(args, locks)
    if stored:
        refuse_changes(args, defaults | stored.content["flags"], stored.folder, parser)
    return args, stored


def check(args: argparse.Namespace, parser: OneLineParser) -> argparse.Namespace:
    """Return the flags with dependent defaults filled in; `parser.error` if they do not fit together."""
    args = argparse.Namespace(**vars(args))
    check_name(args.dataset, args.source_path)
    if args.savename == ".." or Path(args.savename).name != args.savename or len(os.fsencode(args.savename)) > 240:
        parser.error(f"--savename {args.savename!r}: give a plain folder name; --save_path takes the folder above it")
    if args.go_on and not args.savename:
        parser.error("--go_on: name the run to resume with --savename NAME")
    check_objective(args, parser)
    if args.not_pretrained and args.weights is not None:
        parser.error(f"--weights {args.weights} contradicts --not_pretrained; give one of the two")
    if args.select == "val" and not args.val_classes:
        parser.error("--select val: there are no classes to select by; hold some out with --val_classes FRACTION")
    check_packages(args)
    defaults = parser.get_default("sampling")
    changed = {name for name, given, default in zip(args.losses, args.sampling, defaults) if given != default}
    ignoring = [name for name in sorted(changed) if not losses.takes_sampler(name)]
    if ignoring:
        log.info(f"--sampling: does not apply to --losses {shown(ignoring)}")
    args.cs_per_bs = [
        n if losses.loss_class(name).needs_positives or name.startswith("pml/") else 1
        for n, name in zip(args.cs_per_bs, args.losses)
    ]
    args.k_vals = sorted({1, *(args.k_vals or dependent_defaults(args)["k_vals"])})
    args.bn = args.bn or dependent_defaults(args)["bn"]
    check_batches(args, parser)
    return args


def check_objective(args: argparse.Namespace, parser: OneLineParser) -> None:
    """Reject tasks that train nothing, and more or fewer weights than directions."""
    if not any(args.task_p):
        parser.error("--task_p 0 0: nothing would be trained; give at least one task a probability above 0")
    if len(set(args.adversarial)) != len(args.adversarial):
        parser.error(f"--adversarial {shown(args.adversarial)}: name each direction once")
    if len(args.adv_weights) != len(args.adversarial):
        given, directions = shown(args.adv_weights), shown(args.adversarial)
        parser.error(f"--adv_weights {given}: takes one weight per direction of --adversarial ({directions})")


def check_packages(args: argparse.Namespace) -> None:
    """Check, before any data are read, what flags need from optional packages, and that the weight file exists.

    Raises:
        InputError: something is missing, or a package has nothing of the given name.
    """
    if args.tensorboard:
        packages.imported("torch.utils.tensorboard", "tensorboard", "--tensorboard")
    if args.arch.startswith("timm/"):
        packages.imported_timm(args.arch.removeprefix("timm/"))
    if args.weights and args.weights.endswith(".safetensors") and not args.resume:
        packages.imported("safetensors.torch", "safetensors", f"--weights {args.weights}")
    for name, size in zip(args.losses, args.embed_sizes):
        if name.startswith("pml/"):
            packages.library_loss(name.removeprefix("pml/"), 2, size)
    if args.make_graph and not args.resume:
        packages.require_graphviz()
    if args.weights and not args.resume and not os.path.isfile(args.weights):
        raise InputError(f"--weights {args.weights}: no such file")


def check_batches(args: argparse.Namespace, parser: OneLineParser) -> None:
    """Reject batch sizes that do not fit the images per class or the number of processes."""
    for task, name, images_per_class, p in zip(TASKS, args.losses, args.cs_per_bs, args.task_p):
        if p == 0:
            continue
        needs_positives = losses.loss_class(name).needs_positives
        if needs_positives and images_per_class < 2:
            parser.error(f"--cs_per_bs {images_per_class} for {task}: {name} needs at least 2 images per class")
        if args.bs % images_per_class:
            parser.error(f"--bs {args.bs} is not a multiple of --cs_per_bs {images_per_class} ({task})")
        if needs_positives and args.bs < 2 * images_per_class:
            parser.error(f"--bs {args.bs} has room for one class of --cs_per_bs {images_per_class}; {task} needs two")
    n_processes = processes.world_size()
    if args.bs % n_processes:
        parser.error(f"--bs {args.bs} is not divisible by the {n_processes} processes that torchrun started")
    if n_processes > 1 and args.bn == "train" and not torch.cuda.is_available():
        parser.error(
            "--bn train (the default with --not_pretrained): on CPUs it runs in one process only, as PyTorch "
            "synchronises BatchNorm on GPUs alone; give --bn frozen, or start without torchrun"
        )


def warnings_for(args: argparse.Namespace, n_classes: int) -> list[str]:
    """Return warnings of flags that train badly.

    These are a low learning rate for random weights, batches that draw the same few classes repeatedly, and a compiled
    network that synchronises BatchNorm between processes.
    """
    warnings = []
    if args.not_pretrained and not args.resume and args.lr < 1e-4:
        warnings.append(f"--lr {args.lr:g} with --not_pretrained: random weights want about 1e-3")
    n_draws = args.bs // args.cs_per_bs[0]
    if args.task_p[0] and args.cs_per_bs[0] > 1 and n_draws > n_classes:
        warnings.append(
            f"--bs {args.bs} takes {args.cs_per_bs[0]} images of each of {n_draws} classes, but there are only "
            f"{n_classes} to train, so classes repeat within a batch; try a smaller one"
        )
    if args.compile and args.bn == "train" and processes.world_size() > 1:
        warnings.append(
            "--compile --bn train in several processes: SyncBatchNorm, which exchanges statistics, breaks the graph at "
            "each layer, and little is gained"
        )
    return warnings


def per_task(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """Return the flags in PAIRS of each task, under their names."""
    tasks = {}
    for i, task in enumerate(TASKS):
        tasks[task] = argparse.Namespace(**{flag: getattr(args, flag)[i] for flag in PAIRS})
    return tasks


def dependent_defaults(args: argparse.Namespace) -> dict[str, object]:
    """Return the defaults that depend on other flags."""
    return {"k_vals": dataset_info(args.dataset).k_vals, "bn": "train" if args.not_pretrained else "frozen"}


def defaults_of_changed(args: argparse.Namespace, parser: OneLineParser) -> dict[str, object]:
    """Return {flag: default} of the flags of a run that differ from their defaults."""
    defaults = vars(parser.parse_args([])) | dependent_defaults(args)
    return {flag: defaults[flag] for flag, value in stored_flags(args).items() if shown(value) != shown(defaults[flag])}


def makes_setting(flag: str) -> bool:
    """Tell whether runs that differ in a flag belong to different settings."""
    return flag not in (*MACHINE, *OUTPUT, "seed", "left_out")


def run_folder(args: argparse.Namespace) -> Path:
    """Return the folder for a new run."""
    arch = args.arch.replace("/", "_")  # timm/NAME contains one
    name = args.savename or f"{args.dataset}_{arch}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    return Path(args.save_path) / args.dataset / name


def stored_flags(args: argparse.Namespace) -> dict[str, object]:
    """Return the flags that are stored with a run."""
    return {flag: value for flag, value in vars(args).items() if flag not in START}


def find_run_to_resume(args: argparse.Namespace, locks: contextlib.ExitStack) -> StoredRun | None:
    """Lock and read the run named --savename, for --go_on; return None if there is none.

    Raises:
        InputError: it cannot be resumed.
    """
    parent, named = Path(args.save_path) / args.dataset, re.compile(rf"{re.escape(args.savename)}(_\d+)?")
    for folder in sorted(path.parent for path in parent.glob(f"*/{LAST}") if named.fullmatch(path.parent.name)):
        flags, _ = read_flags(folder)
        if flags.get("savename") == args.savename:
            return read_to_resume(folder, locks)
    return None


def refuse_changes(args: argparse.Namespace, stored: Mapping[str, object], folder: Path, parser: OneLineParser) -> None:
    """Reject flags that differ from those of the stored run in a folder, except for those that may change."""
    free = {*MACHINE, *START} | ({"n_epochs"} if args.n_epochs >= stored["n_epochs"] else set())
    # With --go_on the run was found there, even if the path was spelt differently
    free |= {"save_path"} if args.go_on else set()
    other = [flag for flag, value in vars(args).items() if flag not in free and value != stored[flag]]
    if other:
        changes = "; ".join(f"{as_typed(f, stored[f])}, not {as_typed(f, getattr(args, f))}" for f in other)
        hint = "give its flags, or another --savename or --save_path" if args.go_on else f"only {GIVEN_ANEW} may change"
        parser.error(f"--{'go_on' if args.go_on else 'resume'}: {folder} is a run with {changes}; {hint}")
