"""The command evaluate.py: a stored run scored, its embedding of other images stored, runs compared.

python evaluate.py RUN [--checkpoint FILE] [--embedding Class|Shared] [--save_embeddings FILE.npz]
python evaluate.py RUN --embed FOLDER --save_embeddings FILE.npz [--embedding Class|Shared]
python evaluate.py --compare RUN [RUN ...] [--over FLAG | --against RUN] [--csv FILE] [--plot FILE]
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import auxiliaries
import datasets
import evaluate
import netlib
from data import readers
from data.images import VALIDATION, ImageSet, contents, describe_change, hold_out_classes
from report import compare
from run import errors, folder, processes, weights
from run.errors import InputError, StoppedError
from run.flags import PATH, whole


def score_run(args: argparse.Namespace) -> None:
    """Score the checkpoints of a run on their test sets, print what comes out beside what the run logged, and store
    the embeddings where asked for. Raises InputError.
    """
    run = Path(args.run[0])
    found = weights.checkpoints_of(run, args.checkpoint)
    flags = weights.read_checkpoint(found[0])["flags"]
    dataset, source = args.dataset or flags["dataset"], args.source_path or flags["source_path"]
    train_images, tests = datasets.load_dataset(dataset, source)
    sources = {VALIDATION: ("train", train_images)} | {name: (name, images) for name, images in tests.items()}
    if flags["val_classes"] and not args.dataset:
        tests[VALIDATION] = hold_out_classes(train_images, flags["val_classes"])[1]
    wanted = Path(args.save_embeddings or "")
    stores = {name: wanted.with_name(f"{wanted.stem}{folder.file_suffix(name)}.npz") for name in tests if wanted.name}
    for path in stores.values():
        if path.exists():
            raise InputError(f"--save_embeddings: {path} exists already; nothing is overwritten")
    device = auxiliaries.pick_device(args.gpu)
    for name, images in tests.items():
        own = run / f"checkpoint{folder.file_suffix(name)}.pth.tar"
        path = own if own in found else found[0]
        stored = weights.read_checkpoint(path)
        flags, rows = stored["flags"], stored["progress"]["rows"]
        embeddings = embed(path, flags, images, args.embedding, args.kernels, device)
        scores = evaluate.score_set(embeddings, images.labels, flags["k_vals"], flags["seed"], device, images.is_query)
        print(f"{path}, {args.embedding} embedding of {len(images)} {dataset} images{f', {name}' if name else ''}")
        # The last epoch that was scored is the checkpoint's own, if it has not been trained on since
        is_logged = rows["val"] and rows["val"][-1]["Epochs"] == len(rows["train"]) - 1
        is_logged = is_logged and args.embedding == "Class" and dataset == flags["dataset"]
        change = changed(stored, *sources[name]) if is_logged else None
        if change:
            print(f"warning: not the images that the run was scored on: {change}; the logged scores are of those")
        print_scores(scores, rows["val"][-1] if is_logged else None, name)
        if name in stores:
            is_query = np.ones(len(images), dtype=bool) if images.is_query is None else images.is_query
            known = {"paths": images.names, "class_names": images.class_names, "is_query": is_query}
            store(stores[name], embeddings, labels=images.labels, **known)


def changed(stored: Mapping[str, dict], split: str, images: ImageSet) -> str | None:
    """Return how the images of a split differ from those that the run of a checkpoint had; None where they do not."""
    before, now = stored["progress"]["contents"].get(split, {}), contents({split: images})[split]
    return describe_change({split: before}, {split: now})


def embed(
    checkpoint: Path,
    flags: Mapping[str, object],
    images: ImageSet,
    embedding: str,
    n_workers: int | None,
    device: torch.device,
) -> np.ndarray:
    """Return the embeddings (N, D) float32 of images by the network of a checkpoint, as its run embeds test images.

    flags: of the run. embedding: Class or Shared. n_workers: of the loader; None: as in the run. Raises InputError,
    DivergedError.
    """
    if embedding == "Shared" and not flags["task_p"][1] and not any(flags["adv_weights"]):
        print(f"warning: {checkpoint}: the Shared embedding was not trained, it is random")
    loader = datasets.make_loader(
        datasets.ImageDataset(images, datasets.test_transform(flags["img_size"])),
        batch_size=min(flags["bs"], datasets.SCORING_BATCH_SIZE),
        n_workers=auxiliaries.n_workers(flags["kernels"] if n_workers is None else n_workers),
        pin_memory=device.type == "cuda",
    )
    auxiliaries.set_seeds(flags["seed"])
    auxiliaries.set_precision(device, flags["tf32"] and device.type == "cuda", flags["amp"])
    network = netlib.load(checkpoint).to(device)
    bar = tqdm(loader, desc="embedding", unit="batch", leave=False, disable=None)
    return evaluate.extract_features(network, bar, [embedding], flags["amp"])[embedding]


def embed_folder(args: argparse.Namespace) -> None:
    """Store the embeddings of every image below a folder, in any layout, and their paths.

    Raises InputError, and StoppedError after the rest is stored where images cannot be decoded.
    """
    root = Path(args.embed)
    paths, others, unread = readers.images_below(root)
    if others:
        print(f"skipped {len(others)} other files: {errors.first_few(others)}")
    if unread:
        print(f"skipped {len(unread)} folders that cannot be read: {errors.first_few(unread)}")
    if not paths:
        raise InputError(f"--embed {root}: no folder with images ({', '.join(readers.IMAGES)}) in it or below")
    checkpoint = weights.checkpoints_of(Path(args.run[0]), args.checkpoint)[0]
    flags = weights.read_checkpoint(checkpoint)["flags"]  # what is wrong with it shows before images are decoded
    reasons = datasets.decoding_errors([ImageSet(paths, np.zeros(len(paths), dtype=np.int64), [""])])
    sound = [path for path, reason in zip(paths, reasons, strict=True) if reason is None]
    n_broken = len(paths) - len(sound)
    print("".join(f"{reason}\n" for reason in reasons if reason), end="")
    if sound:
        images = ImageSet(sound, np.zeros(len(sound), dtype=np.int64), [""])
        device = auxiliaries.pick_device(args.gpu)
        embeddings = embed(checkpoint, flags, images, args.embedding, args.kernels, device)
        store(Path(args.save_embeddings), embeddings, paths=sound)
    if n_broken:
        raise StoppedError(f"{n_broken} of {len(paths)} images cannot be decoded and were left out")
    if unread:
        raise StoppedError(f"{len(unread)} folders cannot be read and were left out: {errors.first_few(unread)}")


def print_scores(scores: evaluate.Scores, row: folder.Row | None, test_set: str) -> None:
    """Print scores with all their digits, beside those of a row of the run's log, if there is one."""
    logged = row["scores"][test_set] if row else {}
    width = max(map(len, scores))
    print(f"{'score':<{width}}  {'now':<20}" + (f"  logged in epoch {row['Epochs']}" if row else ""))
    for name, value in scores.items():
        then = logged.get(name)
        print(f"{name:<{width}}  {value!r:<20}  {'' if then is None else then}".rstrip())


