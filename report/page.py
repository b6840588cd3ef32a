"""A run on one page, page.html in its folder.

It is complete by itself: a browser opens it from the disk, and asks for nothing but the run's own pictures.
"""

import contextlib
import functools
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import jinja2
from PIL import Image

from data.images import VALIDATION
from report.charts import Chart, chart, finite, look_of, points_of, thinned
from report.plots import COLOURS
from run.logs import LOGS, Row, best_index, column, file_suffix, scores_of, test_sets_of
from run.options import makes_setting, shown
from run.provenance import command
from support.errors import first_line
from support.files import write_file

SILENCE, FIRST_SILENCE = 600, 3600
"""Seconds after which a running run counts as silent, unless its epochs take long; before the first one is done."""

FILES = [re.escape(name) for name in LOGS.values()] + ["mined_labels.npz", r"(InfoPlot_.*|network)\.svg"]
FILES += ["Curr_Summary_Class.txt", "Parameter_Info.txt", "log.txt"]
"""What a page links to where it exists, as regular expressions."""


@dataclass(frozen=True)
class RunView:
    """What a page shows of a run at one moment.

    flags: of the run, plain values, with what was noted beside them (started_from, images). defaults: of the program's
    flags. rows: of each log, see logs.LOGS. paper: published scores by column, may be empty. provenance: of each
    start of the run, {what: value}. state: running, finished or stopped. reason: why it stopped. epoch: epochs done.
    seconds: spent so far; spent: by activity. seconds_left: None where not known yet. contents: of the image sets, see
    data/images.py.
    """

    folder: Path
    flags: Mapping[str, object]
    defaults: Mapping[str, object]
    rows: Mapping[str, Sequence[Row]]
    initial_scores: Row
    paper: Mapping[str, float]
    provenance: Sequence[Mapping[str, str]]
    state: str
    reason: str
    epoch: int
    seconds: float
    seconds_left: float | None
    spent: Mapping[str, float]
    contents: Mapping[str, Mapping[str, object]]

    @functools.cached_property
    def test_sets(self) -> list[str]:
        """The names of the test sets with scores, the classes held out last."""
        names = test_sets_of(self.rows["val"][-1] if self.rows["val"] else self.initial_scores)
        return sorted(names, key=lambda name: name == VALIDATION)

    @functools.cached_property
    def files(self) -> set[str]:
        """What lies in the run folder, and in its folder of mined clusters."""
        files = set(os.listdir(self.folder))
        return files | ({f"mined/{name}" for name in os.listdir(self.folder / "mined")} if "mined" in files else set())

    def best(self, test_set: str) -> Row:
        """Return the row of "val" of a test set's best epoch, empty before the first evaluation."""
        rows = self.rows["val"]
        return rows[best_index(rows, test_set, str(self.flags.get("select", "test")))] if rows else {}

    @property
    def mined_before(self) -> list[int]:
        """The epochs that began with new mined labels."""
        return [row["Before Epoch"] for row in self.rows["mining"]]


def number_text(value: object, form: str = ".4f") -> str:
    """Return a number as text, a dash for what was left out."""
    number = finite(value)
    return "–" if number is None else format(number, form)


def duration(seconds: float) -> str:
    """Return a time as text: "45 s", "12 min", "3 h 05 min", "2 d 4 h"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def url(path: str) -> str:
    """Return a relative path, of any bytes, as a link."""
    return quote(os.fsencode(path))


def score_panel(view: RunView, name: str) -> dict[str, object]:
    """Return the table of a test set's scores, Recall@k first, and their chart."""
    best, rows = view.best(name), view.rows["val"]
    whole_rows = [view.initial_scores, best, rows[-1] if rows else {}, view.paper]
    columns = [scores_of(row, name) for row in whole_rows]
    _, at_best, at_last, paper = columns
    scores = sorted(columns[0] | at_last, key=lambda score: not score.startswith("Recall"))
    gaps = {s: at_best[s] - paper[s] for s in paper if finite(at_best.get(s)) is not None}
    lines = {score: (look_of(i), points_of(rows, column(name, score))) for i, score in enumerate(scores)}
    star = (best["Epochs"], at_best["Recall @ 1"]) if rows else None
    return {
        "name": {"test": "Test classes", VALIDATION: "Training classes held out (Val)"}.get(name, name),
        "scores": {score: [of.get(score) for of in columns] + [gaps.get(score)] for score in scores},
        "best": best.get("Epochs"),
        "last": whole_rows[2].get("Epochs"),
        "has_paper": bool(paper),
        "chart": chart("Scores" if name == "test" else f"Scores, {name}", lines, marks=view.mined_before, best=star),
    }


