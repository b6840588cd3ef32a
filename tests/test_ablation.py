"""Series of runs: which runs a series starts, what it compares, and what it refuses; Result_Runs.sh."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pandas as pd
import pytest
from conftest import HANG, ROOT

import main
from report import ablation
from support import files

FAKE_PYTHON = """#!/usr/bin/env bash
# Stands in for python: instead of main.py it runs the program below
[[ $1 != */main.py ]] || exec "$REAL" "$FAKE_MAIN" "${@:2}"
exec "$REAL" "$@"
"""

FAKE_MAIN = """
# Notes its arguments and leaves what a run leaves, or fails as the file FAILS says
import os, pickle, signal, sys
from pathlib import Path

with open(os.environ["LOG"], "a") as log:
    log.write("|".join(sys.argv[1:]) + "\\n")
flags = {"seed": [1], "n_epochs": [1], "embed_sizes": [128, 128], "task_p": [1.0, 0.8], "adv_weights": [500.0]}
flags |= {"tau": [80], "losses": ["marginloss", "marginloss"]}
for word in sys.argv[1:]:
    if word.startswith("--"):
        flags[word[2:]] = values = []
    else:
        values.append(float(word) if word.replace(".", "").isdigit() else word)
flags |= {name: flags[name][0] for name in ("dataset", "seed", "n_epochs", "savename", "save_path")}
flags["n_epochs"] = int(flags["n_epochs"])
fails = Path(os.environ["FAILS"])
if fails.exists():
    name, code = fails.read_text().split()
    if code == "waits":
        told = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        signal.pthread_sigmask(signal.SIG_BLOCK, told)  # one that comes before sigwait waits for it
        print("waits", flush=True)
        signum = signal.sigwait(told)
        with open(os.environ["LOG"], "a") as log:
            log.write(f"told {signum:d}\\n")
        sys.exit(128 + signum)
    if name in flags["savename"]:
        sys.exit(int(code))
folder = Path(flags["save_path"], flags["dataset"], flags["savename"])
folder.mkdir(parents=True, exist_ok=True)
recall = 0.5 + 0.001 * sum(map(ord, folder.name[-8:]))
(folder / "last.pth.tar").touch()
(folder / "log_val_Class.csv").write_text(f"Epochs,Time,Recall @ 1\\n{flags['n_epochs'] - 1},1,{recall}\\n")
with open(folder / "hypa.pkl", "wb") as file:
    pickle.dump(flags, file)
"""

DIRECTIONS = ("--adversarial", "Class-Shared", "Shared-Class", "--adv_weights", 5, 6)
SIZES = ("--embed_sizes", 64, 16)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a stand-in for python that leaves what runs leave; the environment starts it."""
    folder = tmp_path / "with space"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(FAKE_PYTHON)
    (folder / "bin" / "python").chmod(0o755)
    (folder / "main.py").write_text(FAKE_MAIN)
    for name, path in {"PYTHON": "bin/python", "FAKE_MAIN": "main.py", "LOG": "log", "FAILS": "fails"}.items():
        monkeypatch.setenv(name, str(folder / path))
    monkeypatch.setenv("REAL", sys.executable)
    return folder


@pytest.fixture
def series(folder, capfd):
    """Run a series: (exit code, stderr, calls of main.py, folder of the runs)."""

    def run(*flags, fails=None):
        (folder / "log").write_text("")
        if fails:
            (folder / "fails").write_text(" ".join(fails))
        capfd.readouterr()
        handler, code = signal.getsignal(signal.SIGTERM), 0
        try:
            ablation.main(main.get_args_parser, [*map(str, flags), "--save_path", str(folder / "runs")])
        except SystemExit as stop:
            code = stop.code
        signal.signal(signal.SIGTERM, handler)
        error = capfd.readouterr().err
        if isinstance(code, str):  # which Python prints where it ends
            error, code = f"{error}{code}\n", 1
        (folder / "fails").unlink(missing_ok=True)
        calls = [line.split("|") for line in (folder / "log").read_text().splitlines()]
        return code, error, calls, folder / "runs" / "shapes"

    return run


