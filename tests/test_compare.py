"""Comparison of stored runs against tables made by hand."""

import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from report import compare
from run.history import History
from support.errors import InputError


def write_run(path, recalls, **flags):
    """Write what a comparison reads of a run; recalls are those of epochs 0, 1, ..."""
    rows = [{"NMI": recall / 2, "Recall @ 1": recall} for recall in recalls]
    write_scores(path, rows, **flags)


def write_scores(path, rows, **flags):
    """Write a run with these columns of log_val_Class.csv in epochs 0, 1, ..."""
    path.mkdir(parents=True)
    others = {"dataset": "cub200", "seed": 1, "adv_weights": [2500.0], "savename": path.name, "n_epochs": len(rows)}
    run = History(path, others | flags)
    run.rows["val"] = [{"Epochs": epoch, "Time": 1.5} | row for epoch, row in enumerate(rows)]
    run.write_flags()
    run.write_log("val")


def test_versions_in_which_the_runs_of_a_setting_differ_are_told_and_set_none_apart(tmp_path, capsys):
    for seed, torch_version in ((1, "2.14.1"), (2, "2.15.0"), (3, "2.14.1")):
        run = tmp_path / "runs" / f"seed{seed}"
        write_run(run, [0.5], seed=seed)
        flags = {"dataset": "cub200", "seed": seed, "savename": run.name, "n_epochs": 1}
        starts = [{"program": "commit a", "torch": torch_version, "started": f"at {seed}"}]
        History(run, flags, provenance=starts if seed < 3 else [*starts, *starts]).write_flags()
    write_run(tmp_path / "runs" / "other", [0.5], seed=2, adv_weights=[0.0])
    compare.compare_runs([tmp_path / "runs"])
    printed = capsys.readouterr().out
    told = [line for line in printed.splitlines() if "versions" in line]
    assert told == ["adv_weights None: runs of different versions of torch: 2.14.1; 2.15.0"]
    assert "mean of 3" in printed


def test_a_run_from_before_a_flag_was_there_counts_at_the_value_it_was_trained_with(tmp_path, capsys):
    write_run(tmp_path / "runs" / "before", [0.5])
    write_run(tmp_path / "runs" / "after", [0.5], seed=2, flip="class", left_out="1 hidden file: .DS_Store")
    write_run(tmp_path / "runs" / "none", [0.5], flip="none")
    for name, defaults in (("after", {}), ("none", {"flip": "class"})):
        run = History.read(tmp_path / "runs" / name)
        run.defaults = defaults  # known since runs have a run.json
        run.write_state()
    compare.compare_runs([tmp_path / "runs"], over="flip")
    printed = capsys.readouterr().out
    assert "mean of 2" in printed
    over_flip = printed.split("Recall @ 1 over --flip")[1].splitlines()[2:]
    assert [line.split()[:3] for line in over_flip] == [["class", "0.5000", "+-"], ["none", "0.5000", "0.5000"]]


def left_out(printed):
    """Return {run: why} of the lines that say what is left out; each run is named once."""
    lines = [line.split("/runs/", 1)[1] for line in printed.splitlines() if line.startswith("left out")]
    reasons = dict(line.split(", ", 1) for line in lines)
    assert len(reasons) == len(lines)
    return reasons


