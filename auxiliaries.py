"""Seeds, the run folder and its files, plots and contact sheets, checkpoints, and k-means."""

import contextlib
import csv
import html
import importlib.util
import os
import pickle
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import faiss
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator


class RunFolderError(OSError):
    """The run folder cannot be made; the message is one line for the user."""


class GraphError(RuntimeError):
    """A picture of a graph cannot be drawn; the message is one line for the user."""


def set_seeds(seed: int) -> None:
    """Seed Python, numpy and torch (all devices) and ask cuDNN for repeatable algorithms."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


def check_run_folder(parent: str | Path, name: str) -> None:
    """Raise RunFolderError where parent/name could not be made, as far as that shows without making anything."""
    try:
        existing = next(folder for folder in (Path(parent), *Path(parent).absolute().parents) if folder.exists())
    except OSError as error:
        raise RunFolderError(f"--save_path: cannot look into {parent} ({error.strerror})") from error
    if not existing.is_dir():
        raise RunFolderError(f"--save_path: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RunFolderError(f"--save_path: {existing} is not writable")
    if len(os.fsencode(name)) > 200:
        raise RunFolderError(f"--savename: {name[:20]}... is longer than 200 bytes")


def make_run_folder(parent: str | Path, name: str) -> Path:
    """Create and return parent/name, or parent/name_1, _2, ... where that exists: nothing is ever overwritten.

    Raises RunFolderError where the folder cannot be created.
    """
    counter = 0
    while True:
        folder = Path(parent) / (f"{name}_{counter}" if counter else name)
        try:
            Path(parent).mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            if not Path(parent).is_dir():
                raise RunFolderError(f"--save_path: {parent} is a file, not a folder") from None
            counter += 1
        except OSError as error:
            raise RunFolderError(f"--save_path: cannot create {folder} ({error.strerror})") from error


@contextlib.contextmanager
def replaced_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that takes the place of `path` when the block ends well: readers see the old or the new one whole."""
    encoding = None if "b" in mode else "utf-8"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def current_umask() -> int:
    """Return the process's umask."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_flags(folder: Path, flags: Mapping[str, object]) -> None:
    """Write all flags as hypa.pkl, a pickled dict of plain values, and as readable Parameter_Info.txt."""
    with replaced_file(folder / "hypa.pkl") as file:
        pickle.dump(dict(flags), file)
    width = max(len(name) for name in flags)
    with replaced_file(folder / "Parameter_Info.txt", "w") as file:
        for name, value in flags.items():
            shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            file.write(f"{name:<{width}}  {shown}\n")


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Append a row to a CSV file by column name; a new file gets the row's names as header. None is an empty cell.

    Raises ValueError where the row has columns that the file does not have.
    """
    if not path.exists():
        with replaced_file(path, "w") as file:  # never seen without its header
            csv.writer(file, lineterminator="\n").writerows([list(row), list(row.values())])
        return
    with open(path, "r+", newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file))
        file.seek(0, os.SEEK_END)
        csv.DictWriter(file, columns, lineterminator="\n").writerow(row)


def save_checkpoint(path: Path, network: torch.nn.Module, flags: Mapping[str, object], progress: dict) -> None:
    """Write {"state_dict", "flags", "progress"}; tensors and plain values only, for torch.load(weights_only=True)."""
    with replaced_file(path) as file:
        torch.save({"state_dict": network.state_dict(), "flags": dict(flags), "progress": progress}, file)


def write_summary(
    path: Path, initial: Mapping[str, float], history: Sequence[Mapping[str, float]], seconds: float
) -> None:
    """Write the best value of each score with its epoch, the value before training, epochs done and the run's seconds.

    initial: scores before training. history: the rows of log_val_Class.csv so far, at least one.
    """
    scores = [name for name in history[-1] if name not in ("Epochs", "Time")]
    width = max(len(name) for name in scores)
    with replaced_file(path, "w") as file:
        file.write(f"{'score':<{width}}    best  epoch    last  before training\n")
        for name in scores:
            best = max(history, key=lambda row: row[name])
            file.write(f"{name:<{width}}  {best[name]:.4f}  {best['Epochs']:5d}  {history[-1][name]:.4f}")
            file.write(f"  {initial[name]:15.4f}\n")
        file.write(f"epochs done: {history[-1]['Epochs'] + 1}\nseconds: {seconds:.1f}\n")


def kmeans(points: np.ndarray, n_clusters: int, seed: int, n_iterations: int = 20) -> tuple[np.ndarray, float]:
    """Cluster with faiss; all points take part.

    points: (N, D), made float32. n_clusters: at most N.
    Returns labels (N,) int64 in [0, n_clusters), some possibly unused, and the inertia, the summed squared distances
    of the points to their centres. Raises ValueError for more clusters than points.
    """
    if n_clusters > len(points):
        raise ValueError(f"{n_clusters} clusters for {len(points)} points")
    points = np.ascontiguousarray(points, dtype=np.float32)
    clustering = faiss.Kmeans(
        points.shape[1],
        n_clusters,
        niter=n_iterations,
        seed=seed % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )
    clustering.train(points)
    squared_distances, nearest = clustering.index.search(points, 1)
    return nearest[:, 0].astype(np.int64), float(squared_distances.sum(dtype=np.float64))


