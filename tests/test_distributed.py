"""Several processes: the same gradients, features, labels and scores as one, and an end when one of them dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_equal, call_like_new, parse, run, run_in_process
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

BATCH_SIZE = 12
CASES = {
    f"{loss}-{sampling}-{'+'.join(directions)}-{batchnorm}": (loss, sampling, directions, batchnorm)
    for loss, sampling, directions, batchnorm in [
        ("marginloss", "distance", ["Class-Shared"], "train"),
        ("marginloss", "distance", [], "train"),
        ("marginloss", "semihard", ["Class-Shared", "Shared-Class"], "frozen"),
        ("marginloss", "random", ["Shared-Class"], "train"),
        ("triplet", "distance", [], "frozen"),
        ("triplet", "semihard", ["Class-Shared", "Shared-Class"], "train"),
        ("triplet", "random", ["Class-Shared"], "train"),
        ("proxynca", "distance", ["Class-Shared", "Shared-Class"], "train"),
        ("proxynca", "distance", [], "frozen"),
    ]
}


class SmallNetwork(nn.Module):
    """Two heads on a convolution with BatchNorm, in float64, which EmbeddingNetwork does not run in."""

    def __init__(self, freeze_batchnorm):
        super().__init__()
        self.freeze_batchnorm = freeze_batchnorm
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.heads = nn.ModuleDict({"Class": nn.Linear(8, 6), "Shared": nn.Linear(8, 5)})
        self.register_buffer("mean", torch.zeros(3))
        self.double()

    def train(self, mode=True):
        super().train(mode)
        if self.freeze_batchnorm:
            self.layers[1].eval()
        return self

    def forward(self, images, outputs=None):
        pooled = self.layers(images).flatten(1)
        return {task: F.normalize(self.heads[task](pooled), dim=1) for task in outputs or self.heads}


class Recorder(torch.optim.SGD):
    """Gradient descent that remembers the gradients of each step."""

    def step(self):
        groups = [parameter for group in self.param_groups for parameter in group["params"]]
        self.steps.append([None if parameter.grad is None else parameter.grad.clone() for parameter in groups])
        super().step()


def gradients(loss, sampling, directions, batchnorm):
    """Return the gradients of two iterations of both tasks, and the statistics of BatchNorm after them."""
    torch.manual_seed(3)
    network = SmallNetwork(batchnorm == "frozen")
    values = {"margin": 0.2, "beta": 1.2, "beta_lr": 1.0, "nu": 0.1, "proxy_lr": 1.0, "n_classes": 4}
    sizes = {"Class": 6, "Shared": 5}
    criteria = {
        task: losses.build_loss(loss, sampling, embed_size=sizes[task], **values).double() for task in main.TASKS
    }
    adversaries = {}
    for direction in directions:
        target, source = direction.split("-")
        adversaries[direction] = (losses.AdversarialLoss(sizes[target], sizes[source], 7).double(), 30.0)
    share = auxiliaries.own_share(BATCH_SIZE)
    loaders = {}
    for task in main.TASKS:
        batches = [(torch.rand(BATCH_SIZE, 3, 6, 6).double(), torch.randint(4, (BATCH_SIZE,))) for _ in range(2)]
        loaders[task] = [
            (images[share.start : share.stop], labels[share.start : share.stop]) for images, labels in batches
        ]
    trained = network
    if auxiliaries.n_processes() > 1:
        network = netlib.synchronise_batchnorm(network)
        trained = netlib.distribute(network, has_unused=not adversaries)
    terms = [*criteria.values(), *(term for term, _ in adversaries.values())]
    optimizer = Recorder([*network.parameters(), *(values for term in terms for values in term.parameters())], lr=1e-2)
    optimizer.steps = []
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with main.tqdm(disable=True) as bar:
        averages = main.train_one_epoch(
            trained, criteria, adversaries, optimizer, scaler, loaders, np.ones((2, 2), dtype=bool), "none", bar, 0
        )
    statistics = [network.layers[1].running_mean, network.layers[1].running_var]
    return {"steps": optimizer.steps, "statistics": statistics, "averages": list(averages.values())}


def features(n_images):
    """Return what extract_features gives for this many images in batches of 4, everywhere and on the first process."""
    rng = np.random.default_rng(n_images)
    pixels = rng.integers(256, size=(n_images, 40, 40, 3), dtype=np.uint8)
    images = datasets.ImageSet([str(i) for i in range(n_images)], np.zeros(n_images, int), ["a"], pixels)
    torch.manual_seed(0)
    network = netlib.build_network("googlenet", {"Class": 8, "Shared": 6}, pretrained=False, freeze_batchnorm=False)
    share = auxiliaries.own_share(n_images, 4) if auxiliaries.n_processes() > 1 else None
    dataset = datasets.ImageDataset(images, datasets.test_transform(32))
    loader = datasets.make_loader(dataset, n_workers=0, pin_memory=False, batch_size=4, share=share)
    everywhere = evaluate.extract_features(network, loader, ["Class", "Early"])
    first = evaluate.extract_features(network, loader, ["Shared"], everywhere=False)["Shared"]
    assert (first is None) != auxiliaries.is_first_process()
    return {**{name: torch.from_numpy(values) for name, values in everywhere.items()}, "first": first}


def scores():
    """Return the scores of test sets, one with fewer queries than processes, and labels of a clustering."""
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(61, 5)), rng.integers(6, size=61)
    of_all = evaluate.score_set(points, labels, [1, 4], seed=1)
    of_queries = evaluate.score_set(points, labels, [1, 4], seed=1, is_query=np.arange(61) < 2)
    clusters, distances = auxiliaries.computed_by_first(lambda: auxiliaries.kmeans(points, 7, seed=2))
    return {"all": of_all, "queries": of_queries, "clusters": clusters.tolist(), "distances": distances.tolist()}


def computed():
    """Return all that is compared."""
    found = {name: gradients(*case) for name, case in CASES.items()}
    found |= {f"{n} images": features(n) for n in (23, 24, 5, 1)}
    return found | {"scores": scores()}


def torchrun(n_processes, *command, **options):
    """Start processes; return torchrun's own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    return subprocess.Popen(
        [*launcher, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, **options,
    )  # fmt: skip


