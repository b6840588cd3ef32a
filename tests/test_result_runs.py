"""Result_Runs.sh: which runs an ablation starts, what it compares, and what it refuses."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

FAKE_PYTHON = """#!/usr/bin/env bash
# Stands in for python: runs code, but of a script notes the arguments, makes what it is asked for, or fails as the
# file FAILS says
[[ $1 != -c ]] || exec "$REAL" "$@"
printf '%s|' "$@" >> "$LOG"; echo >> "$LOG"
[[ -e $FAILS ]] && [[ "$*" == *"$(head -n 1 "$FAILS")"* ]] && exit "$(tail -n 1 "$FAILS")"
while [[ $# -gt 0 ]]; do
    case $1 in
        --dataset) dataset=$2 ;; --save_path) save=$2 ;; --savename) name=$2 ;; --csv | --plot) echo drawn > "$2" ;;
    esac
    shift
done
[[ -n ${name:-} ]] || exit 0
mkdir -p "$save/$dataset/$name" && touch "$save/$dataset/$name/"{last.pth.tar,log_val_Class.csv}
"""


@pytest.fixture
def ablation(tmp_path):
    """Run `Result_Runs.sh ablation` on a stand-in for python: (exit code, stderr, calls, folder of the runs)."""
    folder = tmp_path / "with space"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(FAKE_PYTHON)
    (folder / "bin" / "python").chmod(0o755)
    environment = {
        "PATH": "/usr/bin:/bin", "PYTHON": str(folder / "bin" / "python"), "LOG": str(folder / "log"),
        "FAILS": str(folder / "fails"), "REAL": sys.executable,
    }  # fmt: skip

    def run(*flags, fails=None):
        (folder / "log").write_text("")
        if fails:
            (folder / "fails").write_text("\n".join(fails))
        script = [str(ROOT / "Result_Runs.sh"), "ablation", *map(str, flags)]
        script += ["--save_path", str(folder / "runs")]
        process = subprocess.run(["bash", *script], env=environment, capture_output=True, text=True)
        (folder / "fails").unlink(missing_ok=True)
        calls = [line.split("|")[:-1] for line in (folder / "log").read_text().splitlines()]
        return process.returncode, process.stderr, calls, folder / "runs" / "shapes"

    return run


def test_an_ablation_trains_each_value_and_seed_and_compares_its_own_runs(ablation):
    code, error, calls, runs = ablation("dim", "shapes", "--values", 0, 64, "--seeds", 2, "--lr", "1e-4")
    assert (code, error) == (0, "")
    assert len(calls) == 5
    for call, (value, seed) in zip(calls, [(0, 1), (0, 2), (64, 1), (64, 2)]):
        text = " ".join(call)
        assert ("--task_p 1 0 --adv_weights 0" if value == 0 else "--embed_sizes 128 64") in text
        assert f"--lr 1e-4 {'--task_p' if value == 0 else '--embed_sizes'}" in text  # the ablated flag wins
        assert text.endswith(
            f"--seed {seed} --save_path {runs.parent} --savename ablation_dim_{value}_seed{seed} --go_on"
        )
    names = [f"ablation_dim_{value}_seed{seed}" for value in (0, 64) for seed in (1, 2)]
    assert calls[4][1:7] == ["--compare", *(str(runs / name) for name in names), "--over"]
    assert {path.name for path in runs.iterdir()} == {*names, "ablation_dim.csv", "ablation_dim.svg"}
    (runs / "ablation_dim_long_64_seed1").mkdir()  # of another series
    (runs / "ablation_dim_long_64_seed1" / "last.pth.tar").touch()
    assert not any("long" in part for part in ablation("dim", "shapes", "--values", 0)[2][-1])


def test_the_ablation_of_mining_gives_the_baseline_as_many_steps_and_pairs_by_seed(ablation):
    code, error, calls, runs = ablation("mining", "shapes", "--seeds", 2, "--n_epochs", 10, "--tau", 5, 8)
    assert (code, error) == (0, "")
    names = ["margin", "margin_steps", "mic", "no_adversarial", "no_norm"]
    of_values = {name: [" ".join(call) for call in calls if f"ablation_mining_{name}_seed2" in call] for name in names}
    flags = {name: text.split("--n_epochs 10 --tau 5 8")[1].split(" --seed")[0] for name, (text,) in of_values.items()}
    assert flags == {
        "margin": " --task_p 1 0 --adv_weights 0",
        "margin_steps": " --task_p 1 0 --adv_weights 0 --n_epochs 18 --tau 9 15",  # 1.8 times as many
        "mic": "",
        "no_adversarial": " --adv_weights 0",
        "no_norm": " --cluster_mode no_norm",
    }
    assert calls[-1][1] == "--compare"
    assert calls[-1][12:14] == ["--against", str(runs / "ablation_mining_margin_seed1")]


def test_the_ablation_of_mining_compares_with_the_first_value_or_says_that_it_cannot(ablation):
    directions = ("--adversarial", "Class-Shared", "Shared-Class", "--adv_weights", 5, 6)
    more = (*directions, "--task_p", 0.5, 0.8)
    values = ("--values", "margin_steps", "no_adversarial")
    code, error, calls, runs = ablation("mining", "shapes", *values, "--n_epochs", 10, "--tau", 5, *more)
    assert (code, error) == (0, "")
    assert "--task_p 1 0 --adv_weights 0 0 --n_epochs 13 --tau 7 --seed" in " ".join(calls[0])  # 1.3 steps to 1
    assert "--adv_weights 0 0 --seed" in " ".join(calls[1])
    assert str(runs / "ablation_mining_margin_steps_seed1") == calls[-1][calls[-1].index("--against") + 1]
    shutil.rmtree(runs / "ablation_mining_margin_steps_seed1")
    failing = ("ablation_mining_margin_steps_seed1", "1")
    code, error, calls, _ = ablation("mining", "shapes", *values, *directions, fails=failing)
    assert (code, error) == (1, "Result_Runs.sh: failed: margin_steps_seed1\n")
    assert "--compare" in calls[-1]
    assert "--against" not in calls[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task_p", 1, 0], "--task_p: the series mining needs steps of both tasks"),
        (["--task_p", 1], "--task_p 1.0: takes 2 values"),
        (["--adv_weights", 0], "--adv_weights 0: is no_adversarial"),
        (["--cluster_mode", "no_norm"], "--cluster_mode no_norm: is one of the series mining"),
        (["--scheduler", "exp"], "--scheduler exp: would decay further"),
        (["--values", "margin", "mine"], "no value 'mine' of mining"),
    ],
)
def test_the_ablation_of_mining_refuses_settings_that_coincide(ablation, tmp_path, monkeypatch, flags, message):
    (tmp_path / "main.py").write_text("raise SystemExit('of another program')")
    monkeypatch.chdir(tmp_path)
    code, error, calls, _ = ablation("mining", "shapes", *flags)
    assert (code, calls) == (2, [])
    assert message in error
    assert error.count("\n") == 1


def test_an_ablation_goes_on_after_a_failure_and_stops_when_told(ablation):
    code, error, calls, _ = ablation("clusters", "shapes", "--values", 4, 8, fails=("clusters_4", "137"))
    assert (code, error, len(calls)) == (1, "Result_Runs.sh: failed: 4_seed1\n", 3)
    for told in ("2", "130", "143"):
        code, _, calls, _ = ablation("clusters", "shapes", "--values", 4, 8, fails=("clusters_4", told))
        assert (code, len(calls)) == (int(told), 1)
    code, error, _, runs = ablation("clusters", "shapes", "--values", 4, 8, fails=("--compare", "2"))
    assert code == 2
    assert (runs / "ablation_clusters.csv").read_text() == "drawn\n"  # of the first time


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["sizes", "shapes"], "no series 'sizes'"),
        (["clusters", "shapes", "--seeds", "0"], "--seeds '0': give how many"),
        (["clusters", "shapes", "--dataset=cub200"], "--dataset=cub200 does not go with an ablation"),
        (["clusters", "shapes", "--seed=7"], "--seed=7 does not go with an ablation"),
        (["clusters", "shapes", "--savename", "mine"], "mine.csv exists already, and is of no series"),
    ],
)
def test_an_ablation_refuses_what_does_not_fit(ablation, tmp_path, flags, message):
    (tmp_path / "with space" / "runs" / "shapes").mkdir(parents=True)
    (tmp_path / "with space" / "runs" / "shapes" / "mine.csv").write_text("of the user")
    code, error, calls, runs = ablation(*flags)
    assert (code, calls) == (2, [])
    assert message in error
    assert error.count("\n") == 1
    assert (runs / "mine.csv").read_text() == "of the user"