def draw_progress(
    path: Path, train_rows: Sequence[Mapping[str, float]], val_rows: Sequence[Mapping[str, float]], title: str
) -> None:
    """Draw the logged history as SVG: training losses left, test scores right, the best Recall@1 marked."""
    with matplotlib.rc_context({"svg.hashsalt": "mic", "font.size": 11}):
        figure = Figure(figsize=(13, 5), layout="constrained")
        loss_axis, score_axis = figure.subplots(1, 2)
        draw_curves(loss_axis, train_rows, [name for name in train_rows[0] if name.endswith("Loss")])
        loss_axis.set(title="Training", xlabel="epoch", ylabel="loss")
        scores = [name for name in val_rows[0] if name not in ("Epochs", "Time")]
        draw_curves(score_axis, val_rows, scores)
        best = max(val_rows, key=lambda row: row["Recall @ 1"])
        score_axis.axvline(best["Epochs"], color="0.6", linestyle=":", zorder=0)
        score_axis.set(title=f"Test classes (best epoch {best['Epochs']})", xlabel="epoch", ylabel="score", ylim=(0, 1))
        figure.suptitle(title, parse_math=False)
        with replaced_file(path) as file:
            figure.savefig(file, format="svg", metadata={"Date": None})


def draw_curves(axis: matplotlib.axes.Axes, rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> None:
    """Draw the columns `names` of the rows over their epochs, with a legend."""
    markers = "osD^vP*X"
    for i, name in enumerate(names):
        values = [np.nan if row[name] is None else row[name] for row in rows]
        if not np.isnan(values).all():
            marker = markers[i % len(markers)]
            axis.plot([row["Epochs"] for row in rows], values, marker=marker, markersize=4, label=name)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=9)


def draw_recoveries(
    path: Path,
    read: Callable[[int], np.ndarray],
    embeddings: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    is_query: np.ndarray | None = None,
    n_queries: int = 10,
    n_neighbours: int = 5,
) -> None:
    """Draw test images and their nearest neighbours as a PNG: a contact sheet to check a run by eye.

    read: maps an index to an (H, W, 3) uint8 image. embeddings: (N, D). labels: (N,). is_query: (N,) bool, the images
    that are searched in the others; None: each is searched in all others. Queries are spread evenly over the set. A
    right neighbour has a solid green frame and a tick, a wrong one a dashed orange frame and a cross.
    """
    queries = np.arange(len(labels)) if is_query is None else np.flatnonzero(is_query)
    n_gallery = len(labels) - (1 if is_query is None else len(queries))
    n_queries, n_neighbours = min(n_queries, len(queries)), min(n_neighbours, n_gallery)
    queries = queries[np.linspace(0, len(queries) - 1, n_queries).round().astype(int)]
    distances = (embeddings**2).sum(1) - 2 * embeddings[queries] @ embeddings.T  # squared, less the query's own norm
    distances[np.arange(n_queries), queries] = np.inf
    if is_query is not None:
        distances[:, is_query] = np.inf
    neighbours = np.argsort(distances, axis=1, kind="stable")[:, :n_neighbours]
    figure = Figure(figsize=(1.7 * (n_neighbours + 1), 2.05 * n_queries), layout="constrained")
    axes = figure.subplots(n_queries, n_neighbours + 1, squeeze=False)
    for row, query in zip(axes, queries, strict=True):
        draw_tile(row[0], read(query), f"query\n{shortened(class_names[labels[query]])}", "0.2", "solid")
    for row, query, found in zip(axes, queries, neighbours, strict=True):
        for axis, index in zip(row[1:], found, strict=True):
            right = labels[index] == labels[query]
            caption = f"{'✓' if right else '✗'}\n{shortened(class_names[labels[index]])}"
            draw_tile(axis, read(index), caption, *(("#009e73", "solid") if right else ("#d55e00", "dashed")))
    with replaced_file(path) as file:
        figure.savefig(file, format="png", dpi=80)


def draw_tile(axis: matplotlib.axes.Axes, image: np.ndarray, caption: str, colour: str, line_style: str) -> None:
    """Draw one captioned and framed image."""
    axis.imshow(image)
    axis.set_axis_off()
    axis.set_title(caption, fontsize=8, color=colour, parse_math=False)
    axis.add_patch(
        Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False, color=colour, linewidth=4, linestyle=line_style)
    )


def shortened(name: str, length: int = 20) -> str:
    """Return a name cut to `length` characters."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def missing_for_graphs() -> list[str]:
    """Return what has to be installed before draw_graph works, in words."""
    package = [] if importlib.util.find_spec("graphviz") else ["the Python package graphviz (pip install graphviz)"]
    program = [] if shutil.which("dot") else ["the program dot of Graphviz (https://graphviz.org/download)"]
    return package + program


def draw_graph(nodes: Mapping[str, tuple[str, Sequence[str]]], edges: Sequence[tuple[str, str]], title: str) -> bytes:
    """Draw boxes and arrows with Graphviz and return the SVG; missing_for_graphs tells whether that is possible.

    nodes: name to (kind, lines of text), the first line in bold; kinds are data, layer and head. edges: (name, name).
    Raises GraphError where the program dot fails.
    """
    import graphviz

    colours = {"data": "#ffffff", "layer": "#dbe9f6", "head": "#fde5cc"}
    graph = graphviz.Digraph(graph_attr={"label": graphviz.escape(title), "labelloc": "t", "ranksep": "0.3"})
    graph.attr("graph", fontname="Helvetica")
    graph.attr("node", shape="box", style="filled,rounded", fontname="Helvetica", fontsize="11", margin="0.15,0.06")
    for name, (kind, lines) in nodes.items():
        first, *others = (html.escape(line) for line in lines)
        graph.node(name, f"<{'<br/>'.join([f'<b>{first}</b>', *others])}>", fillcolor=colours[kind])
    graph.edges(edges)
    try:
        return graph.pipe(format="svg", quiet=True)
    except (graphviz.CalledProcessError, graphviz.ExecutableNotFound) as error:
        raise GraphError(
            f"--make_graph: Graphviz's program dot fails; mend it, or leave the flag out ({error})"
        ) from error