def test_a_series_trains_each_value_and_seed_and_compares_its_own_runs(series):
    code, error, calls, runs = series("dim", "shapes", "--values", 0, 64, "--seeds", 2, "--lr", "1e-4")
    assert (code, error) == (0, "")
    assert len(calls) == 4
    for call, (value, seed) in zip(calls, [(0, 1), (0, 2), (64, 1), (64, 2)], strict=True):
        text = " ".join(call)
        assert text.startswith("--dataset shapes --not_pretrained")
        ablated = "--task_p 1 0 --adv_weights 0" if value == 0 else "--embed_sizes 128 64"
        own = f"--seed {seed} --save_path {runs.parent} --savename ablation_dim_{value}_seed{seed} --go_on"
        assert text.endswith(f"--lr 1e-4 {ablated} {own}")  # the ablated flag wins
    names = [f"ablation_dim_{value}_seed{seed}" for value in (0, 64) for seed in (1, 2)]
    assert {path.name for path in runs.iterdir()} == {*names, "ablation_dim.csv", "ablation_dim.svg"}
    assert set(names) <= set(pd.read_csv(runs / "ablation_dim.csv")["run"])
    assert "--embed_sizes" in (runs / "ablation_dim.svg").read_text()
    shutil.copytree(runs / "ablation_dim_64_seed1", runs / "ablation_dim_long_64_seed1")  # of another series
    assert series("dim", "shapes", "--values", 0)[0] == 0
    assert not [run for run in pd.read_csv(runs / "ablation_dim.csv")["run"] if "64" in str(run)]


@pytest.mark.parametrize(
    ("words", "flags", "first"),
    [
        (["clusters", "cub200"], "--shared_num_classes 5", "5_seed0"),
        (["interval", "own", "--values", 7], "--cluster_update_freq 7", "7_seed1"),
        (["dim", "own", "--values", 64], "--embed_sizes 128 64", "64_seed1"),
        (["dim", "own", "--values", 32, *SIZES], "--embed_sizes 64 32", "32_seed1"),
        (["dim", "own", "--values", 0, *DIRECTIONS], "--task_p 1 0 --adv_weights 0 0", "0_seed1"),
        (["adversarial", "shapes", "--values", "on"], "", "on_seed1"),
        (["adversarial", "own", "--values", "on", *SIZES], "--embed_sizes 64 16", "on_seed1"),
        (["adversarial", "shapes", "--values", 0], "--adv_weights 0", "0_seed1"),
        (["adversarial", "own", "--values", 0, *DIRECTIONS], "--adv_weights 0 0", "0_seed1"),
        (["standardise", "vehicle_id"], "--cluster_mode no_norm", "no_norm_seed0"),
    ],
)
def test_the_flags_of_a_value(series, folder, words, flags, first):
    """The user's size of the Class embedding and directions stay."""
    name, dataset, *_ = words
    code, _, (call,), _ = series(*words, fails=("ablation", "143"))
    assert code == 143
    own = f"--seed {first[-1]} --save_path {folder}/runs --savename ablation_{name}_{first} --go_on"
    assert " ".join(call).endswith(f"{flags} {own}")
    assert call[:2] == ["--dataset", dataset]
    assert ("--n_epochs" in call) == (dataset != "own")  # of a set-up


def test_mining_gives_the_baseline_as_many_steps_and_pairs_by_seed(series):
    code, error, calls, runs = series("mining", "shapes", "--seeds", 2, "--n_epochs", 10, "--tau", 5, 8)
    assert (code, error) == (0, "")
    names = ["margin", "margin_steps", "mic", "no_adversarial", "no_norm", "shared_head"]
    of_values = {name: [" ".join(call) for call in calls if f"ablation_mining_{name}_seed2" in call] for name in names}
    flags = {name: text.split("--n_epochs 10 --tau 5 8")[1].split(" --seed")[0] for name, (text,) in of_values.items()}
    assert flags == {
        "margin": " --task_p 1 0 --adv_weights 0",
        "margin_steps": " --task_p 1 0 --adv_weights 0 --n_epochs 18 --tau 9 15",  # 1.8 times as many
        "mic": "",
        "no_adversarial": " --adv_weights 0",
        "no_norm": " --cluster_mode no_norm",
        "shared_head": " --shared_gradient head",
    }
    table = pd.read_csv(runs / "ablation_mining.csv")
    assert (table["run"] == "difference, mean of 2").sum() == 2 * 5  # best and last, none of margin to itself
    drawn = (runs / "ablation_mining.svg").read_text()
    assert "Differences to shapes, margin, same seeds" in drawn
    assert set(table["setting"]) == set(names)
    named = names[1:]
    assert [name for name in named if f">{name}<" in drawn] == named


def test_mining_compares_with_the_first_value_or_says_that_it_cannot(series, capfd):
    more = (*DIRECTIONS, "--task_p", 0.5, 0.8)
    values = ("--values", "margin_steps", "no_adversarial")
    code, error, calls, runs = series("mining", "shapes", *values, "--n_epochs", 10, "--tau", 5, *more)
    assert (code, error) == (0, "")
    assert "--task_p 1 0 --adv_weights 0 0 --n_epochs 13 --tau 7 --seed" in " ".join(calls[0])  # 1.3 steps to 1
    assert "--adv_weights 0 0 --seed" in " ".join(calls[1])
    drawn = (runs / "ablation_mining.svg").read_text()
    assert "Differences to shapes, margin_steps, same seeds" in drawn
    assert ">no_adversarial<" in drawn
    shutil.rmtree(runs / "ablation_mining_margin_steps_seed1")
    failing = ("ablation_mining_margin_steps_seed1", "1")
    code, error, *_ = series("mining", "shapes", *values, *DIRECTIONS, fails=failing)
    assert (code, error) == (1, "Result_Runs.sh: failed: margin_steps_seed1\n")
    assert "Differences to" not in (runs / "ablation_mining.svg").read_text()


