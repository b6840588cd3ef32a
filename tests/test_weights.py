"""Files of weights and checkpoints: what cannot be used is refused in one line and executes nothing."""

import sys
from pathlib import Path

import pytest
import torch

import netlib
from support import weights
from support.errors import InputError


def refusal(function, *args):
    """Return the one line with which a function refuses its arguments."""
    with pytest.raises(InputError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return Path.mkdir, (self.folder,)


def cut_off(path):
    torch.save({"weight": torch.zeros(100_000)}, path)
    path.write_bytes(path.read_bytes()[:200_000])


def one_bit_off(path):
    torch.save({"weight": torch.zeros(100_000)}, path)
    content = bytearray(path.read_bytes())
    content[200_000] ^= 4
    path.write_bytes(content)


UNUSABLE = {
    "nothing": (lambda path: None, "no such file; give a torchvision state dict"),
    "a folder": (lambda path: path.mkdir(), "is a folder; give a file"),
    "empty": (lambda path: path.touch(), "cannot be read (EOFError); it is damaged or truncated"),
    "bytes": (lambda path: path.write_bytes(b"not a checkpoint"), "cannot be read (UnpicklingError); it is damaged"),
    "cut off": (cut_off, "it is damaged or truncated, or was not written by torch.save"),
    "one bit off": (one_bit_off, "cannot be read (ValueError); it is damaged"),
    "a list": (lambda path: torch.save([1, 2], path), "holds no state dict of tensors"),
    "no tensors": (lambda path: torch.save({}, path), "holds no state dict of tensors"),
    "odd names": (lambda path: torch.save({1: torch.zeros(1)}, path), "holds no state dict of tensors"),
    "odd values": (lambda path: torch.save({"state_dict": {"a": 1}}, path), "holds no state dict of tensors"),
    "a class": (lambda path: torch.save({"a": object}, path), "holds a pickled object (object), which could run code"),
    "a module": (
        lambda path: torch.save(torch.nn.Linear(2, 2), path),
        "holds a pickled object (torch.nn.modules.linear.Linear), which could run code when loaded",
    ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_weights_are_one_line(tmp_path, kind):
    write, message = UNUSABLE[kind]
    write(tmp_path / "weights.pth")
    line = refusal(weights.read_state_dict, tmp_path / "weights.pth")
    assert line.startswith(f"--weights {tmp_path / 'weights.pth'}: ")
    assert message in line


def test_random_bytes_are_one_line(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for i in range(60):
        content = torch.randint(0, 256, ((1, 5, 40, 300)[i % 4],), generator=generator)
        (tmp_path / "random.pth").write_bytes(bytes(content.tolist()))
        refusal(weights.read_state_dict, tmp_path / "random.pth")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "surrogate \udcff"])
def test_names_that_no_file_has(tmp_path, name):
    assert "no such file" in refusal(weights.read_state_dict, tmp_path / name)


@pytest.mark.parametrize("legacy", [True, False])
def test_code_in_a_file_is_not_executed(tmp_path, legacy):
    content = {"weight": torch.zeros(2), "more": Bomb(tmp_path / "exploded")}
    torch.save(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=not legacy)
    assert "holds a pickled object (" in refusal(weights.read_state_dict, tmp_path / "weights.pth")
    assert "holds a pickled object (" in refusal(weights.read_checkpoint, tmp_path / "weights.pth")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("legacy", [True, False])
def test_a_state_dict_by_itself_or_in_a_checkpoint(tmp_path, legacy):
    state = {"weight": torch.arange(6.0).view(2, 3)}
    for content in (state, {"state_dict": state, "format": 1}):
        torch.save(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=not legacy)
        assert (weights.read_state_dict(tmp_path / "weights.pth")["weight"] == state["weight"]).all()


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weights.safetensors"
    safetensors.save_file({"weight": torch.arange(600.0)}, path)
    assert (weights.read_state_dict(path)["weight"] == torch.arange(600.0)).all()
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot be read (" in refusal(weights.read_state_dict, path)


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "weights.safetensors").touch()
    assert "pip install safetensors" in refusal(weights.read_state_dict, tmp_path / "weights.safetensors")


CHECKPOINT = {
    "format": weights.CHECKPOINT_FORMAT,
    "state_dict": {"weight": torch.zeros(2)},
    "flags": {"bs": 8},
    "progress": {"rows": {}, "mined_labels": torch.zeros(1, 2, dtype=torch.uint8)},
    "provenance": [{"a": "b"}],
}


def test_a_checkpoint_is_read_from_a_folder_or_a_file(tmp_path):
    torch.save(CHECKPOINT, tmp_path / "checkpoint.pth.tar")
    torch.save(CHECKPOINT | {"training": {"epoch": 3}}, tmp_path / "last.pth.tar")
    for path in (tmp_path, tmp_path / "checkpoint.pth.tar"):
        assert str(weights.read_checkpoint(path)) == str(CHECKPOINT)
    assert weights.read_checkpoint(tmp_path, "last.pth.tar")["training"] == {"epoch": 3}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1},
        {"format": None},
        {"provenance": 5},
        {"provenance": [3]},
        {"provenance": [{"torch": [1]}]},
        {"progress": CHECKPOINT["progress"] | {"mined_labels": "x"}},
        {"progress": CHECKPOINT["progress"] | {"mined_labels": torch.zeros(3)}},
        {"format": [weights.CHECKPOINT_FORMAT]},
        {"format": torch.ones(2)},
        {"flags": [1]},
        {"progress": None},
        {"training": 5},
        {"state_dict": None},
        {"state_dict": {"weight": 1}},
        {"state_dict": {1: torch.zeros(1)}},
    ],
)
def test_other_files_are_no_checkpoints(tmp_path, change):
    torch.save(CHECKPOINT | change, tmp_path / "checkpoint.pth.tar")
    line = refusal(weights.read_checkpoint, tmp_path)
    assert line == f"{tmp_path}/checkpoint.pth.tar: is not a checkpoint of this version of the program"