def test_comparison_by_hand(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a1", [0.2, 0.6, 0.4])
    write_run(tmp_path / "runs" / "a2", [0.2, 0.3, 0.5], seed=2, kernels=0)
    write_run(tmp_path / "runs" / "b1", [0.1, 0.2], adv_weights=[0.0])
    (tmp_path / "runs" / "c").mkdir()
    write_run(tmp_path / "runs" / "d", [0.5])
    with open(tmp_path / "runs" / "d" / "hypa.pkl", "wb") as file:
        pickle.dump({"dataset": Path("x")}, file)
    csv, plot = tmp_path / "t.csv", tmp_path / "p.png"
    compare.compare_runs([str(tmp_path / "runs"), str(tmp_path / "nowhere")], csv=csv, plot=plot)
    printed = capsys.readouterr().out
    for path, reason in [
        ("runs/c", "holds no hypa.pkl that can be read ("),
        ("runs/d", "hypa.pkl cannot be read"),
        ("nowhere", "no such folder"),
    ]:
        assert any(line.startswith(f"skipped {tmp_path}/{path}: {reason}") for line in printed.splitlines())
    table = pd.read_csv(csv).set_index(["run", "adv_weights", "at"])

    def cell(run, weight, at, column="Recall @ 1"):
        (value,) = table.sort_index().loc[[(run, weight, at)], column]
        return value

    assert cell("a1", 2500, "best") == 0.6
    assert cell("a1", 2500, "best", "epoch") == 1
    assert cell("a1", 2500, "last") == 0.4
    assert cell("a1", 2500, "last", "epochs done") == 3
    assert cell("mean of 2", 2500, "best") == pytest.approx(0.55)
    assert cell("mean of 2", 2500, "best", "NMI") == pytest.approx(0.275)
    assert cell("standard deviation", 2500, "best") == pytest.approx(0.1 / 2**0.5)
    assert cell("mean of 2", 2500, "last") == pytest.approx(0.45)
    assert cell("gap to the paper", 2500, "best") == pytest.approx(0.55 - 0.661)
    assert cell("gap to the paper", 0, "last") == pytest.approx(0.2 - 0.661)
    assert "mean of 1" not in printed
    assert table.sort_index().loc["paper: MIC + margin", "Recall @ 1"].item() == 0.661
    with Image.open(plot) as picture:
        assert picture.width > 500


def test_the_printed_table(tmp_path, capsys):
    write_run(tmp_path / "a", [0.5, 0.25], dataset="shapes", seed=0)
    write_scores(tmp_path / "b", 2 * [{"NMI": None, "Recall @ 1": 0.75}], dataset="shapes", seed=1)
    compare.compare_runs([tmp_path / "a", tmp_path / "b"])
    assert capsys.readouterr().out == "\n".join([
        "", "shapes",
        "               run seed   at epoch epochs done    NMI  Recall @ 1",
        "                 a    0 best     0           2 0.2500      0.5000",
        "                 b    1 best     0           2             0.7500",
        "         mean of 2      best                               0.6250",
        "standard deviation      best                               0.1768",
        "                 a    0 last     1           2 0.1250      0.2500",
        "                 b    1 last     1           2             0.7500",
        "         mean of 2      last                               0.5000",
        "standard deviation      last                               0.3536", "",
    ])  # fmt: skip


def test_means_are_over_finished_runs_that_differ_in_the_seed_only(tmp_path, capsys):
    """Repeats of a seed, unfinished runs and runs on other images once counted as seeds of one setting."""
    runs = tmp_path / "runs"
    for name, recalls, flags in [
        ("a_seed1", [0.1, 0.4], {"seed": 1}),
        ("a_seed1_1", [0.1, 0.9], {"seed": 1, "kernels": 0}),
        ("a_seed2", [0.1, 0.6], {"seed": 2}),
        ("a_seed3", [0.8], {"seed": 3}),
        ("b_seed1", [0.1, 0.3], {"seed": 1, "adv_weights": [0.0]}),
        ("b_seed1_1", [0.1, 0.8], {"seed": 1, "adv_weights": [0.0]}),
        ("other_images", [0.1, 0.7], {"seed": 4, "images": "fedcba987654"}),
    ]:
        write_run(runs / name, recalls, **{"n_epochs": 2, "images": "0123456789ab", "dataset": "shapes"} | flags)
    names = sorted(os.listdir(runs), reverse=True)  # the first by name counts, not the first that is given
    csv, plot = tmp_path / "t.csv", tmp_path / "p.svg"
    reasons = {
        "a_seed1_1": f"repeats seed 1 of {runs}/a_seed1",
        "a_seed3": "1 of 2 epochs",
        "b_seed1_1": f"repeats seed 1 of {runs}/b_seed1",
    }
    compare.compare_runs([str(runs / name) for name in names], against=str(runs / "b_seed1"), csv=csv)
    printed = capsys.readouterr().out
    assert left_out(printed) == reasons
    table = pd.read_csv(csv, dtype={"images": str})
    rows = table[table["at"] == "last"].set_index("run")["Recall @ 1"]
    assert {name: rows[name] for name in names} == {
        "a_seed1": 0.4, "a_seed1_1": 0.9, "a_seed2": 0.6, "a_seed3": 0.8, "b_seed1": 0.3, "b_seed1_1": 0.8,
        "other_images": 0.7,
    }  # fmt: skip
    summary = rows.drop(names)
    assert summary.to_dict() == {
        "mean of 2": pytest.approx(0.5),
        "standard deviation": pytest.approx(0.2 / 2**0.5),
        "difference, mean of 1": pytest.approx(0.1),
    }
    assert set(table["images"]) == {"0123456789ab", "fedcba987654"}
    compare.compare_runs([runs], over="adv_weights", plot=plot)
    printed = capsys.readouterr().out
    assert left_out(printed) == reasons
    lines = printed.split("Recall @ 1 over --adv_weights")[1].splitlines()[2:]
    assert " ".join(lines[0].split()) == "0 0.3000 0.3000"
    assert " ".join(lines[1].split()) == "2500 0.5000 +- 0.1414 (2 runs) 0.5000 +- 0.1414 (2 runs) 0.7000 0.7000"
    compare.compare_runs([runs], plot=plot)
    assert left_out(capsys.readouterr().out) == reasons
    names = ["a (2 runs)", "b (1 run)", "adv_weights 2500.0, images fedcba987654 (1 run)"]
    assert [name for name in names if f">{name}<" in plot.read_text()] == names


def test_a_setting_without_a_finished_run_has_no_means_and_no_curve(tmp_path, capsys):
    for seed in (1, 2):
        write_run(tmp_path / "runs" / f"a{seed}", [0.5], seed=seed, n_epochs=2)
    compare.compare_runs([tmp_path / "runs"])
    printed = capsys.readouterr().out
    assert left_out(printed) == {"a1": "1 of 2 epochs", "a2": "1 of 2 epochs"}
    assert printed.count("0.5000") == 4
    assert "mean of" not in printed
    assert "gap" not in printed
    with pytest.raises(InputError, match="p.svg: no run has finished all its epochs"):
        compare.compare_runs([tmp_path / "runs"], plot=tmp_path / "p.svg")
    write_run(tmp_path / "runs" / "b1", [0.5, 0.6], n_epochs=2, adv_weights=[0.0])
    compare.compare_runs([tmp_path / "runs"], plot=tmp_path / "p.svg")
    assert "adv_weights 0.0 (1 run)" in (tmp_path / "p.svg").read_text()
    assert "adv_weights 2500.0" not in (tmp_path / "p.svg").read_text()


def test_recall_over_a_flag_by_hand(tmp_path, capsys):
    for seed, recalls in [(1, [0.5, 0.6, 0.4]), (2, [0.5, 0.8, 0.8])]:
        write_run(tmp_path / "runs" / f"c30_{seed}", recalls, shared_num_classes=30, seed=seed)
    write_run(tmp_path / "runs" / "c4_1", [0.3, 0.3, 0.3], shared_num_classes=4)
    csv, plot = tmp_path / "t.csv", tmp_path / "p.svg"
    compare.compare_runs([tmp_path / "runs"], over="shared_num_classes", csv=csv, plot=plot)
    printed = capsys.readouterr().out.split("Recall @ 1 over --shared_num_classes")[1].splitlines()
    assert printed[-1] == f"plot: {plot}"
    rows = {line.split()[0]: line.split()[1:] for line in printed[2:-1]}
    assert list(rows) == ["4", "5", "10", "20", "30", "50", "100", "150", "200", "250", "300"]
    assert rows["4"] == ["0.3000", "0.3000"]
    assert rows["5"] == ["0.6040"]  # the paper's
    assert " ".join(rows["30"]) == "0.7000 +- 0.1414 (2 runs) 0.6000 +- 0.2828 (2 runs) 0.6470"
    assert len(pd.read_csv(csv)) == 2 * (3 + 2 + 2) + 1  # runs, mean and deviation, gaps; the paper's row
    assert plot.read_text().count("<svg") == 1


def test_a_run_without_the_shared_task_has_a_shared_embedding_of_size_0(tmp_path, capsys):
    write_run(tmp_path / "a", [0.3], embed_sizes=[128, 128], task_p=[1.0, 0.0], adv_weights=[0.0], dataset="shapes")
    write_run(tmp_path / "b", [0.4], embed_sizes=[128, 64], task_p=[1.0, 0.8], dataset="shapes")
    compare.compare_runs([tmp_path / "a", tmp_path / "b"], over="embed_sizes")
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "   best epoch last epoch", "0      0.3000     0.3000", "64     0.4000     0.4000"
    ]  # fmt: skip
    with pytest.raises(InputError, match="no run has this flag"):
        compare.compare_runs([tmp_path / "a"], over="unheard_of")
    write_run(tmp_path / "c", [0.5], embed_sizes=[512, 64], task_p=[1.0, 0.8], dataset="shapes")
    write_run(tmp_path / "d", [0.6], embed_sizes=[128, 64], task_p=[1.0, 0.8], adv_weights=[1.0], dataset="shapes")
    settings = compare.settings_of([History.read(tmp_path / name) for name in "abcd"])
    lines = compare.ablation_lines(settings, "shapes", "test", "embed_sizes", "shapes, ")
    assert {name: points for name, points in lines.items() if name.endswith("best epoch")} == {
        "shapes, adv_weights 2500.0 embed_sizes of Class 128 best epoch": {"64": [0.4], "0": [0.3]},
        "shapes, adv_weights 2500.0 embed_sizes of Class 512 best epoch": {"64": [0.5]},
        "shapes, adv_weights 1.0 embed_sizes of Class 128 best epoch": {"64": [0.6], "0": [0.3]},
    }


