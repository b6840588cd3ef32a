"""The runs of a data set in a table, index.html above their folders, from what their pages say.

No log is read: each page.html begins with a summary.
"""

import contextlib
import functools
import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from data.published import published_info
from report.charts import finite
from report.page import rendered, warn, warned
from run.logs import scores_of
from run.options import LATER_FLAGS

MARKER = b'<meta name="generator" content="MIC">'
"""Tells an index.html of ours from one of the user's."""

SUMMARY = re.compile(rb'<script type="application/json" id="summary">(.*?)</script>', re.DOTALL)
HEAD_BYTES = 2**16
"""Bytes of a page within which its summary lies."""

Entry = dict[str, object]
"""A run in the table: its name and page.summary."""


@functools.lru_cache(maxsize=4096)
def read_summary(path: str, changed_ns: int) -> Entry | None:
    """Return the summary in a page, None for a page that is damaged or not ours. changed_ns: see os.stat; it tells
    versions of a page apart for the cache.
    """
    try:  # whatever a file may hold; 0.0 + None, for what must be a number, is a TypeError
        with open(path, "rb") as file:
            stored = json.loads(SUMMARY.search(file.read(HEAD_BYTES))[1])
        numbers = {name: finite(stored[name]) for name in ("best", "last", "nmi")}
        numbers |= {
            name: 0.0 + finite(stored[name]) for name in ("epoch", "n_epochs", "seconds", "written", "patience")
        }
        texts = {name: str(stored[name]) for name in ("dataset", "test_set", "state", "seed")}
        curve = [(0.0 + finite(epoch), 0.0 + finite(value)) for epoch, value in stored["curve"]]
        flags = LATER_FLAGS | {str(k): str(v) for k, v in stored["flags"].items()}
        return numbers | texts | {"curve": curve, "flags": flags}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None


def read_entries(parent: Path) -> list[Entry]:
    """Return the summaries of the runs in a folder, with their names; the best Recall@1 first."""
    entries = []
    for name in sorted(os.listdir(parent)):
        path = os.path.join(parent, name, "page.html")
        with contextlib.suppress(OSError):
            status = os.stat(path)
            read = read_summary(path, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
            entries += [{"name": name} | read] if read else []
    return sorted(entries, key=lambda entry: -(entry["best"] or 0))


def sparklines(entries: Sequence[Entry]) -> list[str]:
    """Return the Recall@1 of each run as an SVG path on 100 x 24 units, all on one scale."""
    epochs = [epoch for entry in entries for epoch, _ in entry["curve"]]
    recalls = [recall for entry in entries for _, recall in entry["curve"]]
    last, low = max(epochs, default=0) or 1, min(recalls, default=0)
    height = (max(recalls, default=0) - low) or 1
    paths = []
    for entry in entries:
        places = [(100 * epoch / last, 22 - 20 * (recall - low) / height) for epoch, recall in entry["curve"]]
        paths.append("L".join(f"{x:.1f} {y:.1f}" for x, y in places))
    return paths


def write_index(folder: Path) -> None:
    """Write index.html beside a run folder, from the pages beside it; where that fails it is a warning.

    An index.html that is not ours is left alone. Of two runs that write it at once the last one wins.
    """
    path, temporary = folder.absolute().parent / "index.html", folder / f".index.html.{os.getpid()}.tmp"
    with warned(path):
        if path.exists() and MARKER not in path.read_bytes()[:HEAD_BYTES]:
            warn(path, "is none of ours and is left alone")
            return
        entries = read_entries(path.parent)
        flags = dict.fromkeys(flag for entry in entries for flag in entry["flags"])
        differing = [flag for flag in flags if len({entry["flags"].get(flag, "None") for entry in entries}) > 1]
        dataset = entries[0]["dataset"] if entries else path.parent.name
        paper = published_info(dataset).scores
        test_set = entries[0]["test_set"] if entries else "test"
        content = rendered(
            "index.html",
            entries=list(zip(entries, sparklines(entries))),
            differing=differing,
            dataset=dataset,
            test_set=test_set,
            paper=scores_of(paper, test_set),
        )
        try:  # in a folder where no other run writes
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
