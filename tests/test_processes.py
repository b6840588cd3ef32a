"""Several processes: the same gradients, features, labels and scores as one, and an end when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import warnings
from argparse import Namespace
from functools import partial
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    ALONE,
    CPU_DIGITS,
    ROOT,
    act_in_a_worker,
    as_bitmap,
    assert_equal,
    call_like_new,
    epochs_logged,
    one_thread,
    parse,
    refused,
    run,
    run_in_process,
    small_flags,
    write_class_folders,
)
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn import functional as F

import auxiliaries
import datasets
import evaluate
import losses
import main
import netlib
from data.images import ImageSet
from run import options
from support import errors, files, output, processes

pytestmark = pytest.mark.skipif(0 < torch.cuda.device_count() < 3, reason="a GPU for each process: needs three")
BATCH_SIZE = 12
CASES = {
    f"{loss}-{sampling}-{'+'.join(directions)}": (loss, sampling, directions)
    for loss, sampling, directions in [
        ("marginloss", "distance", ["Class-Shared"]),
        ("marginloss", "distance", []),
        ("marginloss", "semihard", ["Class-Shared", "Shared-Class"]),
        ("marginloss", "random", ["Shared-Class"]),
        ("triplet", "distance", []),
        ("triplet", "semihard", ["Class-Shared", "Shared-Class"]),
        ("triplet", "random", ["Class-Shared"]),
        ("proxynca", "distance", ["Class-Shared", "Shared-Class"]),
        ("proxynca", "distance", []),
    ]
}
COMPILED = "triplet-random-Class-Shared"
"""The case that is computed by a compiled network too."""


class SmallNetwork(nn.Module):
    """Two heads on a convolution, in float64, which EmbeddingNetwork does not run in."""

    freeze_batchnorm = True

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.heads = nn.ModuleDict({"Class": nn.Linear(8, 6), "Shared": nn.Linear(8, 5)})
        self.register_buffer("rank", torch.tensor(processes.rank()))
        self.double()

    def forward(self, images, outputs):
        pooled = self.layers(images).flatten(1)
        return {task: F.normalize(self.heads[task](pooled), dim=1) for task in outputs}


class Recorder(torch.optim.SGD):
    """Gradient descent with momentum, so with a state of what it has stepped, that remembers each step's gradients."""

    def step(self):
        groups = [parameter for group in self.param_groups for parameter in group["params"]]
        self.steps.append([None if parameter.grad is None else parameter.grad.clone() for parameter in groups])
        super().step()


def gradients(loss, sampling, directions, compiled=False):
    """Return the gradients of two steps of each task, the average losses, and what surrounds the network."""
    torch.manual_seed(3)
    network, sizes = SmallNetwork(), {"Class": 6, "Shared": 5}
    values = {"margin": 0.2, "beta": 1.2, "beta_lr": 1.0, "nu": 0.1, "proxy_lr": 1.0}
    tasks = {
        name: Namespace(losses=loss, sampling=sampling, embed_sizes=size, **values) for name, size in sizes.items()
    }
    weights = dict.fromkeys(directions, 30.0)
    objective = losses.build_objective(tasks, dict.fromkeys(sizes, 4), weights, adv_dim=7, lr=1.0).double()
    share = processes.shard(BATCH_SIZE)
    batches = [(torch.rand(BATCH_SIZE, 3, 6, 6).double(), torch.randint(4, (BATCH_SIZE,))) for _ in range(4)]
    own = [(images[share.start : share.stop], labels[share.start : share.stop]) for images, labels in batches]
    names = list(network.state_dict())
    compile_fast = mock.patch.object(
        torch, "compile", partial(torch.compile, backend="aot_eager")
    )  # C++ takes a minute
    with compile_fast, warnings.catch_warnings(action="error"):
        trained = netlib.for_training(network, compiled, has_unused_heads=not objective.weights)
    assert network.rank == 0  # buffers begin as those of the first process
    optimizer = Recorder([*network.parameters(), *objective.parameters()], lr=1e-2, momentum=0.9)
    optimizer.steps = []
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    steps = [(0, "Class"), (0, "Shared"), (1, "Class"), (1, "Shared")]
    with main.Progress("", 0) as bar:
        averages = main.train_one_epoch(trained, objective, optimizer, scaler, steps, own, bar)
    assert list(network.state_dict()) == names
    return {"steps": optimizer.steps, "averages": averages, "around": around(trained)}