def test_a_run_without_the_flag_is_told_apart_in_recall_over_it(tmp_path, capsys):
    write_run(tmp_path / "runs" / "done", [0.5, 0.6], tau=[20, 35], n_epochs=2)
    write_run(tmp_path / "runs" / "failed", [0.1], tau=[20, 35], seed=2, n_epochs=2)
    write_run(tmp_path / "runs" / "older", [0.1, 0.2], seed=3, n_epochs=2)
    compare.compare_runs([tmp_path / "runs"], over="tau")
    printed = capsys.readouterr().out
    assert left_out(printed) == {"failed": "1 of 2 epochs"}
    assert [line.split() for line in printed.splitlines()[-2:]] == [
        ["20", "35", "0.6000", "0.6000"], ["None", "0.2000", "0.2000"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        ({"a": {"lr": 0.1}, "b": {"lr": 0.2}}, ["lr 0.1", "lr 0.2"]),
        ({"a": {"lr": 0.1}, "b": {"lr": 0.1, "seed": 2}}, ["all runs"]),
        (
            {"ablation_mining_no_norm_seed1": {"lr": 0.1}, "ablation_mining_no_adversarial_seed1": {"lr": 0.2}},
            ["no_norm", "no_adversarial"],
        ),
        ({"s_margin_seed1": {"lr": 0.1}, "s_margin_seed2": {"lr": 0.1, "seed": 2}}, ["s_margin"]),
        ({"s_margin_seed1": {"lr": 0.1}, "other": {"lr": 0.2}}, ["s_margin", "lr 0.2"]),
        ({"s_margin_seed1": {"lr": 0.1}, "s_margin_seed1_1": {"lr": 0.2}}, ["lr 0.1", "lr 0.2"]),  # one name for two
    ],
)
def test_settings_of_a_series_are_named_by_their_folders_and_others_by_what_differs(tmp_path, runs, names):
    for name, flags in runs.items():
        write_run(tmp_path / name, [0.5], **{"lr": 0.3, "seed": 1} | flags)
    stored = compare.read_runs([tmp_path / name for name in runs])
    assert [setting.name for setting in compare.settings_of(list(stored.values()))] == names