def elastic_run(n_processes, function, *args):
    """Call a function in several connected processes, by what torchrun itself calls."""
    torch.set_num_threads(1)  # torchrun sets OMP_NUM_THREADS
    config = LaunchConfig(
        1, 1, n_processes, run_id="tests", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        start_method="fork",
    )  # fmt: skip
    try:
        elastic_launch(config, call_like_new)(function, *args)
    except ChildFailedError:
        sys.exit(1)


def run_in_processes(n_processes, function, *args):
    """Call a function in several connected processes that have main imported; return how torchrun would have ended."""
    return run_in_process(elastic_run, n_processes, function, *args)


def assert_ended_well(process):
    """See that a process did what it was to do."""
    assert process.returncode == 0, process.stderr


def store_computed(folder):
    """Write what one of several processes computes."""
    with auxiliaries.process_group():
        torch.save(computed(), folder / f"{auxiliaries.process_number()}.pt")


@pytest.fixture(scope="module")
def one_thread():
    """Let this process compute as those that torchrun starts do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(one_thread):
    """What one process computes."""
    return computed()


@pytest.fixture(scope="module", params=[2, 3])
def together(request, tmp_path_factory):
    """What each of 2 and of 3 processes computes."""
    folder = tmp_path_factory.mktemp(f"processes_{request.param}")
    assert_ended_well(run_in_processes(request.param, store_computed, folder))
    return [torch.load(folder / f"{i}.pt", weights_only=False) for i in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(alone, together, case):
    for found in together:
        assert len(found[case]["steps"]) == 4
        for step, expected in zip(found[case]["steps"], alone[case]["steps"], strict=True):
            for gradient, value in zip(step, expected, strict=True):
                assert (gradient is None) == (value is None)
                if value is not None:
                    torch.testing.assert_close(gradient, value, rtol=1e-5, atol=1e-12)
        for statistics, value in zip(found[case]["statistics"], alone[case]["statistics"], strict=True):
            torch.testing.assert_close(statistics, value, rtol=1e-10, atol=0)
        for average, value in zip(found[case]["averages"], alone[case]["averages"], strict=True):
            assert average == (None if value is None else pytest.approx(value, rel=1e-10))


@pytest.mark.parametrize("case", CASES)
def test_all_processes_step_alike_to_the_last_bit(together, case):
    for found in together[1:]:
        for step, expected in zip(found[case]["steps"], together[0][case]["steps"], strict=True):
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(step, expected, strict=True))


@pytest.mark.parametrize("n_images", [23, 24, 5, 1])
def test_features_are_those_of_one_process_bit_for_bit(alone, together, n_images):
    expected = alone[f"{n_images} images"]
    for found in together:
        assert all(torch.equal(found[f"{n_images} images"][name], expected[name]) for name in ("Class", "Early"))
    assert np.array_equal(together[0][f"{n_images} images"]["first"], expected["first"])


def test_scores_and_clusters_are_those_of_one_process(alone, together):
    for found in together:
        assert found["scores"] == alone["scores"]


def flags_of_run(folder, *more):
    """Return the command line of a run on shapes."""
    base = (
        "--dataset shapes --arch googlenet --not_pretrained --img_size 32 --bs 56 --kernels 0 --lr 1e-5 --n_epochs 1 "
    )
    base += "--shared_num_classes 8 --adv_weights 50 --savename run"
    return [*base.split(), "--save_path", str(folder), *map(str, more)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, one_thread):
    """The folders of a run of one epoch in two processes and in one."""
    folder = tmp_path_factory.mktemp("runs")
    process = torchrun(2, ROOT / "main.py", *flags_of_run(folder / "two"))
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert output.count("run folder: ") == 2  # one process speaks
    assert "in 2 processes" in output
    return folder / "two" / "shapes" / "run", run(flags_of_run(folder / "one"))


def test_a_run_mines_the_same_labels_and_scores_alike(runs):
    stored = [torch.load(folder / "last.pth.tar", weights_only=True) for folder in runs]
    assert torch.equal(*(content["progress"]["shared_labels"] for content in stored))
    assert stored[0]["progress"]["initial_scores"] == pytest.approx(stored[1]["progress"]["initial_scores"], abs=2e-3)
    # Rounding can turn a draw of the sampler and a point of the k-means
    for name, bound in (("log_train_Class.csv", {"rtol": 2e-3}), ("log_val_Class.csv", {"atol": 0.01, "rtol": 0})):
        two, one = (pd.read_csv(folder / name).drop(columns="Time") for folder in runs)
        pd.testing.assert_frame_equal(two, one, **bound)
    assert {path.name for path in runs[0].iterdir()} == {path.name for path in runs[1].iterdir()}


def tiny_flags(source, folder, *more):
    """Return the command line of a run on the data set "tiny", with proxies, betas and both adversarial directions."""
    base = (
        "--dataset tiny --arch googlenet --not_pretrained --img_size 32 --bs 6 --cs_per_bs 2 2 --kernels 0 --lr 1e-3 "
    )
    base += "--shared_num_classes 3 --cluster_update_freq 0 --losses proxynca marginloss --task_p 1 0.8 --savename run "
    base += "--adversarial Class-Shared Shared-Class --adv_weights 50 50 --n_epochs 2"
    return [*base.split(), "--source_path", str(source), "--save_path", str(folder), *map(str, more)]


def test_a_run_is_resumed_by_as_many_processes_exactly_and_by_one(class_folders, tmp_path):
    assert_ended_well(run_in_processes(2, run, tiny_flags(class_folders, tmp_path / "whole")))
    cut = tmp_path / "cut" / "tiny" / "run"
    assert_ended_well(run_in_processes(2, run, tiny_flags(class_folders, tmp_path / "cut", "--n_epochs", 1)))
    assert_ended_well(run_in_processes(2, run, ["--resume", cut, "--n_epochs", 2]))
    whole, resumed = (
        torch.load(folder / "last.pth.tar", weights_only=True) for folder in (tmp_path / "whole" / "tiny" / "run", cut)
    )
    assert_equal(resumed["state_dict"], whole["state_dict"], "weights")
    for part in ("terms", "optimizer", "scheduler", "random"):
        assert_equal(resumed["training"][part], whole["training"][part], part)
    assert torch.equal(resumed["progress"]["shared_labels"], whole["progress"]["shared_labels"])
    run(["--resume", str(cut), "--n_epochs", "3"])
    assert pd.read_csv(cut / "log_val_Class.csv")["Epochs"].tolist() == [0, 1, 2]


def processes_of(command_line):
    """Return the ids of the processes that have a text in their command line."""
    found = subprocess.run(["pgrep", "-f", command_line], capture_output=True, text=True)
    assert found.returncode in (0, 1), found.stderr  # some, none
    return found.stdout.split()


def rank_of(pid):
    """Return the number that torchrun gave a process, as text; None for others."""
    environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next((entry.removeprefix("RANK=") for entry in environment if entry.startswith("RANK=")), None)


def own_lines(error):
    """Return the lines on stderr that are not torchrun's."""
    return [line for line in error.splitlines() if line.startswith("main.py:")]


