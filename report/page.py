"""HTML pages: page.html in a run folder, and index.html above the run folders, with a table of a data set's runs.

Both are self-contained: a browser opens them from disk and loads nothing but the runs' own pictures.
"""

import contextlib
import functools
import math
import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import jinja2
from PIL import Image

from data.images import VALIDATION
from data.published import dataset_info
from report import plots
from report.compare import seed_of, setting_flags
from report.plots import warn, warned
from run.checkpoint import LAST
from run.history import (
    LOGS,
    PAPER_NOTE,
    STATE_FILE,
    History,
    Row,
    column,
    fill_in_flags,
    info_plot,
    memory_text,
    mining_sheet,
    neighbour_sheet,
    scores_of,
    shown,
    strongest_factor,
)
from run.provenance import command
from support import processes
from support.errors import InputError
from support.files import replaced_file, write_file

SILENCE, FIRST_SILENCE = 600, 3600
"""Seconds without news after which a run counts as silent.

SILENCE holds once an epoch is complete (more if epochs are long), FIRST_SILENCE until then.
"""

FILES = [re.escape(name) for name in LOGS.values()] + ["mined_labels.npz", r"(InfoPlot_.*|network)\.svg"]
FILES += ["Curr_Summary_Class.txt", "Parameter_Info.txt", "log.txt"]
"""Files that a page links to if they exist, as regular expressions."""

MARKER = b'<meta name="generator" content="MIC">'
"""Marks an index.html as ours, not the user's."""


def draw(history: History) -> None:
    """Draw what is new of a run: its plots after an evaluation, its page, and the index of the runs beside it.

    Before the first evaluation the plots show only losses; before the first checkpoint there is no index. Do nothing if
    the run folder has gone, or in processes other than the first. Failures to draw are logged as warnings.
    """
    if not processes.is_first() or not history.folder.is_dir():
        return
    shown_log = history.folder / LOGS["val" if history.rows["val"] else "train"]
    plot = info_plot(history.folder, history.test_sets[0]) if history.test_sets else None
    if plot and modified(plot) < modified(shown_log):
        draw_plots(history)
    with warned(history.folder / "page.html"):
        write_page(history)
    if (history.folder / LAST).exists():
        write_index(history.folder.absolute())


def modified(path: Path) -> int:
    """Return when a file was last modified, in nanoseconds since 1970; 0 if it does not exist."""
    return path.stat().st_mtime_ns if path.exists() else 0


def draw_plots(history: History) -> None:
    """Draw InfoPlot_Class.svg of each test set and InfoPlot_Probe.svg; failures are logged as warnings."""
    for test_set in [name for name in history.test_sets if name != VALIDATION] if history.rows["train"] else []:
        path = info_plot(history.folder, test_set)
        with warned(path):
            plots.draw_progress(path, history, test_set)
    path = history.folder / "InfoPlot_Probe.svg"
    if history.rows["probe"]:
        with warned(path):
            plots.draw_probe(path, history)


def write_page(history: History) -> None:
    """Write page.html in a run folder."""
    flags, folder = history.flags, history.folder
    changed = {flag: (shown(flags[flag]), shown(default)) for flag, default in history.defaults.items()}
    files = sorted(os.listdir(folder))
    slides = mining_slides(history)
    content = rendered(
        "page.html",
        run=history,
        name=folder.absolute().name,
        dataset=flags["dataset"],
        written=history.written or max(modified(folder / name) for name in LOGS.values()) / 1e9,
        patience=patience(history),
        panels=[score_panel(history, test_set) for test_set in history.test_sets],
        image_sets={name: counts for name, counts in history.image_sets.items() if "images" in counts},
        spent={what: round(100 * part / history.seconds) for what, part in history.spent.items() if history.seconds},
        memory=memory_text(history.peak_memory) if history.peak_memory else "",
        slides=slides,
        strongest=strongest_factor(history.rows["mining"][-1]) if slides else "",
        neighbours=neighbours(history),
        probe=picture(folder / "InfoPlot_Probe.svg", last_values(history.rows["probe"])),
        changed=changed,
        others={flag: shown(value) for flag, value in flags.items() if flag not in changed},
        files=[name for kind in FILES for name in files if re.fullmatch(kind, name)],
        commands=commands(history),
        paper_note=PAPER_NOTE,
    )
    write_file(folder / "page.html", content)


