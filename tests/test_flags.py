"""Flags, and what a user is told about bad ones and bad data: one line, exit code 2, no run folder."""

import re
import subprocess
import sys
from importlib.machinery import PathFinder

import pytest
from conftest import ALONE, ROOT, parse, refused, run, small_flags, write_class_folders

import datasets
import evaluate
import main
from report import ablation
from run import options
from support import packages, processes
from support.errors import InputError

DEFAULTS = {
    "dataset": "cub200", "arch": "resnet50", "not_pretrained": False, "k_vals": [1, 2, 4, 8], "n_epochs": 130,
    "kernels": 8, "seed": 1, "scheduler": "step", "gamma": 0.3, "tau": [80], "decay": 4e-4, "lr": 1e-5,
    "task_p": [1, 0.8], "bs": 112, "cs_per_bs": [4, 4], "embed_sizes": [128, 128],
    "losses": ["marginloss", "marginloss"], "sampling": ["distance", "distance"], "proxy_lr": [1e-5, 1e-5],
    "beta": [1.2, 1.2], "beta_lr": [5e-4, 5e-4], "nu": [0, 0], "margin": [0.2, 0.2], "adversarial": ["Class-Shared"],
    "adv_weights": [2500], "adv_dim": 512, "shared_num_classes": 30, "cluster_update_freq": 3, "cluster_mode": "mean",
    "random_cluster_pick_p": 0.2, "gpu": 0, "savename": "", "make_graph": False, "source_path": "./Datasets",
    "save_path": "./Training_Results", "img_size": 224, "amp": "none", "eval_every": 1, "bn": "frozen",
    "weights": None, "cache": "none", "fast_eval": False, "tf32": False, "compile": False,
    "resume": None, "eval_shared": False, "tensorboard": False, "go_on": False, "val_classes": 0.0,
    "select": "test",
    "shared_gradient": "backbone", "flip": "class",
}  # fmt: skip


def test_defaults_are_those_that_scripts_rely_on():
    assert vars(parse()) == DEFAULTS


def test_pairs_are_the_flags_that_take_two_values():
    actions = main.get_args_parser()._actions
    assert {action.dest for action in actions if action.nargs == 2} == set(options.PAIRS)


def test_a_task_that_never_steps_may_have_any_batches():
    assert parse("--task_p", 1, 0, "--cs_per_bs", 4, 1).cs_per_bs == [4, 1]


def test_flags_that_train_badly_are_doubted():
    few = "--bs 112 takes 4 images of each of 28 classes, but there are only 6 to train, so "
    few += "classes repeat within a batch; try a smaller one"
    slow = "--lr 1e-05 with --not_pretrained: random weights want about 1e-3"
    assert options.warnings_for(parse("--not_pretrained"), 6) == [slow, few]
    assert options.warnings_for(parse("--not_pretrained", "--lr", 1e-3, "--bs", 24), 6) == []
    assert options.warnings_for(parse("--losses", "proxynca", "marginloss"), 6) == []


def test_defaults_that_depend_on_other_flags():
    assert parse("--not_pretrained").bn == "train"
    assert parse("--not_pretrained", "--bn", "frozen").bn == "frozen"
    assert parse("--dataset", "vehicle_id").k_vals == [1, 5]
    assert parse("--k_vals", 10, 5).k_vals == [1, 5, 10]
    assert parse("--losses", "proxynca", "marginloss").cs_per_bs == [1, 4]