def test_a_value_that_does_not_fit_is_named_at_the_end_and_the_others_are_compared(series):
    more = ("--values", 4, 1, 100, 6, "--n_epochs", 1)
    code, error, calls, runs = series("clusters", "own", *more, fails=("clusters_100", "2"))
    refusal, failed = error.splitlines()
    assert refusal.startswith("main.py: error: argument --shared_num_classes: '1' is not a whole number of at least 2")
    assert (code, failed) == (1, "Result_Runs.sh: failed: 1 100_seed1")
    assert [call[call.index("--savename") + 1].split("_")[2] for call in calls] == ["4", "100", "6"]
    table = pd.read_csv(runs.parent / "own" / "ablation_clusters.csv")
    assert set(table["run"].dropna()) == {"ablation_clusters_4_seed1", "ablation_clusters_6_seed1"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["clusters", "shapes", "--seeds", "0"], "argument --seeds: '0' is not a whole number of at least 1"),
        (["clusters", "shapes", "--dataset=cub200"], "--dataset=cub200 does not go with an ablation"),
        (["clusters", "shapes", "--resume", "x"], "--resume does not go with an ablation"),
        (["mining", "own", "--task_p", 1], "main.py: error: argument --task_p: expected 2 arguments"),
        (["mining", "own", "--values", "margin", "mine"], "Result_Runs.sh: error: no value 'mine' of mining"),
        (["clusters", "own", "--bs", 110], "main.py: error: --bs 110 is not a multiple of --cs_per_bs 4"),
        (["clusters", "own", "--n_epoch", 3], "main.py: error: unrecognized arguments: --n_epoch 3; did you"),
        (["clusters", "own", "--savename", "a/b"], "main.py: error: --savename 'a/b': give a plain folder name"),
        (["clusters", "own", "--values", "x"], "main.py: error: argument --shared_num_classes: 'x' is not a whole"),
    ],
)
def test_what_fits_no_run_ends_a_series_before_anything_trains(series, flags, message):
    code, error, calls, _ = series(*flags)
    assert (code, calls) == (2, [])
    assert message in error
    assert error.count("\n") == 1


def test_a_series_skips_what_another_process_trains(series, capfd):
    code, _, _, runs = series("clusters", "shapes", "--values", 4)
    assert code == 0
    with files.locked(runs / "ablation_clusters_4_seed1"):
        code, error, calls, _ = series("clusters", "shapes", "--values", 4, 8)
    assert (code, error, len(calls)) == (0, "", 1)
    assert "ablation_clusters_8_seed1" in calls[0]


def test_a_series_goes_on_after_a_failure_and_stops_when_told(series):
    code, error, calls, runs = series("clusters", "shapes", "--values", 4, 8, fails=("clusters_4", "137"))
    assert (code, error, len(calls)) == (1, "Result_Runs.sh: failed: 4_seed1\n", 2)
    table = (runs / "ablation_clusters.csv").read_text()
    for told in ("129", "130", "143"):
        code, _, calls, _ = series("clusters", "shapes", "--values", 4, 8, fails=("clusters_4", told))
        assert (code, len(calls)) == (int(told), 1)
    assert (runs / "ablation_clusters.csv").read_text() == table
    code, error, *_ = series("standardise", "shapes", "--values", "mean", "mstd", fails=("standardise", "1"))
    assert (code, error) == (1, "Result_Runs.sh: failed: mean_seed1 mstd_seed1\n")


def test_a_series_that_cannot_be_compared_keeps_its_table(series, folder):
    code, _, _, runs = series("clusters", "shapes", "--values", 4)
    assert code == 0
    kept = {name: (runs / name).read_bytes() for name in ("ablation_clusters.csv", "ablation_clusters.svg")}
    (folder / "main.py").write_text("")  # runs end well and leave nothing new
    (runs / "ablation_clusters_4_seed1" / "hypa.pkl").write_text("broken")
    code, error, *_ = series("clusters", "shapes", "--values", 4)
    assert code == 2
    assert error == f"Result_Runs.sh: error: --compare: no run to read among {runs}/ablation_clusters_4_seed1\n"
    assert {name: (runs / name).read_bytes() for name in kept} == kept