def score_panel(history: History, test_set: str) -> dict[str, object]:
    """Return the score table of a test set and the plot of its run."""
    rows, index = history.rows["val"], history.best_index(test_set)
    table = history.score_table(test_set)
    table["gap"] = table["best"].astype(float) - table["paper"]
    return {
        "name": {"test": "Test classes", VALIDATION: "Training classes held out (Val)"}.get(test_set, test_set),
        "scores": table[["before", "best", "last", "paper", "gap"]].T.to_dict(),
        "best": None if index is None else rows[index]["Epochs"],
        "last": rows[-1]["Epochs"] if rows else None,
        "has_paper": bool(table["paper"].notna().any()),
        "plot": picture(info_plot(history.folder, test_set), last_values(history.rows["train"], rows)),
    }


def last_values(*logs: Sequence[Row]) -> str:
    """Describe the last values of some logs in words, for readers who cannot see the plot."""
    values = {name: value for rows in logs for name, value in (rows[-1] if rows else {}).items()}
    texts = [f"{name} {value:.4g}" for name, value in values.items() if value is not None and name != "Time"]
    return f"Curves over the epochs; values in the last epoch: {', '.join(texts)}"


def picture(path: Path, words: str) -> dict[str, object] | None:
    """Return a picture in a run folder as the page shows it, None if it does not exist; `words` describe it."""
    if not path.exists():
        return None
    size = None
    if path.suffix != ".svg":
        with contextlib.suppress(OSError, ValueError), Image.open(path) as image:  # the size is optional
            size = image.size
    folder = "mined/" if path.parent.name == "mined" else ""
    return {"url": url(folder + path.name), "words": words, "size": size}


def mining_slides(history: History) -> list[dict[str, object]]:
    """Return what the page's slider shows for each mining, oldest first."""
    rows, slides = history.rows["mining"], []
    agreements = [name for name in (rows[-1] if rows else {}) if name.startswith(("AMI ", "ARI "))]
    for row in rows:
        epoch = row["Before Epoch"]
        facts = {name.replace("AMI ", "AMI with "): number_text(row.get(name), "z.3f") for name in agreements}
        for name in ("Clusters", "Smallest", "Median", "Largest"):
            facts[name if name == "Clusters" else f"{name} cluster"] = number_text(row.get(name), "g")
        words = f"Clusters mined before epoch {epoch}: a row for each, with the images nearest to its centre"
        sheet = picture(mining_sheet(history.folder, epoch), words)
        slides.append({"epoch": epoch, "sheet": sheet, "facts": list(facts.items())})
    return slides


def neighbours(history: History) -> dict[str, list[dict[str, object]]]:
    """Return the existing sheets of nearest neighbours, {test set: sheets by the Class and by the Shared embedding}."""
    sets = {}
    for name in history.test_sets:
        for task in ("Class", "Shared"):
            words = f"Images of {name}, each in a row with its nearest neighbours by the {task} embedding"
            sheet = picture(neighbour_sheet(history.folder, name, task), words)
            if sheet:
                sets.setdefault(name, []).append({"task": task} | sheet)
    return sets


def commands(history: History) -> dict[str, str]:
    """Return commands for the run, {description: command line}."""
    folder, parent = (shlex.quote(str(path)) for path in (history.folder.absolute(), history.folder.absolute().parent))
    start = history.provenance[-1] if history.provenance else {}
    more = ["--n_epochs", str(2 * history.n_epochs)] if history.state == "finished" else []
    resume = command(["--resume", str(history.folder.absolute()), *more], start)
    what = {"running": "Resume it, should it be interrupted", "stopped": "Resume it"}.get(history.state, "Train longer")
    return {
        what: resume,
        "Score it": f"python evaluate.py {folder}",
        "Embed other images": f"python evaluate.py {folder} --embed FOLDER --save_embeddings new.npz",
        "Compare all runs beside it": f"python evaluate.py --compare {parent}",
    }


def patience(history: History) -> float:
    """Return the seconds of silence after which a running run has probably been killed."""
    return max(SILENCE, 3 * history.seconds / history.epoch) if history.epoch else FIRST_SILENCE


