"""Plots: what their SVG shows, and the graph of a network."""

import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from report import fonts, plots
from run.history import History
from support import packages
from support.errors import InputError

ROWS = [
    {"Epochs": 0, "Time": 1.0, "NMI": 0.5, "Recall @ 1": 0.3},
    {"Epochs": 2, "Time": 1.0, "NMI": 0.4, "Recall @ 1": 0.6},
    {"Epochs": 4, "Time": 1.0, "NMI": 0.45, "Recall @ 1": 0.2},
]
PROBES = ["Class from Shared", "Mined from Class", "Class from Class", "Mined from Shared"]
PROBES += ["Class by chance", "Mined by chance"]


def elements(path, name):
    """Return the groups of an SVG file whose id matches a pattern, in order."""
    return [node for node in ElementTree.parse(path).iter() if re.fullmatch(name, node.get("id") or "")]


def texts(node):
    """Return the texts in a part of an SVG file."""
    return [child.text for child in node.iter() if child.tag.endswith("}text")]


def all_texts(path):
    """Return the texts of an SVG file."""
    return texts(ElementTree.parse(path).getroot())


def train_rows(n_epochs):
    """Return rows of log_train_Class.csv, without the Shared task."""
    same = {"Time": 1.0, "Train Loss": 1.0, "Shared Loss": None}
    return [{"Epochs": i, **same, "Class Loss": 1 / (i + 1), "Adversarial Loss": -i} for i in range(n_epochs)]


def history_of(folder, train, val=(), mined=(), probe=(), **flags):
    """Return a history whose run is called as its folder, with rows of each log."""
    flags = {"dataset": "mine", "n_epochs": 9, "scheduler": "step", "tau": [99]} | flags
    mining = [{"Before Epoch": epoch, "Time": 1.0} | row for epoch, row in mined]
    rows = {"train": train, "val": list(val), "mining": mining, "probe": list(probe)}
    return History(folder, flags, rows=rows)


def test_progress_shows_losses_and_scores(tmp_path):
    path = tmp_path / "plot.svg"
    history = history_of(tmp_path / "a $run$", train_rows(5), ROWS, mined=[(0, {}), (4, {})], tau=[3, 9])
    plots.draw_progress(path, history, "test")
    shown = all_texts(path)
    assert shown.count("epoch") == 2
    assert {"Class loss in training", "Adversarial loss in training", "NMI", "Recall @ 1", "best epoch"} <= set(shown)
    assert {"a $run$", "Recall @ 1 0.6000 in the best epoch, 2"} <= set(shown)
    assert {"mined labels renewed", "learning rate lowered"} <= set(shown)
    assert not {"Shared loss in training", "Train loss in training"} & set(shown)
    assert len(elements(path, r"axes_\d+")) == 3
    plots.draw_progress(path, history_of(tmp_path, train_rows(5), ROWS, tau=[9]), "test")
    assert not {"mined labels renewed", "learning rate lowered"} & set(all_texts(path))
    plots.draw_progress(path, history_of(tmp_path, train_rows(2), tau=[1]), "test")
    assert {"not scored yet", "Class loss in training", "learning rate lowered"} <= set(all_texts(path))


def test_the_learning_rate_has_a_panel_where_it_is_logged(tmp_path):
    path = tmp_path / "plot.svg"
    rows = [row | {"Learning Rate": 0.1 ** row["Epochs"]} for row in train_rows(5)]
    plots.draw_progress(path, history_of(tmp_path, rows, ROWS), "test")
    assert len(elements(path, r"axes_\d+")) == 4
    assert "learning rate" in all_texts(path)


