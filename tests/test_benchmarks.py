"""Every benchmark runs to its end at its smallest size and prints its table with numbers in it."""

import re
import tempfile

import pytest
from conftest import ROOT, run_in_process, run_script, small_flags, write_class_folders

NUMBER = r"-?\d+\.\d+"


def printed(folder, name, *flags):
    """Run a benchmark in a folder, where it leaves nothing, and return the lines that it printed."""
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as output:
        done = run_in_process(run_script, ROOT / "benchmarks" / name, flags, folder, output.name)
        assert done.returncode == 0, done.stderr
        return output.read().splitlines()


def assert_row(lines, start, n_numbers):
    """Require one line that starts with a name and holds so many numbers with decimal places, and none that is nan."""
    (row,) = [line for line in lines if line.startswith(start)]
    assert len(re.findall(NUMBER, row.removeprefix(start))) == n_numbers, row


def test_epoch(tmp_path):
    lines = printed(tmp_path, "epoch.py", "--images", 400, "--arch", "googlenet", "--epochs", 5, "--runs", 2)
    parts = ["scoring", "probe", "logs", "checkpoint, if the epoch is the best", "sheets of neighbours", "clustering"]
    parts += ["sheet of a mining", "checkpoint of the epoch, state and summary", "plots, page and index"]
    for part in parts:
        assert_row(lines, f"| {part} | ", 3)
    assert_row(lines, "| all | ", 1)
    assert not list(tmp_path.iterdir())


def test_evaluation(tmp_path):
    sets = {"cub200": "592 x 128, 10 classes", "in-shop": "2683 x 128, 398 classes"}
    lines = printed(tmp_path, "evaluation.py", "--rounds", 1, "--sets", *sets, "--scale", 0.1)
    heads = [i for i, line in enumerate(lines) if line.startswith(tuple(sets))] + [len(lines)]
    assert len(heads) == 3
    for (name, size), start, end in zip(sets.items(), heads, heads[1:]):
        assert lines[start].startswith(f"{name}: {size}")
        assert_row(lines[start:end], "ours  ", 4)
        assert_row(lines[start:end], "floor  ", 4)
        assert_row(lines[start:end], "ours: NMI", len(lines[start].split("[")[1].split("]")[0].split()) + 4)


def test_loading(tmp_path):
    lines = printed(tmp_path, "loading.py", "--seconds", 0, "--n_images", 2, "--per_pass", 4, "--entries", 600)
    assert_row(lines, "reading online_products, 600 list entries: ", 1)
    assert_row(lines, "one epoch of class-balanced batches, 224 entries, no decoding: ", 1)
    starts = [i for i, line in enumerate(lines) if "bits per pixel" in line] + [len(lines)]
    assert len(starts) == 3
    for start, end in zip(starts, starts[1:]):
        for name in ("plain ", "ours ", "ours, ram cache"):
            assert_row(lines[start:end], f"  {name}", 1)
        for n_workers in (0, 1, 2):
            assert_row(lines[start:end], f"  {n_workers} workers, images per second: plain ", 3)


def test_loading_of_images_in_a_folder(tmp_path):
    write_class_folders(tmp_path / "tiny", per_class=(1, 1))
    flags = ["--images", tmp_path / "tiny", "--seconds", 0, "--per_pass", 4, "--entries", 600]
    assert_row(printed(tmp_path, "loading.py", *flags), "  ours, ram cache", 1)


def test_losses(tmp_path):
    pytest.importorskip("pytorch_metric_learning")
    lines = printed(tmp_path, "losses.py", "--sizes", 16, 24, "--dim", 8, "--seconds", 0)
    rows = [line.split() for line in lines if line.startswith("cpu ")]
    pairs = [("marginloss", "distance"), ("triplet", "semihard"), ("proxynca", "-")]
    assert [row[1:4] for row in rows] == [[*pair, size] for pair in pairs for size in ("16", "24")]
    assert all(len(row) == 9 and all(re.fullmatch(NUMBER, cell) for cell in row[4:]) for row in rows)


def test_processes(tmp_path):
    write_class_folders(tmp_path / "tiny", per_class=(8, 8, 2, 2))
    flags = ["--dataset", "tiny", "--source_path", tmp_path, "--arch", "googlenet", "--img_size", 32, "--bs", 8]
    lines = printed(tmp_path, "processes.py", "--rounds", 1, "--epochs", 2, *flags)
    assert_row(lines, "frozen", 4)


def test_training(tmp_path):
    small = ["--img_size", 32, "--bs", 8, "--rounds", 1, "--steps", 2, "--kernels", 0]
    lines = printed(tmp_path, "training.py", "--settings", "plain", *small)
    row, profile = (line.split() for line in lines if line.startswith("plain "))
    assert all(float(cell) > 0 for cell in row[1:6])
    assert len(row) == 9  # the last three are GB of a GPU
    assert sum(map(float, profile[1:])) == pytest.approx(100, abs=1)
    assert not list(tmp_path.iterdir())


def test_factor_curves(tmp_path):
    for setting, recall in (("a_1", 0.5), ("a_2", 0.7), ("b_1", 0.6)):
        (tmp_path / setting).mkdir()
        (tmp_path / setting / "log_val_Class.csv").write_text(f"Epochs,Recall @ 1\n0,{recall}\n1,{recall + 0.1}\n")
        columns = "Epochs,light from Class,Test light from Class"
        (tmp_path / setting / "log_probe.csv").write_text(f"{columns}\n0,0.3,0.4\n1,0.2,0.3\n")
    printed(tmp_path, "factor_curves.py", "plot.svg", "light", "a=a_*", "b=b_*")
    text = (tmp_path / "plot.svg").read_text()
    for words in ("a (2 runs)", "b (1 runs)", "Recall @ 1 on the test classes", "light: read from Class, test images"):
        assert words in text


def test_kills(tmp_path):
    write_class_folders(tmp_path / "tiny")
    argv = small_flags(tmp_path, tmp_path / "results", "--arch", "googlenet", "--n_epochs", 2)
    lines = printed(tmp_path, "kills.py", "--kills", 1, *argv)
    assert re.match(r"\d times SIGKILL, epochs logged at each: \[", lines[-2])  # 0 where it was killed too late
    assert lines[-1] == "logs, weights, optimiser and random states are bit-identical; no process is left"
