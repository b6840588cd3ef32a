"""Fixtures: small image folders, and a way to run main as a user would."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several test processes on the same cores wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import main


def write_class_folders(root, per_class=(5, 5, 5, 5), size=40):
    """Write root/images/class_i/j.jpg: noise around a colour of the class."""
    rng = np.random.default_rng(0)
    for label, n_images in enumerate(per_class):
        folder = root / "images" / f"class_{label:02d}"
        folder.mkdir(parents=True)
        colour = rng.uniform(60, 190, 3)
        for i in range(n_images):
            pixels = np.clip(colour + rng.normal(0, 25, (size, size + 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
    return root


def assert_equal(one, other, where):
    """Compare nested plain values and tensors bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}: {key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other)):
            assert_equal(a, b, f"{where}, {i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.fixture
def class_folders(tmp_path):
    """A data set "tiny" of 4 classes of 5 images; returns the source path."""
    write_class_folders(tmp_path / "source" / "tiny")
    return tmp_path / "source"


@pytest.fixture
def run_main(tmp_path):
    """Run main with flags, small, with the smaller backbone and random weights; returns the run folder."""

    def run(*flags, not_pretrained=True):
        base = {"--arch": "googlenet", "--img_size": "32", "--bs": "8", "--cs_per_bs": "2 2", "--n_epochs": "2",
                "--kernels": "0", "--lr": "1e-3", "--shared_num_classes": "3", "--cluster_update_freq": "0",
                "--adv_weights": "50", "--savename": "run", "--save_path": str(tmp_path / "results")}  # fmt: skip
        argv = [str(flag) for flag in flags]
        for flag, values in base.items():
            if flag not in argv:
                argv += [flag, *values.split()]
        parser = main.get_args_parser()
        argv += ["--not_pretrained"] if not_pretrained else []
        return main.main(main.check_args(parser.parse_args(argv), parser))

    return run


@pytest.fixture(scope="session")
def shapes():
    """The built-in data set, (train, test)."""
    train, tests = datasets.render_shapes()
    return train, tests[""]