def test_values_of_a_flag_are_sorted_by_size():
    table = compare.ablation_table({"a": {"100": [1.0], "mean": [1.0], "8": [1.0]}, "b": {"0.5": [1.0], "0": [1.0]}})
    assert list(table.index) == ["0", "0.5", "8", "100", "mean"]


def test_differences_are_paired_by_seed(tmp_path, capsys):
    plain, mic = [0.30, 0.50, 0.70], [0.34, 0.52, 0.77]
    runs = tmp_path / "runs"
    for seed, (one, other) in enumerate(zip(plain, mic)):
        write_run(runs / f"plain{seed}", [0.9, one], seed=seed, adv_weights=[0.0], n_epochs=2)
        write_run(runs / f"mic{seed}", [0.9, other], seed=seed, n_epochs=2)
    write_run(runs / "mic8", [0.1, 0.1], seed=8, n_epochs=2)  # without a partner
    write_run(runs / "mic9", [0.9], seed=9, n_epochs=2)  # unfinished, as is its partner
    write_run(runs / "plain9", [0.1], seed=9, adv_weights=[0.0], n_epochs=2)
    csv, plot = tmp_path / "t.csv", tmp_path / "p.svg"
    compare.compare_runs([runs], against=runs / "plain1", csv=csv, plot=plot)
    printed = capsys.readouterr().out
    table = pd.read_csv(csv, dtype={"seed": str})
    rows = table[table["run"].str.contains("difference|interval") & (table["at"] == "last")].set_index("run")
    assert list(rows.index) == ["difference, mean of 3", "95 % interval from", "95 % interval to"]
    assert set(rows["adv_weights"]) == {2500.0}  # none of the reference to itself
    # 0.04, 0.02, 0.07: mean 0.13 / 3, s = 0.0251661, t(0.975, 2) = 4.302653 from a table
    mean, half = 0.13 / 3, 4.302653 * 0.0251661 / 3**0.5
    expected = [mean, mean - half, mean + half]
    assert rows["Recall @ 1"].tolist() == pytest.approx(expected, abs=1e-6)
    assert rows["NMI"].tolist() == pytest.approx([value / 2 for value in expected], abs=1e-6)
    best = table[table["run"].str.contains("difference|interval") & (table["at"] == "best")]
    assert best["Recall @ 1"].tolist() == pytest.approx([0.0, 0.0, 0.0])
    assert "difference, mean of 3" in printed
    assert "Differences to cub200, adv_weights 0.0, same seeds" in plot.read_text()
    assert ">adv_weights 2500.0<" in plot.read_text()
    assert left_out(printed) == {"mic9": "1 of 2 epochs", "plain9": "1 of 2 epochs"}