def store(path: Path, embeddings: np.ndarray, **more: Sequence) -> None:
    """Store embeddings (N, D) float32 and what is known of the images as .npz."""
    with folder.replaced_file(path) as file:
        np.savez(file, embeddings=embeddings, **{name: np.array(values) for name, values in more.items()})
    print(f"stored {path}: {len(embeddings)} embeddings")


def get_args_parser() -> errors.OneLineParser:
    """Return the parser of the command."""
    parser = errors.OneLineParser(
        prog="evaluate.py",
        description="Score a stored run, with the flags it was trained with, or compare stored runs.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    # fmt: off
    add("run", type=PATH, nargs="+", metavar="RUN",
        help="run folder, or a checkpoint file; with --compare any number of run "
        "folders, or folders that hold them")
    add("--compare", action="store_true", help="print a table of stored runs, named by what differs: scores at the "
        "best and at the last epoch, mean and standard deviation over seeds, the paper's numbers")
    add("--over", metavar="FLAG", help="with --compare: also print Recall @ 1 over this flag, beside the paper's curve "
        "where there is one, and draw it with --plot; of a pair the Shared task's value counts")
    add("--against", type=PATH, metavar="RUN",
        help="with --compare: also give the differences of each setting to that of this "
        "run, one of those compared, over runs of the same seed, with 95 %% confidence intervals, and draw them with "
        "--plot")
    add("--csv", type=PATH, metavar="FILE",
        help="with --compare: also write the table to FILE, with a column for each flag that "
        "differs")
    add("--plot", type=PATH, metavar="FILE",
        help="with --compare: draw Recall @ 1 over the epochs, or what --over or --against "
        "ask for (.svg, .png or .pdf)")
    add("--checkpoint", type=PATH, metavar="FILE", help="score this checkpoint of the run instead of the best one")
    add("--dataset", metavar="NAME", help="score on the test classes of another data set")
    add("--source_path", type=PATH, metavar="FOLDER", help="folder that holds the dataset folders, where it has moved")
    add("--embedding", choices=["Class", "Shared"], default="Class", help="which embedding to score (default: Class)")
    add("--save_embeddings", type=PATH, metavar="FILE.npz", help="store embeddings, labels, paths and class names")
    add("--embed", type=PATH, metavar="FOLDER",
        help="instead of scoring, embed all images below FOLDER, in any layout, and store "
        "embeddings and paths with --save_embeddings")
    add("--gpu", type=whole(0), default=0, metavar="ID", help="GPU to use; without any the CPU (default: 0)")
    add("--kernels", type=whole(0), metavar="N", help="data loader workers (default: as in the run)")
    # fmt: on
    return parser


def check_args(args: argparse.Namespace, parser: errors.OneLineParser) -> None:
    """Exit with `parser.error` on flags that do not fit together and files that cannot be written."""
    only = {
        "compare": ["over", "against", "csv", "plot"],
        "score": ["checkpoint", "dataset", "source_path", "save_embeddings", "embed", "kernels"],
    }
    for flag in only["score" if args.compare else "compare"]:
        if getattr(args, flag) is not None:
            parser.error(f"--{flag}: {'does not go with' if args.compare else 'goes only with'} --compare")
    if processes.launched() > 1:
        parser.error("runs as one process: start it with python, not with torchrun")
    if not args.compare and len(args.run) > 1:
        parser.error(f"{len(args.run)} runs; give one to score, or --compare for several")
    for flag, endings in {"csv": [], "plot": [".svg", ".png", ".pdf"], "save_embeddings": [".npz"]}.items():
        value = getattr(args, flag)
        if value is None:
            continue
        if endings and Path(value).suffix not in endings:
            parser.error(f"--{flag} {value}: give a file name that ends in {' or '.join(endings)}")
        if Path(value).exists():
            parser.error(f"--{flag} {value}: exists already; nothing is overwritten")
        if not os.access(Path(value).absolute().parent, os.W_OK | os.X_OK):
            parser.error(f"--{flag} {value}: there is no folder {Path(value).parent} that can be written to")
    if args.csv and args.plot and os.path.realpath(args.csv) == os.path.realpath(args.plot):
        parser.error(f"--csv {args.csv} --plot {args.plot}: are the same file")
    if args.embed is not None and (args.save_embeddings is None or args.dataset or args.source_path):
        parser.error("--embed: give --save_embeddings FILE.npz, and no --dataset or --source_path")
    if args.against is not None and args.over is not None:
        parser.error("--against: does not go with --over; compare twice")


@errors.one_line_errors("evaluate.py")
def main(argv: Sequence[str] | None = None) -> None:
    """Score a run or compare runs, as a command line asks."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    check_args(args, parser)
    with errors.signals_stop("before it was done"):
        if args.compare:
            compare.compare_runs(args.run, over=args.over, against=args.against, csv=args.csv, plot=args.plot)
        elif args.embed is not None:
            embed_folder(args)
        else:
            score_run(args)


if __name__ == "__main__":
    errors.set_up_output()
    main()