def write_index(folder: Path) -> None:
    """Write index.html beside a run folder; failures are logged as warnings.

    Someone else's index.html is left alone. If two runs write it at once, the last one wins.
    """
    parent, path = folder.parent, folder.parent / "index.html"
    with warned(path):
        if path.exists() and MARKER not in path.read_bytes()[: 2**16]:
            warn(path, "was not written by this program and is left alone")
            return
        histories = read_histories(parent)
        fill_in_flags(histories)
        flags = setting_flags(histories)
        differing = flags.loc[:, flags.nunique() > 1]
        entries = [index_entry(history, row) for history, row in zip(histories, differing.to_dict("records"))]
        dataset = histories[0].flags["dataset"] if histories else parent.name
        test_set = entries[0]["test_set"] if entries else "test"
        content = rendered(
            "index.html",
            entries=sorted(zip(entries, sparklines(entries)), key=lambda pair: -(pair[0]["best"] or 0)),
            dataset=dataset,
            test_set=test_set,
            paper=scores_of(dataset_info(dataset).scores, test_set),
        )
        with replaced_file(path, folder=folder) as file:  # in the run's own folder, where no other run writes
            file.write(content)


def read_histories(parent: Path) -> list[History]:
    """Return the histories of the runs in a folder, without those that cannot be read."""
    histories = []
    for name in sorted(os.listdir(parent)):
        with contextlib.suppress(OSError):  # another user's folder
            times = tuple(modified(parent / name / file) for file in ("hypa.pkl", STATE_FILE, LOGS["val"]))
            history = read_history(parent / name, times) if (parent / name / "hypa.pkl").is_file() else None
            histories += [history] if history else []
    return histories


@functools.lru_cache(maxsize=4096)
def read_history(folder: Path, times: tuple[int, ...]) -> History | None:
    """Return the history in a run folder; None if it cannot be read.

    Args:
        folder: the run folder.
        times: modification times of its files; a change makes the cache read it anew.
    """
    try:
        return History.read(folder)
    except InputError:
        return None


def index_entry(history: History, differences: dict[str, str]) -> dict[str, object]:
    """Return what the index shows of a run; `differences` are the flags in which the runs differ."""
    name, rows = history.folder.name, history.rows["val"]
    test_set = history.test_sets[0] if history.test_sets else "test"
    recall, index = column(test_set, "Recall @ 1"), history.best_index(test_set)
    curve = [(row["Epochs"], row[recall]) for row in rows]
    nmi = [row[column(test_set, "NMI")] for row in rows if finite(row.get(column(test_set, "NMI"))) is not None]
    return {
        "name": name,
        "page": f"{name}/page.html" if (history.folder / "page.html").exists() else f"{name}/",
        "test_set": test_set,
        "run": history,
        "patience": patience(history),
        "best": None if index is None else rows[index][recall],
        "last": curve[-1][1] if curve else None,
        "nmi": nmi[-1] if nmi else None,
        "seed": seed_of(history),
        "curve": curve[:: max(1, len(curve) // 60)],
        "differences": ", ".join(f"{flag} {value}" for flag, value in differences.items()),
    }


def sparklines(entries: Sequence[dict[str, object]]) -> list[str]:
    """Return the Recall@1 of each run as an SVG path in 100 x 24 units, all on the same scale."""
    epochs = [epoch for entry in entries for epoch, _ in entry["curve"]]
    recalls = [recall for entry in entries for _, recall in entry["curve"]]
    last, low = max(epochs, default=0) or 1, min(recalls, default=0)
    height = (max(recalls, default=0) - low) or 1
    paths = []
    for entry in entries:
        places = [(100 * epoch / last, 22 - 20 * (recall - low) / height) for epoch, recall in entry["curve"]]
        paths.append("L".join(f"{x:.1f} {y:.1f}" for x, y in places))
    return paths


def finite(value: object) -> float | None:
    """Return a value as a float; None if it is not a finite number."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def number_text(value: object, form: str = ".4f") -> str:
    """Return a number as text; a dash for None, NaN and infinity."""
    number = finite(value)
    return "–" if number is None else format(number, form)


def duration(seconds: float) -> str:
    """Return a duration as text: "45 s", "12 min", "3 h 05 min", "2 d 4 h"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def moment(seconds: float) -> str:
    """Return seconds since 1970 as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def url(path: str) -> str:
    """Return a relative path, of any bytes, as a link."""
    return quote(os.fsencode(path))


@functools.cache
def environment() -> jinja2.Environment:
    """Return the template environment; whatever templates show is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    look = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    made = jinja2.Environment(loader=loader, **look)
    made.filters |= {"url": url, "duration": duration, "number": number_text, "finite": finite, "moment": moment}
    made.policies["json.dumps_kwargs"] = {}  # facts keep their order
    return made


def rendered(template: str, **values: object) -> bytes:
    """Render a template as UTF-8; bytes of names that cannot be decoded become replacement characters."""
    text = environment().get_template(template).render(**values)
    return re.sub("[\ud800-\udfff]", "\ufffd", text).encode()