def test_one_difference_has_no_interval_and_none_is_no_plot(tmp_path, capsys):
    write_run(tmp_path / "runs" / "mic_seed0", [0.3], seed=0)
    write_run(tmp_path / "runs" / "plain_seed0", [0.2], seed=0, adv_weights=[0.0])
    plot = tmp_path / "p.svg"
    compare.compare_runs([tmp_path / "runs"], against=tmp_path / "runs" / "plain_seed0", plot=plot)
    printed = capsys.readouterr().out
    assert "difference, mean of 1" in printed
    assert "interval" not in printed
    assert "difference in Recall @ 1" in plot.read_text()
    write_run(tmp_path / "runs" / "mic_seed8", [0.3], seed=8)
    runs = [tmp_path / "runs" / name for name in ("mic_seed8", "plain_seed0")]
    compare.compare_runs(runs, against=runs[0], plot=plot)
    assert f"--against {runs[0]}: no other setting has a finished run" in capsys.readouterr().out
    assert "band: one standard deviation" in plot.read_text()  # the curves over the epochs


def test_differences_of_several_data_and_test_sets(tmp_path):
    for name, weights, gain in [("plain", [0.0], 0.0), ("mic", [9.0], 0.1)]:
        for seed in (1, 2):
            row = {"Set 1 NMI": None, "Set 1 Recall @ 1": 0.5, "Set 2 Recall @ 1": 0.6 + gain}
            flags = {"dataset": "vehicle_id", "seed": seed, "adv_weights": weights}
            write_scores(tmp_path / "runs" / f"{name}_seed{seed}", [row], **flags)
    write_run(tmp_path / "runs" / "other", [0.3], dataset="shapes")
    csv, plot = tmp_path / "t.csv", tmp_path / "p.svg"
    compare.compare_runs([tmp_path / "runs"], against=tmp_path / "runs/plain_seed2", csv=csv, plot=plot)
    table = pd.read_csv(csv)
    gaps = table[(table["run"] == "gap to the paper") & (table["at"] == "last")]
    assert set(gaps["test set"]) == {"Set 1"}  # the paper has none of the medium set
    table = table[(table["run"] == "difference, mean of 2") & (table["at"] == "last")].set_index("test set")
    assert table["Recall @ 1"].to_dict() == {"Set 1": 0.0, "Set 2": pytest.approx(0.1)}
    assert ">vehicle_id Set 2, mic<" in plot.read_text()
    assert "difference in NMI" not in plot.read_text()  # which some run lacks


