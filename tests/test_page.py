"""The page of a run and the index of runs: what they show, link to and never execute."""

import json
import os
import re
from html.parser import HTMLParser
from urllib.parse import unquote_to_bytes

import pytest
from conftest import At, act_at
from PIL import Image

from report import charts, index, page
from run.logs import LOGS

HOSTILE = ["<img src=x onerror=alert(1)>", "<script>alert(1)<b>", "javascript:alert(1)", "a#b?c%41 \"d\" 'e' & {{ f }}"]
HOSTILE += [os.fsdecode(b"bytes \xff")]


class Parsed(HTMLParser):
    """A page taken apart. tags: (name, attributes). texts: name of the tag around it to all its texts."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.inside = [], {}, [""]
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "input", "br"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.inside[-1], []).append(data)

    def with_id(self, name):
        """Return the attributes of the element of an id."""
        (found,) = [attributes for _, attributes in self.tags if attributes.get("id") == name]
        return found


def rows_of(n_epochs, prefixes=("",)):
    """Return rows of each log: a mining before every second epoch, and the best epoch 1."""
    rows = {name: [] for name in LOGS}
    for i in range(n_epochs):
        done = {"Epochs": i, "Time": 1.0}
        rows["train"].append(done | {"Train Loss": 1.0, "Class Loss": 1 / (i + 1), "Shared Loss": None})
        scores = {"NMI": None if i % 2 else 0.5, "Recall @ 1": 0.6 if i == 1 else 0.5, "Recall @ 2": 0.7}
        rows["val"].append(done | {prefix + score: scores[score] for prefix in prefixes for score in scores})
        kinds = ["light", f"{prefixes[0] or 'Test '}light"]
        rows["probe"].append(done | {f"{kind} {what}": 0.4 for kind in kinds for what in ("from Class", "by chance")})
        if i % 2 == 0:
            agreements = {"ARI with previous": 0.7 if i else None, "AMI class": -0.0002, "AMI light": 0.123 + i}
            rows["mining"].append({"Before Epoch": i, "Time": 1.0, "Clusters": 8, "Empty": 0} | agreements)
    return rows


def view_of(folder, n_epochs=4, prefixes=("",), **more):
    """Return a view of a run whose folder holds some of its files."""
    (folder / "mined").mkdir(parents=True, exist_ok=True)
    names = ["mined_clusters.png", "mined/before_epoch_0000.jpg", "sample_recoveries.png", "sample_recoveries_set1.png"]
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / name)
    for name in ("log_val_Class.csv", "InfoPlot_Class.svg", "checkpoint.pth.tar"):
        (folder / name).write_bytes(b"")
    flags = {"dataset": "cub200", "arch": "small", "seed": 1, "n_epochs": 4, "lr": 0.1, "task_p": [1.0, 0.8]}
    given = {"folder": folder, "flags": flags | more.pop("flags", {}), "rows": rows_of(n_epochs, prefixes)}
    given |= {"defaults": {"lr": 1e-5, "task_p": [1.0, 0.8], "resume": None}, "paper": {"Recall @ 1": 0.661}}
    given |= {"initial_scores": {f"{prefix}Recall @ 1": 0.3 for prefix in prefixes}, "state": "running", "reason": ""}
    given |= {"provenance": [{"command": "python main.py"}], "epoch": n_epochs, "seconds": 8.0, "seconds_left": None}
    given |= {"spent": {"training": 6.0, "drawing": 0.1}, "contents": {"train": {"images": 1234, "classes": 5}}}
    return page.RunView(**(given | more))


def written(view):
    """Write the page of a view and the index; return both taken apart."""
    page.write_page(view)
    index.write_index(view.folder)
    return Parsed(view.folder / "page.html"), Parsed(view.folder.parent / "index.html")


def require_links(path):
    """Check that all that a page links to exists beside it, and that nothing comes from elsewhere."""
    parsed = Parsed(path)
    links = [attributes[name] for _, attributes in parsed.tags for name in ("href", "src") if name in attributes]
    for link in links:
        if link == "data:,":  # no icon is asked for
            continue
        target = link.partition("#")[0]
        assert os.path.exists(os.path.join(os.fsencode(path.parent), unquote_to_bytes(target))), link
        assert not re.match("[a-z]+:|//", link)
        if link.startswith("#"):
            parsed.with_id(link[1:])
    assert len(links) > 1
    assert not re.search(r"url\(|@import|fetch\(", path.read_text(encoding="utf-8"))


def test_a_page_resumes_the_run_on_as_many_machines(tmp_path):
    view = view_of(tmp_path / "a run", provenance=[{"processes": "16", "machines": "2"}])
    (resume,) = [line for what, line in page.commands(view).items() if what.startswith("Go on")]
    assert resume.startswith("torchrun --nnodes=2 ")
    assert resume.endswith(f" --nproc_per_node=8 main.py --resume '{tmp_path}/a run'")


@pytest.mark.parametrize("prefixes", [("",), ("Set 1 ", "Set 2 ", "Val ")])
def test_a_page_shows_the_run_and_all_its_links_lead_somewhere(tmp_path, prefixes):
    parsed, table = written(view_of(tmp_path / "run", prefixes=prefixes))
    for path in (tmp_path / "run/page.html", tmp_path / "index.html"):
        require_links(path)
    assert {"0.6000", "0.3000", "0.5000"} <= set(parsed.texts["td"] + parsed.texts["b"])
    assert ("0.6610" in parsed.texts["td"]) == (prefixes == ("",))
    assert all(attributes["alt"] for tag, attributes in parsed.tags if tag == "img")
    assert all(attributes["aria-label"] for tag, attributes in parsed.tags if attributes.get("role") == "img")
    assert {"Class Loss", "light"} <= set(parsed.texts["b"])
    assert not {"Train Loss", "Shared Loss", "Test light", "Set 1 light"} & set(parsed.texts["b"])
    assert parsed.texts["summary"] == ["5 others, as by default, and notes"]
    assert "checkpoint.pth.tar" not in parsed.texts["a"]
    assert "0.6000" in table.texts["td"]
    assert ("0.6610" in table.texts["td"]) == (prefixes == ("",))


def test_the_slider_has_a_step_for_each_mining(tmp_path):
    parsed, _ = written(view_of(tmp_path / "run", n_epochs=7))
    slider = parsed.with_id("slider")
    assert [slider[name] for name in ("min", "max", "step", "value")] == ["0", "3", "1", "3"]
    slides = json.loads(parsed.texts["script"][1])
    assert [slide["epoch"] for slide in slides] == [0, 2, 4, 6]
    assert [slide["url"] for slide in slides] == ["mined/before_epoch_0000.jpg", "", "", "mined_clusters.png"]
    assert [value for _, value in slides[0]["facts"]] == ["–", "0.000", "0.123", "8", "–", "–", "–"]
    assert slides[1]["facts"][2] == ["AMI with light", "2.123"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_and_never_executed(tmp_path, name):
    pages = []
    for top, text in (("tame", "tame"), ("hostile", name)):
        flags = dict.fromkeys(["arch", "dataset", "lr"], text) | {"note": f"{text}</script>-->"}
        view = view_of(tmp_path / top / text, flags=flags, provenance=[{text: text}], reason=f"{text}</p>", paper={})
        pages.append(written(view))
    for path in (view.folder / "page.html", tmp_path / "hostile/index.html"):
        require_links(path)
    for tame, hostile in zip(*pages):
        tags = [[(tag, sorted(attributes)) for tag, attributes in parsed.tags] for parsed in (tame, hostile)]
        assert tags[0] == tags[1]
    parsed, table = pages[1]
    shown = re.sub("[\ud800-\udfff]", "\ufffd", name)
    assert "".join(parsed.texts["h1"]).strip() == shown
    assert shown in table.texts["a"]
    assert len(parsed.texts["script"]) == 3
    assert json.loads(parsed.texts["script"][0])["flags"]["note"] == f"{name}</script>-->"


def test_the_index_reads_the_pages_and_skips_what_is_none(tmp_path):
    for i, more in enumerate([{"lr": 0.5}, {"seed": 7}, {"lr": 0.5, "savename": "x"}]):
        page.write_page(view_of(tmp_path / f"run{i}", n_epochs=i + 1, flags=more))
    ours, huge = (tmp_path / "run0/page.html").read_text(encoding="utf-8"), '"seconds": 1e999'
    others = {"damaged": ours[:300], "empty": "", "huge": re.sub('"seconds": [0-9.]+', huge, ours)}
    for name, content in others.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "page.html").write_text(content, encoding="utf-8")
    (tmp_path / "folder" / "page.html").mkdir(parents=True)
    index.write_index(tmp_path / "run0")
    entries = index.read_entries(tmp_path)
    assert [(entry["name"], entry["best"], entry["last"], entry["nmi"]) for entry in entries] == [
        ("run1", 0.6, 0.6, 0.5), ("run2", 0.6, 0.5, 0.5), ("run0", 0.5, 0.5, 0.5)
    ]  # fmt: skip
    assert index.sparklines(entries)[0] == "0.0 22.0L50.0 2.0"
    assert {entry["flags"]["flip"] for entry in entries} == {"class"}  # of runs stored before there was such a flag
    table = Parsed(tmp_path / "index.html")
    cells = [attributes["data-value"] for tag, attributes in table.tags if "data-value" in attributes]
    assert cells[:9] == ["run1", "0.6", "0.6", "0.5", "running", "2.0", "8.0", "7", "lr 0.1"]
    assert [attributes.get("aria-sort") for tag, attributes in table.tags if tag == "th"][1] == "descending"


def test_a_run_that_has_nothing_yet_has_a_page(tmp_path):
    none = {"rows": {name: [] for name in LOGS}, "initial_scores": {}, "provenance": [], "paper": {}}
    parsed, table = written(view_of(tmp_path / "run", n_epochs=0, **none))
    assert "Nothing has been scored yet." in parsed.texts["p"]
    assert "–" in table.texts["td"]


def test_a_page_says_what_of_a_data_set_was_left_out(tmp_path):
    note = "2 hidden files: images/.DS_Store, images/._a; 1 copy of images beside them: images/<b>.jpg~"
    parsed, _ = written(view_of(tmp_path / "run", flags={"left_out": note}))
    assert f"left out: {note}" in parsed.texts["div"]
    assert "1,234 images of 5 classes" in " ".join(parsed.texts["div"])


def test_an_index_that_is_not_ours_is_left_alone(tmp_path, capsys):
    (tmp_path / "index.html").write_text("mine")
    for _ in range(2):
        index.write_index(view_of(tmp_path / "run").folder)
    assert (tmp_path / "index.html").read_text() == "mine"
    assert capsys.readouterr().out.count("warning: ") == 1


def test_what_cannot_be_written_is_a_warning(tmp_path, capsys):
    view = view_of(tmp_path / "run")
    (tmp_path / "run/page.html").mkdir()
    for _ in range(2):
        page.write_page(view)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"warning: {tmp_path}/run/page.html: cannot be written (Is a directory)")
    (tmp_path / "file").touch()
    index.write_index(tmp_path / "file")
    assert "index.html: cannot be written (Not a directory)" in capsys.readouterr().out
    assert not (tmp_path / "index.html").exists()


def test_two_runs_write_the_index_at_once(tmp_path):
    views = [view_of(tmp_path / name) for name in ("one", "other")]
    for view in views:
        page.write_page(view)
    act_at([At("os.rename", "index.html")], lambda: index.write_index(views[1].folder))
    index.write_index(views[0].folder)
    assert {"one", "other"} <= set(Parsed(tmp_path / "index.html").texts["a"])
    assert not list(tmp_path.glob("**/*.tmp"))


def test_curves_are_thinned_and_ticks_are_round():
    points = [(i, 5.0 if i == 777 else 0.0) for i in range(10001)]
    kept = charts.thinned(points, 500)
    assert len(kept) <= 502
    assert {(777, 5.0), points[-1]} <= set(kept)
    assert charts.nice_ticks(0.11, 0.93) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert charts.nice_ticks(3, 3)[0] < 3 < charts.nice_ticks(3, 3)[-1]
    assert charts.chart("empty", {"a": ("c0", [])}) is None