def test_the_legend_of_scores_is_sorted_and_beside_the_curves(tmp_path):
    path = tmp_path / "plot.svg"
    plots.draw_progress(path, history_of(tmp_path, train_rows(5), ROWS), "test")
    scores = elements(path, r"axes_\d+")[-1]
    (legend,) = (node for node in scores.iter() if node.get("id") == "legend_1")
    assert texts(legend) == ["NMI", "Recall @ 1"]  # 0.45 and 0.2 in the last epoch
    corners = re.findall(r"[\d.]+", next(node for node in scores.iter() if node.tag.endswith("}path")).get("d"))
    right = max(map(float, corners[::2]))
    names = [node for node in legend.iter() if node.tag.endswith("}text")]
    assert all(float(node.get("x")) > right for node in names)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_scores_of_some_epochs_only_are_drawn(missing):
    rows = [{"Epochs": i, "Time": 1, "NMI": 0.9 if i % 10 == 9 else missing, "F1": missing} for i in range(100)]
    axis = Figure().subplots()
    plots.draw_curves(axis, plots.logged_values(rows))
    (line,) = axis.lines
    assert line.get_label() == "NMI"
    assert line.get_xdata().tolist() == list(range(9, 100, 10))
    assert line.get_markevery() == 1


def test_one_epoch_is_one_tick(tmp_path):
    path = tmp_path / "plot.svg"
    plots.draw_progress(path, history_of(tmp_path, train_rows(1), ROWS[:1]), "test")
    ids = [node.get("id") or "" for node in elements(path, r"axes_\d+")[-1].iter()]
    assert len([name for name in ids if name.startswith("xtick")]) == 1


def test_probe_has_a_panel_for_each_kind_of_label(tmp_path):
    path = tmp_path / "plot.svg"
    rows = [{"Epochs": 0, "Time": 1.0} | dict.fromkeys(PROBES, 0.5)]
    plots.draw_probe(path, history_of(tmp_path / "a$^$ run", [], probe=rows))
    assert len(elements(path, r"axes_\d+")) == 2
    panels = {"the class (should be low from Shared)", "the mined label (should be low from Class)"}
    assert panels | {"a$^$ run", "by chance", "from the Class embedding"} <= set(all_texts(path))
    assert "accuracy of a nearest-neighbour probe: the 5 nearest images vote for the label" in all_texts(path)
    assert "test images" not in all_texts(path)


def test_probe_of_test_images_is_in_the_same_panels(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    of_test = ["Class from Class", "Class by chance", "light from Class", "light by chance"]
    columns = [*PROBES, *of_test[2:], *(f"Set 1 {name}" for name in of_test)]
    rows, agreements = [{"Epochs": 0, "Time": 1.0} | dict.fromkeys(columns, 0.5)], {"AMI class": 0.1, "AMI light": 0.7}
    plots.draw_probe(tmp_path / "plot.svg", history_of(tmp_path, [], mined=[(0, agreements)], probe=rows))
    (figure,) = drawn
    *axes, agreement = figure.axes
    assert agreement.get_title("left") == "AMI of the mined labels"
    assert [(line.get_label(), line.get_ydata().tolist()) for line in agreement.lines] == [
        ("class", [0.1]), ("light", [0.7])
    ]  # fmt: skip
    titles = ["the class (should be low from Shared)", "the mined label (should be low from Class)"]
    assert [axis.get_title("left") for axis in axes] == [*titles, "light (should be low from Class)"]
    assert [[line.get_marker() for line in axis.lines] for axis in axes] == [
        ["s", "", "o", "_", ""], ["s", "o", "_"], ["s", "", "_", ""]
    ]  # fmt: skip
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][-2:] == ["training images", "test images"]


def test_comparison_has_a_line_for_each_setting(tmp_path):
    path = tmp_path / "plot.svg"
    curves = {f"setting {i}": pd.DataFrame(np.full((3, 1 + i), 0.5)) for i in range(10)}
    plots.draw_comparison(path, curves)
    assert {"setting 0 (1 run)", "setting 9 (10 runs)"} <= set(all_texts(path))
    before = path.read_bytes()
    with pytest.raises(TypeError):
        plots.draw_comparison(path, {"a": pd.DataFrame({"run": ["no number"]})})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["plot.svg"]