def around(trained):
    """Return the classes around a network, the outermost first, and the options of DistributedDataParallel."""
    found = [type(trained).__name__]
    if isinstance(trained, nn.parallel.DistributedDataParallel):
        found += [f"{name}={getattr(trained, name)}" for name in ("broadcast_buffers", "gradient_as_bucket_view")]
    inner = getattr(trained, "_orig_mod", getattr(trained, "module", None))
    return found if inner is None else found + around(inner)


def features(n_images):
    """Return what extract_features gives for this many images in batches of 4, everywhere and on the first process."""
    rng = np.random.default_rng(n_images)
    pixels = rng.integers(256, size=(n_images, 40, 40, 3), dtype=np.uint8)
    images = ImageSet([str(i) for i in range(n_images)], np.zeros(n_images, int), ["a"], pixels)
    torch.manual_seed(0)
    network = netlib.build_network("googlenet", {"Class": 8, "Shared": 6}, pretrained=False, freeze_batchnorm=False)
    share = processes.shard(n_images, 4) if processes.world_size() > 1 else None
    dataset = datasets.ImageDataset(images, datasets.test_transform(32))
    loader = datasets.make_loader(dataset, n_workers=0, pin_memory=False, batch_size=4, sampler=share)
    everywhere = evaluate.extract_features(network, loader, ["Class", "Early"])
    first = evaluate.extract_features(network, loader, ["Shared"], to_all=False)["Shared"]
    assert (first is None) != processes.is_first()
    return {**everywhere, "first": first}


def scores():
    """Return the scores of test sets, one with fewer queries than processes, and labels of a clustering."""
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(61, 5)), rng.integers(6, size=61)
    of_all = evaluate.score_set(points, labels, [1, 4], seed=1)
    of_queries = evaluate.score_set(points, labels, [1, 4], seed=1, is_query=np.arange(61) < 2)
    clusters, distances = processes.broadcast(auxiliaries.kmeans(points, 7, seed=2))
    return {"all": of_all, "queries": of_queries, "clusters": clusters.tolist(), "distances": distances.tolist()}


def computed():
    """Return all that is compared."""
    found = {name: gradients(*case) for name, case in CASES.items()}
    if processes.world_size() < 3:
        found["compiled"] = gradients(*CASES[COMPILED], compiled=True)
    found |= {f"{n} images": features(n) for n in (23, 24, 5, 1)}
    return found | {"scores": scores()}


def store_computed(path):
    """Write what one of several processes computes."""
    with processes.connected():
        torch.save(computed(), path / f"{processes.rank()}.pt")


def elastic_run(n_processes, function, *args):
    """Call a function in several connected processes, by what torchrun itself calls, and end as it does."""
    torch.set_num_threads(1)  # torchrun sets OMP_NUM_THREADS
    config = LaunchConfig(
        1, 1, n_processes, run_id="tests", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        start_method="fork",
    )  # fmt: skip
    try:
        elastic_launch(config, call_like_new)(function, *args)
    except ChildFailedError as error:
        sys.exit(str(error))


def run_in_processes(n_processes, function, *args):
    """Call a function in several connected processes that have main imported; return how torchrun would have ended."""
    return run_in_process(elastic_run, n_processes, function, *args)