def test_flags_that_a_message_asks_for_can_be_pasted():
    named = {"weights": "my nets/a.pth", "task_p": [1.0, 0.8], "tensorboard": True, "fast_eval": False}
    assert [options.as_typed(flag, value) for flag, value in named.items()] == [
        "--weights 'my nets/a.pth'", "--task_p 1.0 0.8", "--tensorboard", "no --fast_eval"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task_p", "1"], "--task_p: expected 2 arguments"),
        (["--embed_sizes", "1", "2", "3"], "--embed_sizes: '1' is not a whole number of at least 2"),
        (["--bs", "110"], "--bs 110 is not a multiple of --cs_per_bs 4"),
        (["--bs", "4"], "--bs 4 has room for one class"),
        (["--cs_per_bs", "1", "4"], "marginloss needs at least 2 images per class"),
        (["--adv_weights", "1", "2"], "takes one weight per direction"),
        (["--adversarial", "Class-Shared", "Class-Shared", "--adv_weights", "1", "2"], "name each direction once"),
        (["--task_p", "1", "1.5"], "'1.5' is not a probability"),
        (["--task_p", "0", "0"], "nothing would be trained"),
        (["--lr", "nan"], "'nan' is not a number above 0"),
        (["--n_epochs", "0"], "'0' is not a whole number of at least 1"),
        (["--arch", "vgg16"], "invalid choice: 'vgg16'"),
        (["--savename", "a" * 300], "': give a plain folder name"),
        (["--savename", "a/b"], "--savename 'a/b': give a plain folder name"),
        (["--weights", "w.pth", "--not_pretrained"], "contradicts --not_pretrained"),
        (["--n_epoch", "3"], "unrecognized arguments: --n_epoch 3; did you mean --n_epochs?"),
        (["--select", "val"], "--select val: there are no classes to select by"),
        (["--val_classes", "1"], "is not a fraction from 0"),
        (["--seed", "9" * 30], "is not a whole number from 0 to 2^63 - 1"),
        (["--n_epochs", "9" * 400], "is not a whole number"),
        (["--k_vals", "9" * 20], "is not a whole number of at least 1, at most 1,000,000,000"),
        (["--beta", "1e300", "1"], "'1e300' is not a number above 0, at most 1e9"),
        (["--embed_sizes", "100000000", "2"], "'100000000' is not a whole number of at least 2, at most 65,536"),
    ],
)
def test_bad_flags_are_one_line_with_exit_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("main.py: error: ")


@pytest.mark.parametrize(
    ("argv", "package"),
    [
        (["--arch", "timm/test_vit"], "timm"),
        (["--losses", "pml/TripletMarginLoss", "triplet"], "pytorch-metric-learning"),
        (["--tensorboard"], "tensorboard"),
        (["--weights", "stored.safetensors"], "safetensors"),
        (["--make_graph"], "torchview"),
    ],
)
def test_a_missing_package_is_named_at_once(tmp_path, monkeypatch, capsys, argv, package):
    """The package is hidden by a finder that refuses it."""
    module, find = package.replace("-", "_"), PathFinder.find_spec
    monkeypatch.setattr(PathFinder, "find_spec", lambda name, *more: None if name == module else find(name, *more))
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, argv)
    assert line.startswith(f"main.py: error: {' '.join(argv[:2])}: ")
    assert line.endswith(f"try pip install {package}\n")
    assert not list(tmp_path.iterdir())


def spoil_first_image(root):
    (root / "tiny" / "images" / "class_01" / "2.jpg").write_bytes(b"spoilt")


@pytest.mark.parametrize(
    ("flags", "spoil", "message"),
    [
        (["--dataset", "absent"], None, "no images of --dataset absent in --source_path"),
        (["--dataset", "../elsewhere"], None, "and where it lies: --dataset elsewhere --source_path"),
        (["--dataset", "few"], lambda root: write_class_folders(root / "few", (3, 3, 3)), "at least 4 are needed"),
        (["--dataset", "tiny", "--bs", "12"], None, "of tiny; try --bs 8 --shared_num_classes 2"),
        (["--dataset", "tiny", "--shared_num_classes", "11"], None, "--shared_num_classes 11 is larger than the 10"),
        (["--dataset", "tiny", "--cache", "ram", "--bs", "12"], spoil_first_image, "--bs 12 is larger than the 10"),
        (["--dataset", "tiny", "--cache", "ram", "--val_classes", "0.5"], spoil_first_image, "--val_classes 0.5: "),
        (["--dataset", "tiny", "--kernels", "1"], spoil_first_image, "class_01/2.jpg"),
        (["--dataset", "tiny", "--task_p", "1", "0"], spoil_first_image, "class_01/2.jpg"),
    ],
)
def test_bad_data_is_one_line_and_leaves_no_run_folder(flags, spoil, message, class_folders, tmp_path, capsys):
    if spoil:
        spoil(class_folders)
    assert message in refused(capsys, small_flags(class_folders, tmp_path / "results", *flags))
    assert not (tmp_path / "results").exists()


