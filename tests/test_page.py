"""The page of a run and the index of runs: what they show, link to and never execute."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from conftest import At, act_at
from PIL import Image

from data.images import ImageSet
from report import page, sheets
from run.history import LOGS, History

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


def history_of(folder, n_epochs=4, prefixes=("",), **more):
    """Write a run whose folder holds some of its files; return its history."""
    (folder / "mined").mkdir(parents=True, exist_ok=True)
    names = ["mined_clusters.png", "mined/before_epoch_0000.jpg", "sample_recoveries.png", "sample_recoveries_set1.png"]
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / name)
    for name in ("InfoPlot_Class.svg", "InfoPlot_Probe.svg", "checkpoint.pth.tar", "last.pth.tar"):
        (folder / name).write_bytes(b"")
    flags = {"dataset": "cub200", "arch": "small", "seed": 1, "n_epochs": 4, "lr": 0.1, "task_p": [1.0, 0.8]}
    flags |= {"tau": [2], "scheduler": "step", "started_from": "nothing"}
    given = {"flags": flags | more.pop("flags", {}), "rows": rows_of(n_epochs, prefixes), "defaults": {"lr": 1e-5}}
    given |= {"initial_scores": {f"{prefix}Recall @ 1": 0.3 for prefix in prefixes}, "epoch": n_epochs}
    given |= {"provenance": [{"command": "python main.py"}], "seconds": 8.0, "spent": {"training": 6.0, "drawing": 0.1}}
    given |= {"image_sets": {"train": {"images": 1234, "classes": 5}}, "peak_memory": {"process": 2e9}}
    history = History(folder, **(given | more))
    history.write()
    return history


def drawn(history):
    """Draw the page of a run and the index; return both taken apart."""
    page.write_page(history)
    page.write_index(history.folder)
    return Parsed(history.folder / "page.html"), Parsed(history.folder.parent / "index.html")


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
    history = history_of(tmp_path / "a run", provenance=[{"processes": "16", "machines": "2"}])
    (resume,) = [line for what, line in page.commands(history).items() if what.startswith("Resume")]
    assert resume.startswith("torchrun --nnodes=2 ")
    assert resume.endswith(f" --nproc_per_node=8 main.py --resume '{tmp_path}/a run'")


@pytest.mark.parametrize("prefixes", [("",), ("Set 1 ", "Set 2 ", "Val ")])
def test_a_page_shows_the_run_and_all_its_links_lead_somewhere(tmp_path, prefixes):
    history = history_of(tmp_path / "run", prefixes=prefixes)
    parsed, table = drawn(history)
    for path in (tmp_path / "run/page.html", tmp_path / "index.html"):
        require_links(path)
    assert {"0.6000", "0.3000", "0.5000"} <= set(parsed.texts["td"] + parsed.texts["b"])
    assert ("0.6610" in parsed.texts["td"]) == (prefixes == ("",))
    assert all(attributes["alt"] for tag, attributes in parsed.tags if tag == "img")
    words = [
        attributes["alt"] for tag, attributes in parsed.tags if tag == "img" and "InfoPlot" in attributes.get("src", "")
    ]
    assert len(words) == 1 + (prefixes == ("",))  # this run has no plots of the other sets
    assert "light by chance 0.4" in words[-1]
    assert parsed.texts["summary"] == ["8 other flags at their defaults, and notes"]
    assert "checkpoint.pth.tar" not in parsed.texts["a"]
    assert "Peak memory: process 2.00 GB." in parsed.texts["span"]
    assert "0.6000" in table.texts["td"]
    assert ("0.6610" in table.texts["td"]) == (prefixes == ("",))


def test_the_slider_has_a_step_for_each_mining(tmp_path):
    parsed, _ = drawn(history_of(tmp_path / "run", n_epochs=7))
    slider = parsed.with_id("slider")
    assert [slider[name] for name in ("min", "max", "step", "value")] == ["0", "3", "1", "3"]
    slides = json.loads(parsed.texts["script"][0])
    assert [slide["epoch"] for slide in slides] == [0, 2, 4, 6]
    assert slides[0]["sheet"]["url"] == "mined/before_epoch_0000.jpg"
    assert [slide["sheet"] for slide in slides[1:]] == [None] * 3
    assert [value for _, value in slides[0]["facts"]] == ["–", "0.000", "0.123", "8", "–", "–", "–"]
    assert slides[1]["facts"][2] == ["AMI with light", "2.123"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_and_never_executed(tmp_path, name):
    pages = []
    for top, text in (("tame", "tame"), ("hostile", name)):
        flags = dict.fromkeys(["arch", "dataset", "lr"], text) | {"note": f"{text}</script>-->"}
        more = {"flags": flags, "provenance": [{text: text}], "reason": f"{text}</p>"}
        history = history_of(tmp_path / top / text, **more)
        pages.append(drawn(history))
    for path in (history.folder / "page.html", tmp_path / "hostile/index.html"):
        require_links(path)
    for tame, hostile in zip(*pages):
        tags = [[(tag, sorted(attributes)) for tag, attributes in parsed.tags] for parsed in (tame, hostile)]
        assert tags[0] == tags[1]
    parsed, table = pages[1]
    shown = re.sub("[\ud800-\udfff]", "\ufffd", name)
    assert "".join(parsed.texts["h1"]).strip() == shown
    assert shown in table.texts["a"]
    assert len(parsed.texts["script"]) == 2
    assert f"{shown}</script>-->" in parsed.texts["dd"]


def test_the_index_reads_the_runs_and_skips_what_is_none(tmp_path):
    histories = []
    for i, more in enumerate([{"lr": 0.5}, {"seed": 7}, {"lr": 0.5, "savename": "x"}]):
        histories.append(history_of(tmp_path / f"run{i}", n_epochs=i + 1, flags=more, state="stopped"))
    for name in ("damaged", "truncated"):
        history_of(tmp_path / name)
    (tmp_path / "damaged" / "run.json").write_text("{")
    (tmp_path / "endless").mkdir()
    for file in ("hypa.pkl", "run.json"):
        text = (tmp_path / "run0" / file).read_bytes()
        (tmp_path / "endless" / file).write_bytes(text.replace(b'"seconds": 8.0', b'"seconds": 1e999'))
    (tmp_path / "truncated" / "hypa.pkl").write_bytes(b"\x80")
    (tmp_path / "folder" / "hypa.pkl").mkdir(parents=True)
    (tmp_path / "old").mkdir()  # of a version without run.json and page
    (tmp_path / "old" / "hypa.pkl").write_bytes((tmp_path / "run0" / "hypa.pkl").read_bytes())
    _, table = drawn(histories[0])
    cells = [attributes["data-value"] for tag, attributes in table.tags if "data-value" in attributes]
    rows = [cells[start : start + 9] for start in range(0, len(cells), 9)]
    assert rows == [
        ["run1", "0.6", "0.6", "0.5", "stopped", "2", "8.0", "7", "lr 0.1"],
        ["run2", "0.6", "0.5", "0.5", "stopped", "3", "8.0", "1", "lr 0.5"],
        ["run0", "0.5", "0.5", "0.5", "stopped", "1", "8.0", "1", "lr 0.5"],
        ["old", "", "", "", "stopped", "0", "0.0", "1", "lr 0.5"],
    ]
    assert [attributes.get("aria-sort") for tag, attributes in table.tags if tag == "th"][1] == "descending"
    paths = [attributes["d"] for tag, attributes in table.tags if tag == "path"]
    assert paths[0] == "M0.0 22.0L50.0 2.0h.01"


def test_a_run_that_has_nothing_yet_has_a_page(tmp_path):
    none = {"rows": {name: [] for name in LOGS}, "initial_scores": {}, "provenance": []}
    parsed, table = drawn(history_of(tmp_path / "run", n_epochs=0, **none))
    assert "Nothing has been scored yet." in parsed.texts["p"]
    assert "–" in table.texts["td"]


def test_a_page_says_what_of_a_data_set_was_left_out(tmp_path):
    note = "2 hidden files: images/.DS_Store, images/._a; 1 copy of images beside them: images/<b>.jpg~"
    parsed, _ = drawn(history_of(tmp_path / "run", flags={"left_out": note}))
    assert f"left out: {note}" in parsed.texts["div"]
    assert "1,234 images of 5 classes" in " ".join(parsed.texts["div"])


def test_an_index_that_is_not_ours_is_left_alone(tmp_path, caplog):
    (tmp_path / "index.html").write_text("mine")
    for _ in range(2):
        page.write_index(history_of(tmp_path / "run").folder)
    assert (tmp_path / "index.html").read_text() == "mine"
    assert len(caplog.messages) == 1


def test_what_cannot_be_drawn_is_a_warning_once(tmp_path, caplog):
    history = history_of(tmp_path / "run", n_epochs=2)
    history.rows["probe"] = [{"Epochs": 0, "Time": 1.0, "Class by chance": "?"}]
    images = ImageSet([""] * 4, np.array([0, 0, 1, 1]), ["a", "b"], pixels=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    for name in ("InfoPlot_Class.svg", "mined_clusters.png", "sample_recoveries.png", "page.html"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
        (tmp_path / "run" / name).mkdir()
    for _ in range(2):
        assert sheets.draw_mining(history, images, np.array([0, 1, 0, 1]), np.zeros(4)) == []
        drawn_files = sheets.draw_neighbours(
            history, {"test": images}, {"test": dict.fromkeys(("Class", "Shared"), np.eye(4))}
        )
        page.draw_plots(history)
        page.draw(history)
    assert [path.name for path in drawn_files] == ["sample_recoveries_Shared.png"]
    assert [line.split(": ")[0].removeprefix(f"{tmp_path}/run/") for line in caplog.messages] == [
        "mined_clusters.png", "sample_recoveries.png", "InfoPlot_Class.svg", "InfoPlot_Probe.svg", "page.html"
    ]  # fmt: skip
    assert caplog.messages[0].endswith(": cannot be written (Is a directory)")
    assert "cannot be drawn (ValueError: could not convert string to float" in caplog.messages[3]


def test_plots_are_drawn_when_their_log_is_newer_and_nothing_in_a_folder_that_has_gone(tmp_path):
    history, plot = history_of(tmp_path / "run"), tmp_path / "run" / "InfoPlot_Class.svg"
    plot.write_bytes(b"")
    page.draw(history)
    assert not plot.read_bytes()
    history.write_log("val")
    page.draw(history)
    drawn_at = plot.stat().st_mtime_ns
    assert plot.read_text().startswith("<?xml")
    page.draw(history)
    assert plot.stat().st_mtime_ns == drawn_at
    shutil.rmtree(tmp_path / "run")
    page.draw(history)
    assert not (tmp_path / "run").exists()


def test_two_runs_write_the_index_at_once(tmp_path):
    histories = [history_of(tmp_path / name) for name in ("one", "other")]
    act_at([At("os.rename", "index.html")], lambda: page.write_index(histories[1].folder))
    page.write_index(histories[0].folder)
    assert {"one", "other"} <= set(Parsed(tmp_path / "index.html").texts["a"])
    assert not list(tmp_path.glob("**/*.tmp"))