def torchrun(argv):
    """Run main.py in two processes, as a user does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "main.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *argv], capture_output=True, text=True, env=environment)


def assert_ended_well(process):
    """See that a process did what it was to do."""
    assert process.returncode == 0, process.stderr


def own_lines(error):
    """Return the lines on stderr that are not torchrun's."""
    return [line for line in error.splitlines() if line.startswith("main.py:")]


@pytest.fixture(scope="module")
def alone():
    """What one process computes."""
    with one_thread():
        return computed()


@pytest.fixture(scope="module", params=[2, 3])
def together(request, tmp_path_factory):
    """What each of 2 and of 3 processes computes."""
    path = tmp_path_factory.mktemp(f"processes_{request.param}")
    assert_ended_well(run_in_processes(request.param, store_computed, path))
    return [torch.load(path / f"{i}.pt", weights_only=False) for i in range(request.param)]


def assert_same_steps(found, expected):
    """Compare gradients and average losses but for the order of float sums."""
    assert len(found["steps"]) == 4
    for step, expected_step in zip(found["steps"], expected["steps"], strict=True):
        for gradient, value in zip(step, expected_step, strict=True):
            assert (gradient is None) == (value is None)
            if value is not None:
                torch.testing.assert_close(gradient, value, rtol=1e-5, atol=1e-12)
    for name, value in expected["averages"].items():
        assert found["averages"][name] == (None if value is None else pytest.approx(value, rel=1e-10))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(alone, together, case):
    for found in together:
        assert_same_steps(found[case], alone[case])


def test_a_compiled_network_has_the_same_gradients_and_is_compiled_as_a_whole(alone, together):
    options = ["broadcast_buffers=False", "gradient_as_bucket_view=True"]
    for found in together:
        assert found[COMPILED]["around"] == ["DistributedDataParallel", *options, "SmallNetwork"]
        if "compiled" in found:
            assert found["compiled"]["around"] == ["OptimizedModule", *found[COMPILED]["around"]]
            assert_same_steps(found["compiled"], alone[COMPILED])
    assert alone["compiled"]["around"] == ["OptimizedModule", "SmallNetwork"]
    assert_same_steps(alone["compiled"], alone[COMPILED])


@pytest.mark.parametrize("case", CASES)
def test_all_processes_step_alike_to_the_last_bit(together, case):
    for found in together[1:]:
        assert_equal(found[case]["steps"], together[0][case]["steps"], case)


@pytest.mark.parametrize("n_images", [23, 24, 5, 1])
def test_features_are_those_of_one_process_bit_for_bit(alone, together, n_images):
    expected = alone[f"{n_images} images"]
    for found in together:
        assert all(np.array_equal(found[f"{n_images} images"][name], expected[name]) for name in ("Class", "Early"))
    assert np.array_equal(together[0][f"{n_images} images"]["first"], expected["first"])


def test_scores_and_clusters_are_those_of_one_process(alone, together):
    for found in together:
        assert found["scores"] == alone["scores"]