def test_what_cannot_be_compared_is_named(tmp_path):
    write_run(tmp_path / "runs" / "a", [0.3])
    write_run(tmp_path / "b", [0.3])
    (tmp_path / "runs" / "broken").mkdir()
    with pytest.raises(InputError, match="broken: not the folder of one of the runs that are compared"):
        compare.compare_runs([tmp_path / "runs"], against=tmp_path / "runs" / "broken")
    with pytest.raises(InputError, match="b: not the folder of one of the runs that are compared"):
        compare.compare_runs([tmp_path / "runs"], against=tmp_path / "b")
    with pytest.raises(InputError, match="no run to read among"):
        compare.compare_runs([tmp_path / "runs" / "broken"])


def test_a_folder_above_those_of_the_data_sets_is_told_where_runs_lie(tmp_path):
    for dataset in ("cars196", "shapes"):
        write_run(tmp_path / dataset / "a run", [0.5], dataset=dataset)
    with pytest.raises(InputError, match=f"; there are runs in {tmp_path}/cars196, {tmp_path}/shapes: give these"):
        compare.compare_runs([tmp_path])


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_runs_with_and_without_classes_held_out_are_apart(tmp_path, capsys, names):
    write_run(tmp_path / "a", [0.3])
    rows = [{"NMI": 0.2, "Recall @ 1": test, "Val Recall @ 1": val} for test, val in ((0.4, 0.6), (0.5, 0.55))]
    write_scores(tmp_path / "b", rows, val_classes=0.25, select="val")
    compare.compare_runs([tmp_path / name for name in names], csv=tmp_path / "t.csv")
    assert "mean of" not in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "t.csv")
    best = table[table["at"] == "best"].set_index(["run", "test set"])["Recall @ 1"]
    assert best.loc[[("b", "Val")]].tolist() == [0.6]
    assert ("a", "Val") not in best.index.tolist()
    assert best.loc[[("b", "test")]].tolist() == [0.4]


@pytest.mark.parametrize("n", [2, 5, 30])
def test_confidence_interval_holds_the_mean_in_95_of_100(n):
    values = np.random.default_rng(n).normal(0.3, 2.0, (n, 20_000))
    mean, half = compare.mean_and_half_interval(pd.DataFrame(values))
    assert np.mean((mean - half <= 0.3) & (mean + half >= 0.3)) == pytest.approx(0.95, abs=0.006)