def test_a_run_that_got_a_counter_behind_its_name_is_compared(series):
    code, _, _, runs = series("clusters", "shapes", "--values", 4)
    os.rename(runs / "ablation_clusters_4_seed1", runs / "ablation_clusters_4_seed1_1")
    code, _, _, runs = series("clusters", "shapes", "--values", 4, fails=("clusters_4", "1"))
    assert code == 1
    assert "ablation_clusters_4_seed1_1" in set(pd.read_csv(runs / "ablation_clusters.csv")["run"])


def test_a_series_is_started_from_any_folder(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("main.py", "run.py", "report.py", "data.py"):
        (elsewhere / name).write_text("raise SystemExit('of another program')")
    script = ["bash", os.path.relpath(ROOT / "Result_Runs.sh", elsewhere), "ablation"]
    flags = ["clusters", "own", "--values", "4", "--save_path", "runs"]
    ended = subprocess.run([*script, *flags], cwd=elsewhere, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("== clusters 4, seed 1\n")
    assert ended.stdout.endswith("plot: runs/own/ablation_clusters.svg\n")
    assert (elsewhere / "runs" / "own" / "ablation_clusters.svg").exists()


@contextlib.contextmanager
def waiting(folder, *words):
    """Start Result_Runs.sh and yield its process when its run waits for a signal; kill what is left at the end."""
    (folder / "fails").write_text("any waits")
    command = ["bash", str(ROOT / "Result_Runs.sh"), *words, "--save_path", str(folder / "runs")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, start_new_session=True) as process:
        try:
            assert "waits\n" in iter(process.stdout.readline, "")
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_series_that_is_told_to_stop_ends_its_run_first(folder, signum):
    with waiting(folder, "ablation", "clusters", "shapes") as process:
        # kill tells the series only, Ctrl-C its whole group
        (os.kill if signum == signal.SIGTERM else os.killpg)(process.pid, signum)
        _, error = process.communicate(timeout=HANG)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    assert process.returncode == 128 + signum
    assert error == f"Result_Runs.sh: stopped by {signum.name}; the same command resumes the series\n"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_all_setups_pass_a_signal_on_to_their_run(folder, signum):
    with waiting(folder, "all", "--savename", "run") as process:
        process.send_signal(signum)
        assert process.wait(HANG) == 128 + signum
        assert (folder / "log").read_text().endswith(f"told {signum:d}\n")


def setup(name, *flags):
    """Return the flags of main.py that a set-up gives it."""
    printed = subprocess.run(
        ["bash", str(ROOT / "Result_Runs.sh"), "flags", name, *flags],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return main.get_args_parser().parse_args(shlex.split(printed.stdout))


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("cub200", (30, [2500], [1, 0.8], [50], 100)),
        ("cars196", (150, [500], [1, 0.8], [60], 110)),
        ("online_products", (50, [250], [1, 0.5], [20, 35], 45)),
        ("in-shop", (150, [250], [1, 0.8], [50], 70)),
        ("vehicle_id", (50, [250], [1, 0.5], [20, 35], 45)),
    ],
)
def test_the_published_setups(dataset, expected):
    args = setup(dataset)
    assert (args.shared_num_classes, args.adv_weights, args.task_p, args.tau, args.n_epochs) == expected
    assert (args.dataset, args.seed, args.random_cluster_pick_p, args.cluster_update_freq) == (dataset, 0, 0.2, 3)
    assert setup(dataset, "--seed", "5", "--source_path", "my data").source_path == "my data"  # as it can be pasted


def test_result_runs_starts_what_it_is_asked_for(folder):
    def result_runs(*words):
        ended = subprocess.run(["bash", str(ROOT / "Result_Runs.sh"), *words], capture_output=True, text=True)
        return ended.returncode, ended.stdout, ended.stderr

    code, usage, _ = result_runs("--help")
    assert code == 0
    assert "bash Result_Runs.sh ablation SERIES DATASET" in usage
    usage = ablation.get_args_parser().format_help()
    for name, (_, values, _) in ablation.SERIES.items():
        assert re.search(rf"^  {name} +.*{values}", usage, re.MULTILINE)
    code, _, error = result_runs("cub20")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("Result_Runs.sh: error: no set-up 'cub20'; one of demo, cub200,")
    (folder / "fails").write_text("failing 3")
    flags = ["--save_path", str(folder / "runs"), "--savename", "failing"]
    assert result_runs("all", *flags)[::2] == (
        1, "Result_Runs.sh: failed: cub200 cars196 online_products in-shop vehicle_id\n"
    )  # fmt: skip
    assert result_runs("demo", *flags)[0] == 3
    started = [line.split("|")[1] for line in (folder / "log").read_text().splitlines()]
    assert started == [*ablation.PUBLISHED, "shapes"]