def training_charts(view: RunView) -> list[Chart]:
    """Return a chart for each part of the loss and for the learning rate."""
    rows = view.rows["train"]
    names = [name for name in (rows[-1] if rows else {}) if name.endswith("Loss") and name != "Train Loss"]
    lines = {name: look_of(i) for i, name in enumerate(names)} | {"Learning Rate": "plain"}
    charts = [chart(name, {name: (look, points_of(rows, name))}, marks=view.mined_before)
              for name, look in lines.items()]  # fmt: skip
    return [made for made in charts if made]


def probe_charts(view: RunView) -> list[Chart]:
    """Return a chart for each kind of label that is probed; test images are thin lines in the chart of their kind."""
    rows = view.rows["probe"]
    kinds = [name.removesuffix(" by chance") for name in (rows[-1] if rows else {}) if name.endswith(" by chance")]
    prefixes = [f"{name.capitalize()} " for name in view.test_sets]
    charts = []
    for kind in (kind for kind in kinds if kind not in [prefix + other for prefix in prefixes for other in kinds]):
        lines = {}
        for prefix in ("", *prefixes):
            what, thin = (f", {prefix.strip().lower()}", " thin") if prefix else ("", "")
            for task, look in (("Class", "c0 dashed"), ("Shared", "c1")):
                lines[f"from {task}{what}"] = (look + thin, points_of(rows, f"{prefix}{kind} from {task}"))
        lines["by chance"] = ("plain dotted", points_of(rows, f"{kind} by chance"))
        title = {"Class": "The class", "Mined": "The mined label"}.get(kind, kind)
        note = f"wanted low from {'Shared' if kind == 'Class' else 'Class'}"
        charts.append(chart(title, lines, note=note, bounds=(0, 1)))
    return [made for made in charts if made]


def mining_slides(view: RunView) -> tuple[list[dict[str, object]], Chart | None]:
    """Return what the slider shows of each mining, oldest first, and a chart of what the mined labels agree with."""
    rows = view.rows["mining"]
    agreements = [name for name in (rows[-1] if rows else {}) if name.startswith(("AMI ", "ARI "))]
    labels = {name: name.replace("AMI ", "AMI with ") for name in agreements}
    lines = {}
    for i, name in enumerate(agreements):
        points = points_of(rows, name, "Before Epoch")
        lines[labels[name]] = (look_of(i), [(epoch, round(value, 4) + 0.0) for epoch, value in points])  # no -0
    slides, first, last = [], min(view.mined_before, default=0), max(view.mined_before, default=0)
    for row in rows:
        epoch = row["Before Epoch"]
        picture = f"mined/before_epoch_{epoch:04}.jpg"
        if picture not in view.files and epoch == last:
            picture = "mined_clusters.png"
        facts = [(label, number_text(row.get(name), "z.3f")) for name, label in labels.items()]
        for name in ("Clusters", "Smallest", "Median", "Largest"):
            facts.append((name if name == "Clusters" else f"{name} cluster", number_text(row.get(name), "g")))
        words = f"Clusters mined before epoch {epoch}: a row for each, with the images nearest to its centre"
        slide = {"epoch": epoch, "url": url(picture) if picture in view.files else "", "alt": words, "facts": facts}
        slides.append(slide | {"left": 100 * (epoch - first + 0.5) / (last - first + 1)})  # as in the chart
    return slides, chart("Mined labels", lines, bounds=(0, 1))


def strongest_factor(view: RunView) -> str:
    """Return the known factor that the labels mined last agree with most, empty where there is none."""
    last = view.rows["mining"][-1] if view.rows["mining"] else {}
    factors = {name[4:]: value for name, value in last.items() if name.startswith("AMI ") and name != "AMI class"}
    return max(factors, key=factors.get, default="")


def size_of(picture: Path) -> tuple[int, int] | None:
    """Return width and height of a picture, None for one that cannot be read: the browser sees for itself."""
    try:
        with Image.open(picture) as image:
            return image.size
    except (OSError, ValueError):
        return None


def neighbours(view: RunView) -> dict[str, list[dict[str, object]]]:
    """Return the sheets of nearest neighbours that there are, {test set: sheets by the Class and Shared embedding}."""
    sets = {}
    for name in view.test_sets:
        for task, middle in (("Class", ""), ("Shared", "_Shared")):
            file = f"sample_recoveries{middle}{file_suffix(name)}.png"
            if file in view.files:
                words = f"Images of {name}, each in a row with its nearest neighbours by the {task} embedding"
                sheet = {"task": task, "url": url(file), "alt": words, "size": size_of(view.folder / file)}
                sets.setdefault(name, []).append(sheet)
    return sets