def test_weights_that_cannot_be_downloaded(class_folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    argv = [flag for flag in small_flags(class_folders, tmp_path / "results", *ALONE) if flag != "--not_pretrained"]
    error = refused(capsys, argv)
    assert "cannot get the pretrained googlenet weights" in error
    assert "--weights FILE" in error
    assert not (tmp_path / "results").exists()


def test_no_data_as_a_user_sees_it(tmp_path):
    script = ROOT / "main.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.count("\n")) == (2, 3)
    assert re.match(r"device: .*\n.*; python .*\ncommand: python main.py\n$", done.stdout)  # imports print nothing
    assert done.stderr.count("\n") == 1
    assert "no images of --dataset cub200 in --source_path Datasets; looked for images/<class>/<image>" in done.stderr
    assert "; found no folder Datasets; to do " in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("started_by", "is_warned"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, False),  # one process in a job for several
        ({"PMI_SIZE": ""}, False),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"WORLD_SIZE": "2", "RANK": "0"}, True),
        ({"SLURM_STEP_NUM_TASKS": "2", "TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "1"}, False),
    ],
)
def test_several_tasks_that_torchrun_did_not_start_are_one_line(started_by, is_warned, tmp_path, monkeypatch, capsys):
    for name in processes.TASK_COUNTS:
        monkeypatch.delenv(name, raising=False)
    for name, value in started_by.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):  # there is no data
        run(["--source_path", tmp_path])
    lines = [line for line in capsys.readouterr().out.splitlines() if "each trains a run of its own" in line]
    assert len(lines) == is_warned


def test_help_fits_100_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = main.get_args_parser().format_help()
    assert max(map(len, text.splitlines())) <= 100
    for flag in DEFAULTS:
        assert f"--{flag}" in text
    assert "keeps the adversarial term; for the plain baseline" in " ".join(text.split())


BROKEN = {
    "raise TypeError('Descriptors cannot be created directly')": "TypeError: Descriptors cannot be created directly",
    "raise RuntimeError('operator nms does not exist\\nat all')": "RuntimeError: operator nms does not exist",
    "import a_package_that_it_needs": "ModuleNotFoundError: No module named 'a_package_that_it_needs'",
    "from os import gone": "ImportError: cannot import name 'gone' from 'os'",
}


@pytest.mark.parametrize(("code", "reason"), BROKEN.items())
def test_a_package_that_cannot_be_imported_says_why(tmp_path, monkeypatch, code, reason):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_package.py").write_text(code)
    with pytest.raises(InputError) as error:
        packages.imported("a_package", "a-package", "--flag")
    assert str(error.value).startswith(f"--flag: cannot import a-package ({reason}")
    assert "\n" not in str(error.value)


def test_a_path_may_begin_with_the_home_folder(class_folders, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(class_folders))
    (class_folders / "b.pth").touch()
    args = parse("--source_path=~/a", "--save_path=~", "--weights=~/b.pth")
    assert (args.source_path, args.save_path) == (f"{class_folders}/a", str(class_folders))
    assert args.weights == f"{class_folders}/b.pth"
    paths = []
    for program in (main, evaluate, ablation):
        for action in program.get_args_parser()._actions:
            if action.metavar in ("FILE", "FILE.npz", "FOLDER", "RUN"):
                assert action.type("~/run") == f"{class_folders}/run", action.dest
                paths.append(action.dest)
    assert len(paths) == 13
    assert datasets.main(["tiny", "--source_path=~"]) == 0
    assert "train" in capsys.readouterr().out