@pytest.mark.parametrize("part", ["flags", "progress", "training"])
def test_a_key_that_is_missing_tells_a_checkpoint_of_another_version(tmp_path, part):
    torch.save(CHECKPOINT | {"training": {}}, tmp_path / "checkpoint.pth.tar")
    read = weights.read_checkpoint(tmp_path)[part]
    assert (read.get("absent", 5), type(read | {"absent": 5})) == (5, dict)  # what a checkpoint can hold again
    line = refusal(lambda: read["absent"])
    assert line == f"{tmp_path}/checkpoint.pth.tar: is not a checkpoint of this version of the program"


def test_lists_state_dicts_and_parts_are_no_checkpoints(tmp_path):
    for content in ([1], CHECKPOINT["state_dict"], {"format": weights.CHECKPOINT_FORMAT}):
        torch.save(content, tmp_path / "checkpoint.pth.tar")
        assert "is not a checkpoint of this version" in refusal(weights.read_checkpoint, tmp_path)


def test_a_folder_without_the_checkpoint_names_those_it_has(tmp_path):
    assert refusal(weights.read_checkpoint, tmp_path / "absent").endswith(
        "absent: no such run folder or checkpoint file"
    )
    assert refusal(weights.read_checkpoint, tmp_path).endswith("it holds no checkpoint (*.pth.tar) at all")
    for name in ("last.pth.tar", "checkpoint_set1.pth.tar"):
        (tmp_path / name).touch()
    assert refusal(weights.read_checkpoint, tmp_path) == (
        f"{tmp_path}: no checkpoint.pth.tar in this folder; name one of its checkpoints: checkpoint_set1.pth.tar, "
        "last.pth.tar"
    )


@pytest.fixture
def torch_cache(tmp_path, monkeypatch):
    """An empty cache of downloads, behind a proxy that nothing answers at; returns its folder of weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def pretrained(arch):
    return netlib.build_network(arch, {"Class": 4}, pretrained=True, freeze_batchnorm=True)


def test_failed_download_says_what_to_do(torch_cache):
    line = refusal(pretrained, "resnet50")
    assert line.startswith("cannot get the pretrained resnet50 weights (")
    assert line.endswith("--weights FILE, or train from random weights with --not_pretrained")


FILES = {"resnet50": "resnet50-0676ba61.pth", "googlenet": "googlenet-1378be20.pth"}
"""torchvision's first weights, which the published runs started from."""


@pytest.mark.parametrize("arch", FILES)
def test_pretrained_weights_are_torchvisions_first(torch_cache, arch):
    network = netlib.BACKBONES[arch]()
    torch.save(network.layers.state_dict(), torch_cache / FILES[arch])
    built = pretrained(arch).backbone.layers.state_dict()
    assert all((built[name] == values).all() for name, values in network.layers.state_dict().items())


@pytest.mark.parametrize("kind", ["truncated", "with code"])
def test_a_damaged_file_in_the_cache_is_to_be_deleted(torch_cache, kind):
    path = torch_cache / FILES["resnet50"]
    torch.save({"x": Bomb(torch_cache / "exploded")}, path)
    if kind == "truncated":
        cut_off(path)
    line = refusal(pretrained, "resnet50")
    assert line.startswith("cannot get the pretrained resnet50 weights (")
    assert "delete a damaged file from the cache of torch or Hugging Face, pass one with --weights FILE" in line
    assert not (torch_cache / "exploded").exists()