def flags_of(source, path, *more):
    """Return the command line of a small run, with proxies, betas and both adversarial directions."""
    base = ["--bn", "frozen", "--bs", 6, "--losses", "proxynca", "marginloss"]
    base += ["--adversarial", "Class-Shared", "Shared-Class", "--adv_weights", 50, 50, "--n_epochs", 2]
    return small_flags(source, path, *base, *more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a run of one epoch in two processes, started by torchrun, and in one."""
    top = tmp_path_factory.mktemp("runs")
    write_class_folders(top / "source" / "tiny", per_class=(9,) * 8, contrast=0.1)
    flags = [*ALONE, "--bs", 12, "--n_epochs", 1, "--lr", 1e-5, "--shared_num_classes", 8]
    process = torchrun(flags_of(top / "source", top / "two", *flags))
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("run folder: ") == 2  # one process speaks
    assert "in 2 processes" in process.stdout
    with one_thread():
        one = run(flags_of(top / "source", top / "one", *flags))
    return top / "two" / "tiny" / "run", one


def test_a_run_mines_the_same_labels_and_scores_alike(runs):
    stored = [torch.load(path / "last.pth.tar", weights_only=True) for path in runs]
    assert torch.equal(*(content["progress"]["mined_labels"] for content in stored))
    initial = [content["progress"]["initial_scores"] for content in stored]
    assert initial[0] == pytest.approx(initial[1], abs=2e-3)
    # Rounding can turn a draw of the sampler and a point of the k-means
    for name, bound in (("log_train_Class.csv", {"rtol": 2e-3}), ("log_val_Class.csv", {"atol": 0.03, "rtol": 0})):
        two, one = (pd.read_csv(path / name).drop(columns="Time") for path in runs)
        pd.testing.assert_frame_equal(two, one, **bound)
    assert {path.name for path in runs[0].iterdir()} == {path.name for path in runs[1].iterdir()}


@CPU_DIGITS
def test_a_run_is_resumed_by_as_many_processes_exactly_and_by_one(class_folders, tmp_path):
    assert_ended_well(run_in_processes(2, run, flags_of(class_folders, tmp_path / "whole")))
    cut = tmp_path / "cut" / "tiny" / "run"
    assert_ended_well(run_in_processes(2, run, flags_of(class_folders, tmp_path / "cut", "--n_epochs", 1)))
    assert_ended_well(run_in_processes(2, run, ["--resume", cut, "--n_epochs", 2]))
    whole, resumed = (
        torch.load(path / "last.pth.tar", weights_only=True) for path in (tmp_path / "whole" / "tiny" / "run", cut)
    )
    assert_equal(resumed["state_dict"], whole["state_dict"], "weights")
    for part in ("objective", "optimizer", "scheduler", "random"):
        assert_equal(resumed["training"][part], whole["training"][part], part)
    assert torch.equal(resumed["progress"]["mined_labels"], whole["progress"]["mined_labels"])
    run(["--resume", cut, "--n_epochs", 3])
    assert pd.read_csv(cut / "log_val_Class.csv")["Epochs"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arch", "more"),
    [("timm/test_efficientnet", []), ("timm/test_vit", ["--adv_weights", 0, 0, "--shared_gradient", "head"])],
)
def test_a_backbone_of_timm_trains_in_two_processes_as_in_one(class_folders, tmp_path, arch, more):
    pytest.importorskip("timm")
    flags = [*more, "--arch", arch, "--img_size", 64, "--n_epochs", 1, "--lr", 1e-5]
    assert_ended_well(run_in_processes(2, run, flags_of(class_folders, tmp_path / "two", *flags)))
    with one_thread():
        run(flags_of(class_folders, tmp_path / "one", *flags))
    logs = [pd.read_csv(tmp_path / name / "tiny" / "run" / "log_train_Class.csv") for name in ("two", "one")]
    pd.testing.assert_frame_equal(*(log.drop(columns="Time") for log in logs), rtol=2e-3)


def kill(file, signum):
    """Send a signal to the process whose id is in a file."""
    os.kill(int(file.read_text()), signum)


def run_and_kill(argv, folder, log, told, signum):
    """Run main as one of several processes; one of them or torchrun gets a signal in the epoch after a log was written.

    A loader's worker of the first process sends it. folder: for the ids of all.
    """
    rank = int(os.environ["RANK"])
    (folder / f"pid_{rank}").write_text(str(os.getpid()))
    if rank == 0:
        (folder / "pid_torchrun").write_text(str(os.getppid()))
        act_in_a_worker("0.bmp", log, partial(kill, folder / f"pid_{told}", signum))
    run(argv)


@pytest.mark.parametrize(
    ("n_processes", "told", "signum"),
    [
        (3, 0, signal.SIGKILL),
        (2, 1, signal.SIGKILL),
        (2, "torchrun", signal.SIGTERM),
        (2, "torchrun", signal.SIGKILL),
    ],
)
def test_no_process_outlives_one_that_dies(class_folders, tmp_path, n_processes, told, signum):
    path = tmp_path / "tiny" / "run"
    as_bitmap(class_folders / "tiny" / "images" / "class_00" / "0.jpg")
    argv = flags_of(class_folders, tmp_path, "--kernels", 2, "--n_epochs", 9000)
    log = path / "log_val_Class.csv"
    process = run_in_processes(n_processes, run_and_kill, argv, tmp_path, log, told, signum)  # waits for all
    assert process.returncode != 0
    lines = own_lines(process.stderr)
    assert len(lines) == (0 if told == 0 else 1), process.stderr  # the first process speaks, if it can
    command = f"torchrun --standalone --nproc_per_node={n_processes} main.py --resume {path}"
    for line in lines:
        assert line.startswith("main.py: stopped"), line
        assert line.endswith(f"; last complete epoch saved; resume with: {command}"), line
        assert "SIGINT" not in line  # what torch.multiprocessing asks for, but torchrun does not
    if told == 0:
        assert "Signal 9 (SIGKILL)" in process.stderr
    assert epochs_logged(path) < 9000


def test_a_broken_image_in_the_share_of_another_process_ends_all_with_one_line(class_folders, tmp_path):
    (class_folders / "tiny" / "images" / "class_01" / "4.jpg").write_bytes(b"no image")
    process = run_in_processes(2, run, flags_of(class_folders, tmp_path / "results"))
    assert process.returncode != 0
    assert len(own_lines(process.stderr)) == 1  # of the first one, which lost another
    assert not (tmp_path / "results").exists()


def test_what_the_first_process_finds_is_told_once(runs):
    with files.locked(runs[1]):
        process = run_in_processes(2, run, ["--resume", runs[1], "--n_epochs", 2])
    assert process.returncode != 0
    (line,) = own_lines(process.stderr)
    assert line.endswith(f"{runs[1]}: is being trained by another process; wait for it, or stop it first")


@pytest.fixture(params=["0", "2"])
def rank(request, monkeypatch):
    """The number of this process, as if torchrun had started three."""
    for name, value in {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "RANK": request.param}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", request.param)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tests")
    return request.param


def test_flags_that_several_processes_cannot_use_are_refused_once(rank, tmp_path, capsys):
    for program, argv, message in [
        (main, flags_of(tmp_path, tmp_path, "--bs", 8), "--bs 8 is not divisible by the 3 processes that torchrun"),
        (
            main,
            flags_of(tmp_path, tmp_path, "--bn", "train"),
            "--bn train (the default with --not_pretrained): on CPUs",
        ),
        (evaluate, [tmp_path], "runs as one process: start it with python, not with torchrun"),
    ]:
        if rank == "0":
            assert message in refused(capsys, argv, program)
        else:
            with pytest.raises(SystemExit) as stop:
                run(argv, program)
            assert (stop.value.code, capsys.readouterr().err) == (2, "")


def test_a_compiled_network_whose_statistics_are_exchanged_is_warned_of(rank):
    args = parse("--bs", 12, "--compile")
    assert not options.warnings_for(args, n_classes=12)
    args.bn = "train"
    (warning,) = options.warnings_for(args, n_classes=12)
    assert "--compile --bn train in several processes: SyncBatchNorm" in warning


def test_what_ends_any_process_is_left_for_torchruns_report(rank, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as stop, output.logged(), errors.one_line_errors("main.py"):
        raise errors.InputError("cannot decode the image a.jpg")
    line = "main.py: error: cannot decode the image a.jpg\n" if rank == "0" else ""
    assert (stop.value.code, capsys.readouterr().err) == (2, line)
    report = json.loads((tmp_path / "error.json").read_text())
    assert "InputError: cannot decode the image a.jpg" in str(report)