@pytest.mark.parametrize(("n_processes", "killed"), [(3, "0"), (2, "1")])
def test_a_killed_process_ends_the_others_with_a_message(class_folders, tmp_path, n_processes, killed):
    flags = tiny_flags(class_folders, tmp_path, "--kernels", 1, "--n_epochs", 9000)
    process = torchrun(n_processes, ROOT / "main.py", *flags)
    log = tmp_path / "tiny" / "run" / "log_val_Class.csv"
    while not log.exists() and process.poll() is None:
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    (victim,) = [pid for pid in children if rank_of(pid) == killed]
    start = time.monotonic()
    os.kill(int(victim), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    while processes_of(f"save_path {tmp_path}") and time.monotonic() - start < 60:  # workers look every 5 s
        time.sleep(0.1)
    assert time.monotonic() - start < 60
    assert process.returncode != 0
    (own,) = own_lines(error)
    assert own.startswith("main.py: stopped")
    command = f"torchrun --standalone --nproc_per_node={n_processes} main.py --resume {log.parent}"
    assert own.endswith(f"go on with: {command}"), error
    assert "Signal 9 (SIGKILL)" in error


def test_no_process_outlives_torchrun(class_folders, tmp_path):
    process = torchrun(2, ROOT / "main.py", *tiny_flags(class_folders, tmp_path, "--n_epochs", 9000))
    log = tmp_path / "tiny" / "run" / "log_val_Class.csv"
    while not log.exists() and process.poll() is None:
        time.sleep(0.1)
    process.kill()
    start = time.monotonic()
    while processes_of(f"save_path {tmp_path}") and time.monotonic() - start < 60:
        time.sleep(0.1)
    assert time.monotonic() - start < 60
    process.communicate()


def test_a_broken_image_in_the_share_of_one_process_is_told_once(class_folders, tmp_path):
    (class_folders / "tiny" / "images" / "class_01" / "4.jpg").write_bytes(b"no image")
    process = run_in_processes(3, run, tiny_flags(class_folders, tmp_path / "runs", "--bs", 6))
    assert process.returncode != 0
    (own,) = own_lines(process.stderr)
    assert own.startswith(f"main.py: error: cannot decode the image {class_folders}/tiny/images/class_01/4.jpg")
    assert not (tmp_path / "runs").exists()


def test_what_all_processes_find_is_told_once(class_folders, tmp_path):
    process = run_in_processes(3, run, tiny_flags(class_folders, tmp_path, "--bs", 4))
    (own,) = own_lines(process.stderr)
    assert own == "main.py: error: --bs 4 is not divisible by the 3 processes that torchrun started"


def test_what_the_first_process_finds_is_told_once(runs):
    with auxiliaries.lock_run_folder(runs[0]):
        process = run_in_processes(2, run, ["--resume", runs[0], "--n_epochs", 2])
    (own,) = own_lines(process.stderr)
    assert "is being trained by process" in own


def test_a_process_that_waits_within_a_library_heeds_a_signal_all_the_same(tmp_path):
    """A receive from a process that never sends does not return to Python."""
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import auxiliaries, evaluate, numpy, torch
with evaluate.one_line_errors("main.py"), auxiliaries.signals_stop(), auxiliaries.process_group():
    with auxiliaries.resumable(None):
        print("ready", flush=True)
        if auxiliaries.is_first_process():
            torch.distributed.recv(torch.zeros(1), 1)
        time.sleep(600)
"""
    (tmp_path / "wait.py").write_text(code)
    process = torchrun(2, tmp_path / "wait.py")
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert own_lines(error)
    assert not processes_of(str(tmp_path / "wait.py"))


def test_stored_runs_are_scored_by_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(auxiliaries, "launched_processes", lambda: 3)
    monkeypatch.setattr(auxiliaries, "may_tell", lambda: True)
    with pytest.raises(SystemExit):
        parse(tmp_path, program=evaluate)
    assert "not with torchrun" in capsys.readouterr().err