@pytest.mark.parametrize("n_settings", [3, 40])
def test_the_legend_of_a_comparison_is_beside_the_curves_and_whole(tmp_path, n_settings):
    names = [f"setting {i} with a long name of flags and values, to {i}" for i in range(n_settings)]
    plots.draw_comparison(tmp_path / "plot.svg", {name: pd.DataFrame(np.full((3, 2), 0.5)) for name in names})
    root = ElementTree.parse(tmp_path / "plot.svg").getroot()
    width, height = (float(size) for size in root.get("viewBox").split()[2:])
    places = {}
    for node in root.iter():
        if node.tag.endswith("}text"):
            places[node.text] = float(node.get("x")), float(node.get("y"))
    (legend,) = elements(tmp_path / "plot.svg", r"legend_\d+")
    curves = next(node for node in elements(tmp_path / "plot.svg", "patch_2")[0].iter() if node.get("d")).get("d")
    right_of_curves = max(map(float, re.findall(r"[\d.]+", curves)[::2]))
    assert texts(legend) == [f"{name} (2 runs)" for name in names]
    assert all(right_of_curves < places[text][0] < width - 200 and places[text][1] < height for text in texts(legend))


def test_forty_curves_look_different(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plots.draw_comparison(tmp_path / "plot.svg", {str(i): pd.DataFrame(np.full((3, 2), 0.5)) for i in range(40)})
    lines = drawn[0].axes[0].lines
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 40


@pytest.mark.parametrize("values", [[str(5 * i) for i in range(1, 41)], ["no_norm", "mean"], ["/a/$net", "/b/$net"]])
def test_values_below_an_ablation_do_not_overlap(tmp_path, monkeypatch, values):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plots.draw_ablation(
        tmp_path / "plot.svg", "flag", pd.DataFrame({"best epoch": [[0.5]] * len(values)}, index=values)
    )
    drawn[0].draw_without_rendering()
    labels = drawn[0].axes[0].get_xticklabels()
    boxes = [label.get_window_extent() for label in labels]
    assert [label.get_text().replace("\\$", "$") for label in labels] == values
    assert all(one.x1 < other.x0 for one, other in zip(boxes, boxes[1:]))


def test_plots_look_the_same_whatever_the_users_matplotlibrc(tmp_path):
    theirs = {"text.usetex": True, "font.family": "serif", "axes.facecolor": "black", "figure.dpi": 30}
    theirs |= {"savefig.bbox": "tight", "lines.linewidth": 9, "backend": "qtagg", "xtick.labelsize": 30}
    for name, settings in (("ours.svg", {}), ("theirs.svg", theirs)):
        with matplotlib.rc_context(settings):
            plots.draw_progress(tmp_path / name, history_of(tmp_path, train_rows(5), ROWS), "test")
            assert matplotlib.rcParams["text.usetex"] == bool(settings)  # left as it was
    assert (tmp_path / "ours.svg").read_bytes() == (tmp_path / "theirs.svg").read_bytes()


def test_names_are_drawn_in_a_font_that_has_their_characters(tmp_path):
    """STIXGeneral, which Matplotlib brings, stands for a font of the system."""
    own = fonts.characters_of(fonts.default_font())
    more = fonts.characters_of(font_manager.findfont("STIXGeneral"))
    character = chr(min(code for code in {*more} - {*own} if chr(code).isprintable()))
    family, file = fonts.font_of(character)
    assert family != fonts.DEFAULT_FONT
    assert ord(character) in fonts.characters_of(file)
    plots.draw_comparison(tmp_path / "plot.svg", {f"a {character}": pd.DataFrame([0.5]), "b": pd.DataFrame([0.5])})
    styles = {node.text: node.get("style") for node in ElementTree.parse(tmp_path / "plot.svg").iter() if node.text}
    assert f"'DejaVu Sans', '{family}'" in styles[f"a {character} (1 run)"]
    assert family not in styles["b (1 run)"]
    assert [part for _, part in fonts.parts_by_font(f"a {character}")] == ["a ", character]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_character_that_no_font_has_is_drawn_without_a_word(tmp_path, suffix):
    plots.draw_comparison(tmp_path / f"plot{suffix}", {"\U000fabcd 漢字 🦜": pd.DataFrame([0.5])})
    assert fonts.font_of("\U000fabcd")[0] == fonts.DEFAULT_FONT


def test_ablation_shows_every_value_mean_and_run(tmp_path):
    path = tmp_path / "plot.svg"
    lines = {"shapes best epoch": [[0.5, 0.7], None, [0.6]], "paper, x": [None, [0.4], None]}
    plots.draw_ablation(path, "shared_num_classes", pd.DataFrame(lines, index=["4", "8", "16"]))
    assert {"4", "8", "16", "--shared_num_classes", "shapes best epoch", "paper, x"} <= set(all_texts(path))
    axis = Figure().subplots()
    plots.draw_means(axis, [0, 2], [np.array([0.5, 0.7]), np.array([0.6])], {"color": "red"}, "shapes")
    assert axis.lines[0].get_ydata() == pytest.approx([0.6, 0.6])
    (band,) = axis.collections
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(0.6 + 0.1 * 2**0.5)


def test_differences_have_a_panel_for_each_score_and_a_row_for_each_setting(tmp_path):
    last, best = (np.array([0.1, 0.2]), 0.25), (np.array([0.1, 0.3]), 0.2)
    points = {("Recall @ 1", name, at): values for name in "ab" for at, values in (("last", last), ("best", best))}
    points["NMI", "a", "last"] = last
    plots.draw_differences(tmp_path / "plot.svg", points, "adv_weights 0.0")
    assert len(elements(tmp_path / "plot.svg", r"axes_\d+")) == 2
    shown = all_texts(tmp_path / "plot.svg")
    assert {"a", "b", "difference in Recall @ 1", "difference in NMI", "best epoch", "last epoch"} <= set(shown)
    assert any(text.startswith("Differences to adv_weights 0.0, same seeds") for text in shown)


def test_bars_are_at_the_interval_and_marks_at_the_mean():
    axis = Figure().subplots()
    rows = [(2.0, np.array([0.1, 0.3]), 0.3), (3.0, np.array([0.5]), np.nan)]
    plots.draw_intervals(axis, rows, color="red", marker="o", label="last epoch")
    assert axis.lines[0].get_xydata().tolist() == [[pytest.approx(0.2), 2.0], [0.5, 3.0]]
    bars, dots, _ = axis.collections
    assert bars.get_segments()[0] == pytest.approx(np.array([[-0.1, 2.0], [0.5, 2.0]]))
    assert dots.get_offsets().tolist() == [[0.1, 2.0], [0.3, 2.0]]


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_the_same_figure_is_the_same_file(tmp_path, suffix):
    drawn = []
    for name in ("one", "other"):
        plots.draw_ablation(tmp_path / (name + suffix), "cluster_mode", pd.DataFrame({"shapes": {"mean": [0.5]}}))
        drawn.append((tmp_path / (name + suffix)).read_bytes())
    assert drawn[0] == drawn[1]
    assert drawn[0].startswith({".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}[suffix])
    assert b"CreationDate" not in drawn[0]
    if suffix == ".png":
        with Image.open(tmp_path / "one.png") as picture:
            assert picture.width == round(8.4 * 150)


class Network(torch.nn.Module):
    """A network as main.py trains, with one layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 4)

    def forward(self, images):
        """Embed a batch of uint8 images."""
        assert images.dtype == torch.uint8
        return {"Class": self.head(self.norm(images.float()).mean((2, 3)))}


def test_the_graph_of_a_network_shows_its_layers_and_changes_nothing():
    pytest.importorskip("torchview")
    network = Network().train()
    before, random_state = {name: value.clone() for name, value in network.state_dict().items()}, torch.get_rng_state()
    graph = packages.network_graph(network, 32)
    shown = " ".join(texts(ElementTree.fromstring(graph)))
    assert "Linear" in shown
    assert "(1, 3, 32, 32)" in shown
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_what_graphs_need_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(packages.importlib, "import_module", lambda name: None)
    with pytest.raises(InputError, match="Graphviz's program dot is missing: https://graphviz.org/download"):
        packages.require_graphviz()


def test_a_backend_that_is_not_installed_and_a_damaged_matplotlibrc_stop_nothing(tmp_path):
    """Notebooks set MPLBACKEND for all that they start, in whatever environment that is."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "matplotlibrc").write_bytes(b"# caf\xe9\n")  # as an editor on Windows writes it
    environment = os.environ | {"MPLBACKEND": "none_such", "PYTHONPATH": str(ROOT)}
    environment["MATPLOTLIBRC"] = str(tmp_path / "config")
    program = "from report.plots import *; draw_comparison(Path('plot.png'), {'a': pd.DataFrame([0.5])})"
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, check=True)
    assert (tmp_path / "plot.png").is_file()
