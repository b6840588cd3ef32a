"""Seeds and random states, device, k-means, and what sums losses and time."""

import os
import random
import re
import tempfile
import time

import numpy as np
import pytest
import torch

import auxiliaries
from support.errors import DivergedError, InputError

CPU = torch.device("cpu")


def draw():
    """Return one number of each generator, and an odd number of normal ones, of which numpy and Python keep a spare."""
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), torch.rand(1).item()


def test_seeds_repeat_all_generators():
    auxiliaries.set_seeds(3)
    first = draw()
    auxiliaries.set_seeds(3)
    assert draw() == first
    auxiliaries.set_seeds(4)
    assert all(a != b for a, b in zip(draw(), first))
    auxiliaries.set_seeds(2**63 - 1)


def test_random_states_continue_all_generators_after_a_file(tmp_path):
    auxiliaries.set_seeds(3)
    draw()
    torch.save(auxiliaries.random_states(CPU), tmp_path / "states")
    following = draw()
    auxiliaries.set_seeds(4)
    auxiliaries.set_random_states(torch.load(tmp_path / "states", weights_only=True), CPU)
    assert draw() == following


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_states_continue_on_the_gpu():
    device = torch.device("cuda", 0)
    states = auxiliaries.random_states(device)
    following = torch.rand(3, device=device)
    auxiliaries.set_random_states(states, device)
    assert (torch.rand(3, device=device) == following).all()


def test_device_is_the_one_asked_for(caplog):
    if not torch.cuda.is_available():
        assert auxiliaries.pick_device(0) == CPU
        assert re.fullmatch(r"device: CPU \(.+\)", caplog.messages[-1])
        return
    assert auxiliaries.pick_device(0) == torch.device("cuda", 0)
    with pytest.raises(InputError, match=r"--gpu 99: this machine has \d+ GPU"):
        auxiliaries.pick_device(99)


def test_float32_products_are_not_rounded_unless_asked_for():
    auxiliaries.set_precision(CPU, False, "none")
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("n_processes", "expected"), [(1, [0, 1, 8, 64]), (8, [0, 1, 8, 8]), (100, [0, 1, 1, 1])])
def test_each_process_has_the_workers_that_are_asked_for_up_to_its_share_of_the_cores(
    n_processes, expected, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(n_processes))
    assert [auxiliaries.n_workers(n) for n in (0, 1, 8, 100_000)] == expected
    monkeypatch.setattr(tempfile, "tempdir", "/scratch/" + "x" * 70)
    assert auxiliaries.n_workers(0) == 0
    with pytest.raises(InputError, match="--kernels 2: TMPDIR is too long a name for loader workers"):
        auxiliaries.n_workers(2)


def test_kmeans_uses_all_points():
    rng = np.random.default_rng(0)
    centres = 10 * rng.normal(size=(4, 8))
    truth = np.repeat(np.arange(4), [300, 400, 350, 2000])
    points = (centres[truth] + 0.1 * rng.normal(size=(len(truth), 8))).astype(np.float32)
    labels, squared_distances = auxiliaries.kmeans(points, 4, seed=0)
    assert labels.dtype == np.int64
    assert sorted(np.unique(labels)) == [0, 1, 2, 3]
    # With every point taking part the centres are the exact means of the clusters; faiss's default would subsample
    centres = np.stack([points[labels == c].mean(0, dtype=np.float64) for c in range(4)])
    np.testing.assert_allclose(squared_distances, ((points - centres[labels]) ** 2).sum(1), rtol=1e-2, atol=1e-3)
    assert squared_distances.sum() == pytest.approx(((points - centres[labels]) ** 2).sum(), rel=1e-4)


def test_kmeans_repeats_with_its_seed():
    points = np.random.default_rng(0).normal(size=(500, 16))
    first, _ = auxiliaries.kmeans(points, 20, seed=1)
    again, _ = auxiliaries.kmeans(points.astype(np.float32), 20, seed=1)
    other, _ = auxiliaries.kmeans(points, 20, seed=2)
    assert (first == again).all()
    assert (first != other).any()
    auxiliaries.kmeans(points, 2, seed=2**63 - 1)


def test_kmeans_of_duplicates_and_of_as_many_clusters_as_points():
    labels, _ = auxiliaries.kmeans(np.ones((50, 4)), 5, seed=0)
    assert labels.shape == (50,)
    assert ((labels >= 0) & (labels < 5)).all()
    points = np.random.default_rng(0).normal(size=(12, 4))
    labels, squared_distances = auxiliaries.kmeans(points, 12, seed=0)
    assert len(set(labels)) == 12
    np.testing.assert_allclose(squared_distances, 0, atol=1e-5)


def test_losses_are_summed_by_term():
    meter = auxiliaries.LossMeter()
    assert meter.read() == {}
    meter.add("at iteration 0", {"Class": torch.tensor(1.0, requires_grad=True), "Class-Shared": torch.tensor(-0.25)})
    meter.add("at iteration 0", {"Shared": torch.tensor(4.0)})
    assert meter.sums == {}
    assert meter.read() == {"Class": "1", "Class-Shared": "-0.25", "Shared": "4"}
    meter.add("at iteration 1", {"Class": torch.tensor(2.0)})
    assert meter.read()["Class"] == "1.5"
    assert (meter.sums, meter.counts) == (
        {"Class": 3.0, "Class-Shared": -0.25, "Shared": 4.0},
        {"Class": 2, "Class-Shared": 1, "Shared": 1},
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_is_named_with_its_place(value):
    meter = auxiliaries.LossMeter()
    meter.add("at iteration 6 (Class step)", {"Class": torch.tensor(1.0)})
    meter.add("at iteration 7 (Shared step)", {"Shared": torch.tensor(1.0), "Class-Shared": torch.tensor(value)})
    meter.add("at iteration 8 (Class step)", {"Class": torch.tensor(value)})
    message = f"the Class-Shared loss is {value} at iteration 7 \\(Shared step\\): training has diverged"
    with pytest.raises(DivergedError, match=message):
        meter.read()


@pytest.fixture
def wait(monkeypatch):
    """Let time pass: a function that moves the clock by seconds; it stands still otherwise."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_time_within_time_counts_once(wait):
    def slow_batches():
        for batch in ("first", "second"):
            wait(1)
            yield batch

    stopwatch = auxiliaries.Stopwatch()
    with stopwatch.measure("training"):
        for _ in stopwatch.loading(slow_batches()):
            wait(10)
        with stopwatch.measure("drawing"):
            wait(100)
        wait(1000)
    wait(10_000)  # for nothing
    expected = {"loading": 2, "training": 1020, "drawing": 100}
    assert stopwatch.seconds == dict.fromkeys(stopwatch.seconds, 0) | expected
    assert {"mining", "evaluation"} <= set(stopwatch.seconds)


def test_time_counts_after_an_error_and_where_loading_was_left(wait):
    stopwatch = auxiliaries.Stopwatch()
    with pytest.raises(RuntimeError), stopwatch.measure("mining"), stopwatch.measure("drawing"):  # noqa: PT012
        wait(1)
        raise RuntimeError
    with stopwatch.measure("training"):
        assert next(stopwatch.loading(["batch"])) == "batch"
        wait(10)
    assert stopwatch.running is None
    assert stopwatch.seconds == dict.fromkeys(stopwatch.seconds, 0) | {"drawing": 1, "training": 10}