def commands(view: RunView) -> dict[str, str]:
    """Return what can be done with the run, {in words: command line}."""
    folder, parent = (shlex.quote(str(path)) for path in (view.folder.absolute(), view.folder.absolute().parent))
    start = view.provenance[-1] if view.provenance else {}
    goes_on = {"running": "Go on, should it be interrupted", "stopped": "Go on where it stopped"}
    more = [] if view.state in goes_on else ["--n_epochs", str(2 * int(view.flags["n_epochs"]))]
    return {
        goes_on.get(view.state, "Train longer"): command(["--resume", str(view.folder.absolute()), *more], start),
        "Score it": f"python evaluate.py {folder}",
        "Embed other images": f"python evaluate.py {folder} --embed FOLDER --save_embeddings new.npz",
        "Compare all runs beside it": f"python evaluate.py --compare {parent}",
    }


def summary(view: RunView, written: float) -> dict[str, object]:
    """Return what the index shows of a run, plain values. written: time of its page, seconds since 1970."""
    name = view.test_sets[0] if view.test_sets else "test"
    recalls = points_of(view.rows["val"], column(name, "Recall @ 1"))
    clusterings = points_of(view.rows["val"], column(name, "NMI"))
    return {
        "dataset": shown(view.flags.get("dataset", "")),
        "test_set": name,
        "state": view.state,
        "epoch": view.epoch,
        "n_epochs": int(view.flags["n_epochs"]),
        "seconds": view.seconds,
        "written": int(written),
        "patience": max(SILENCE, 3 * view.seconds / view.epoch) if view.epoch else FIRST_SILENCE,
        "best": finite(view.best(name).get(column(name, "Recall @ 1"))),
        "last": recalls[-1][1] if recalls else None,
        "nmi": clusterings[-1][1] if clusterings else None,
        "seed": shown(view.flags.get("seed", "")),
        "curve": thinned(recalls, 60),
        "flags": {flag: shown(value) for flag, value in view.flags.items() if makes_setting(flag)},
    }


@functools.cache
def environment() -> jinja2.Environment:
    """Return what renders the templates; whatever they show is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    look = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    made = jinja2.Environment(loader=loader, **look)
    made.filters |= {"url": url, "duration": duration, "number": number_text}
    made.globals |= {"colours": COLOURS}
    made.policies["json.dumps_kwargs"] = {}  # flags keep their order
    return made


def rendered(template: str, **values: object) -> bytes:
    """Return a template filled in, as UTF-8; bytes of names that are none become replacement characters."""
    text = environment().get_template(template).render(**values)
    return re.sub("[\ud800-\udfff]", "\ufffd", text).encode()


@functools.cache
def warn(path: Path, reason: str) -> None:
    """Print a warning, once per process."""
    print(f"warning: {path}: {reason}; training goes on without it")


@contextlib.contextmanager
def warned(path: Path) -> Iterator[None]:
    """Turn what keeps a picture or a page from being drawn into a warning: training is worth more."""
    try:
        yield
    except OSError as error:
        warn(path, f"cannot be written ({error.strerror or first_line(error)})")
    except Exception as error:
        warn(path, f"cannot be drawn ({type(error).__name__}: {first_line(error)})")


def write_page(view: RunView) -> None:
    """Write page.html in a run folder; where that fails it is a warning."""
    written = time.time()
    flags, defaults = view.flags, view.defaults
    changed = [flag for flag in flags if flag in defaults and shown(flags[flag]) != shown(defaults[flag])]
    with warned(view.folder / "page.html"):
        slides, mined_chart = mining_slides(view)
        content = rendered(
            "page.html",
            view=view,
            name=view.folder.absolute().name,
            summary=summary(view, written),
            written=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written)),
            panels=[score_panel(view, name) for name in view.test_sets],
            training=training_charts(view),
            slides=slides,
            first_mined=dict(slides[0]["facts"]) if slides else {},
            spent=[(what, round(100 * part / view.seconds)) for what, part in view.spent.items() if view.seconds],
            image_sets=[(name, of["images"], of["classes"]) for name, of in view.contents.items() if "images" in of],
            mined_chart=mined_chart,
            strongest=strongest_factor(view),
            mined_size=size_of(view.folder / slides[-1]["url"]) if slides else None,
            neighbours=neighbours(view),
            probe=probe_charts(view),
            changed={flag: [shown(values[flag]) or "empty" for values in (flags, defaults)] for flag in changed},
            others={flag: shown(value) for flag, value in flags.items() if flag not in changed},
            files=[name for kind in FILES for name in sorted(view.files) if re.fullmatch(kind, name)],
            commands=commands(view),
        )
        write_file(view.folder / "page.html", content)
