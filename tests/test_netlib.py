"""The network against layers composed by hand, BatchNorm policy, building it from weights, loading it from a run."""

import functools

import pytest
import torch
import torchvision
from conftest import images
from torch.nn.functional import avg_pool2d, linear, normalize

import netlib
from support import weights
from support.errors import InputError

SIZES = {"Class": 8, "Shared": 6}


def assert_same_outputs(one, other, outputs=("Class", "Shared")):
    with torch.no_grad():
        expected = other(images(32), outputs)
        for name, values in one(images(32), outputs).items():
            torch.testing.assert_close(values, expected[name], rtol=0, atol=0)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return netlib.build_network("resnet50", SIZES, pretrained=False, freeze_batchnorm=False).eval()


@pytest.fixture(scope="module")
def reference(network):
    """torchvision's network with the same weights, and ImageNet normalisation written out."""
    net = torchvision.models.resnet50(weights=None).eval()
    net.fc = torch.nn.Identity()
    net.load_state_dict(network.backbone.layers.state_dict())
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return net, lambda batch: (batch / 255 - mean[:, None, None]) / std[:, None, None]


@torch.no_grad()
def test_forward_is_torchvision_with_two_heads(network, reference):
    net, normalised = reference
    pooled = net(normalised(images(64)))
    outputs = network(images(64), ["Pooled", "Class", "Shared"])
    torch.testing.assert_close(outputs["Pooled"], pooled, rtol=1e-3, atol=1e-4)
    for task, head in network.heads.items():
        expected = normalize(linear(pooled, head.weight, head.bias), dim=1)
        torch.testing.assert_close(outputs[task], expected, rtol=1e-3, atol=1e-5)
        assert outputs[task].shape == (2, SIZES[task])


@torch.no_grad()
def test_outputs_are_those_asked_for_in_order(network):
    assert list(network(images(32))) == ["Class", "Shared"]
    for outputs in (["Shared"], ["Pooled", "Class"], ["Shared", "Early", "Class"], ["Early"]):
        assert list(network(images(32), outputs)) == outputs


@torch.no_grad()
def test_early_features_are_published_pooling_of_the_first_stage(network, reference):
    net, normalised = reference
    maps = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(normalised(images(224)))))))
    expected = normalize(avg_pool2d(maps, 18, 12).flatten(1), dim=1)
    early = network(images(224), ["Early"])["Early"]
    assert early.shape == (2, 4096)
    torch.testing.assert_close(early, expected, rtol=1e-3, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 64, 128])
def test_early_features_have_a_4x4_grid_at_any_size(network, size):
    early = network(images(size), ["Early"])["Early"]
    assert early.shape == (2, 4096)
    torch.testing.assert_close(early.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batchnorm_keeps_every_statistic_and_trains_every_scale_and_shift(frozen):
    torch.manual_seed(0)
    network = netlib.build_network("resnet50", SIZES, pretrained=False, freeze_batchnorm=frozen)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    layers = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    before = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in layers]
    network.train()
    for _ in range(2):  # a branch begins to train in the second step, once its last scale is not zero
        optimizer.zero_grad()
        network(images(32, n=4))["Class"][:, 0].sum().backward()
        optimizer.step()
    assert len(layers) == 53
    for layer, was in zip(layers, before):
        kept = {name for name, value in layer.state_dict().items() if torch.equal(value, was[name])}
        assert kept == ({"running_mean", "running_var", "num_batches_tracked"} if frozen else set())


def test_a_detached_head_trains_alone():
    torch.manual_seed(0)
    network = netlib.build_network(
        "googlenet", SIZES, pretrained=False, freeze_batchnorm=True, detached_heads=["Shared"]
    )
    for task, reaches_backbone in (("Shared", False), ("Class", True)):
        network.zero_grad()
        network(images(32))[task][:, 0].sum().backward()
        assert network.heads[task].weight.grad.abs().sum() > 0
        gradients = [parameter.grad for parameter in network.backbone.parameters()]
        assert any(gradient is not None for gradient in gradients) == reaches_backbone


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_embeddings_are_float32_in_any_precision(network, amp):
    found, network.amp = [], amp
    network.backbone.register_forward_hook(lambda *call: found.append(call[2][1].dtype))
    with torch.no_grad():
        outputs = network(images(32), ["Class", "Pooled", "Early"])
    assert all(values.dtype == torch.float32 for values in outputs.values())
    torch.testing.assert_close(outputs["Class"].norm(dim=1), torch.ones(2))
    assert found == [torch.bfloat16 if amp == "bf16" else torch.float32]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # a caller's own
        assert network(images(32))["Class"].dtype == torch.float32
    assert found[1] == torch.bfloat16


def test_images_that_are_not_uint8_rgb_are_refused(network):
    for batch in (torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 32, 32, dtype=torch.uint8)):
        with pytest.raises(TypeError, match="uint8 RGB; got"):
            network(batch)


class Tiny(torch.nn.Module):
    """The least that is a backbone."""

    out_features = 4

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())

    def forward(self, batch, with_pooled=True):
        maps = self.layers(batch)
        return maps, maps.mean((2, 3)) if with_pooled else None


def test_one_process_trains_the_network_itself():
    network = netlib.EmbeddingNetwork(Tiny(), SIZES, freeze_batchnorm=False)
    assert netlib.for_training(network, compiled=False, has_unused_heads=True) is network


def test_compiled_network_computes_the_same_and_shares_its_weights(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # C++ takes a minute
    torch.manual_seed(0)
    network = netlib.EmbeddingNetwork(Tiny(), SIZES, freeze_batchnorm=True)
    compiled = netlib.for_training(network, compiled=True, has_unused_heads=False)
    compiled.train()
    assert network.training
    assert not network.backbone.layers[1].training
    outputs, expected = compiled(images(32, n=4)), network(images(32, n=4))
    for name, values in outputs.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-5)
    outputs["Class"][:, 0].sum().backward()
    assert network.backbone.layers[0].weight.grad.any()
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def small():
    """A GoogLeNet with heads, and what a checkpoint of it holds."""
    torch.manual_seed(2)
    network = netlib.build_network("googlenet", SIZES, pretrained=False, freeze_batchnorm=False).eval()
    stored = {"format": weights.CHECKPOINT_FORMAT, "provenance": [], "progress": {}}
    stored["flags"] = {"arch": "googlenet", "img_size": 32, "bn": "train"}
    return network, stored | {"state_dict": network.state_dict()}


def start_from(path, sizes=SIZES, arch="googlenet"):
    torch.manual_seed(3)
    return netlib.build_network(arch, sizes, pretrained=True, weights_file=path, freeze_batchnorm=True).eval()


def test_torchvisions_weights_are_taken_without_classifier(tmp_path, capsys):
    torch.manual_seed(5)
    state = torchvision.models.resnet50(weights=None).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    loaded = start_from(tmp_path / "weights.pth", arch="resnet50").backbone.layers.state_dict()
    assert set(state) - set(loaded) == {"fc.weight", "fc.bias"}
    assert all((state[name] == values).all() for name, values in loaded.items())
    assert capsys.readouterr().out == ""


def test_a_checkpoint_as_weights_brings_its_heads(small, tmp_path, capsys):
    network, stored = small
    torch.save(stored, tmp_path / "checkpoint.pth.tar")
    assert_same_outputs(start_from(tmp_path / "checkpoint.pth.tar"), network)
    assert capsys.readouterr().out == ""


def test_heads_of_another_size_start_at_random_and_say_so(small, tmp_path, caplog):
    network, stored = small
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(stored, path)
    other = start_from(path, SIZES | {"Shared": 7})
    assert caplog.messages == [f"--weights {path}: has no Shared head of size 7; it starts at random"]
    assert_same_outputs(other, network, ["Class", "Pooled"])
    assert other(images(32))["Shared"].shape == (2, 7)
    backbone = {name: values for name, values in stored["state_dict"].items() if name.startswith(netlib.PREFIX)}
    torch.save(backbone, path)
    assert_same_outputs(start_from(path), network, ["Pooled"])
    assert "no Class head of size 8" in caplog.text


def test_counters_of_batches_may_be_missing(small, tmp_path):
    path, state = tmp_path / "checkpoint.pth.tar", small[1]["state_dict"]
    torch.save({name: values for name, values in state.items() if not name.endswith("num_batches_tracked")}, path)
    assert_same_outputs(start_from(path), small[0])


OTHERS = {
    "checkpoint of GoogLeNet": (
        "resnet50",
        lambda stored: stored,
        r"Missing key.*conv1.weight.*; Unexpected key.*conv2",
    ),
    "ResNet18": (
        "resnet50",
        lambda _: torchvision.models.resnet18(weights=None).state_dict(),
        r"Missing key.*layer1.0.conv3.weight.*; size mismatch for backbone.layers.layer1.0.conv1.w",
    ),
    "checkpoint without a layer": (
        "googlenet",
        lambda stored: {name: values for name, values in stored["state_dict"].items() if "conv3" not in name},
        r"\(Missing key.*: .backbone.layers.conv3.conv.",
    ),
    "one more": (
        "googlenet",
        lambda stored: stored["state_dict"] | {"conv9.weight": torch.zeros(1)},
        r"\(Unexpected key.*conv9.weight",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_weights_of_something_else_are_one_line(small, tmp_path, kind):
    arch, change, message = OTHERS[kind]
    torch.save(change(small[1]), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=rf"^--weights {tmp_path}/weights.pth: not the weights of {arch} \(") as error:
        start_from(tmp_path / "weights.pth", arch=arch)
    error.match(message)
    assert "\n" not in str(error.value)


def test_load_gives_the_stored_network_from_a_folder_or_a_file(small, tmp_path):
    network, stored = small
    torch.save(stored, tmp_path / "checkpoint_set2.pth.tar")
    for loaded in (netlib.load(tmp_path, "checkpoint_set2.pth.tar"), netlib.load(tmp_path / "checkpoint_set2.pth.tar")):
        assert not any(module.training for module in loaded.modules())
        assert list(loaded(images(32))) == ["Class", "Shared"]
        assert_same_outputs(loaded, network)
    with pytest.raises(InputError, match="no checkpoint.pth.tar .* checkpoints: checkpoint_set2.pth.tar"):
        netlib.load(tmp_path)


def changed_flags(**flags):
    return lambda stored: stored | {"flags": stored["flags"] | flags}


def changed_state(*without, **changes):
    return lambda stored: (
        stored | {"state_dict": {k: v for k, v in stored["state_dict"].items() if k not in without} | changes}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_flags(arch="resnet50"), "not the weights of resnet50 .Missing .*backbone.layers.conv1.weight"),
        (changed_flags(arch="vgg"), "its flags or heads are not those of a run"),
        (changed_flags(arch=["googlenet"]), "its flags or heads are not those of a run"),
        (lambda stored: stored | {"flags": {"arch": "googlenet"}}, "is not a checkpoint of this version"),
        (changed_state("heads.Shared.bias"), "Missing .*: .heads.Shared.bias"),
        (changed_state("backbone.layers.conv1.bn.running_mean"), "Missing .*: .backbone.layers.conv1.bn.running_mean"),
        (changed_state(**{"heads.Class.bias": torch.zeros(9)}), "size mismatch for heads.Class.weight"),
        (changed_state(**{"heads.Class.bias": torch.tensor(1.0)}), "its flags or heads are not those of a run"),
        (changed_state(**{"heads..bias": torch.zeros(9)}), "its flags or heads are not those of a run"),
        (lambda stored: stored | {"extra": object}, r"holds a pickled object \(object\)"),
    ],
)
def test_load_says_what_is_wrong_in_one_line(small, tmp_path, change, message):
    torch.save(change(small[1]), tmp_path / "checkpoint.pth.tar")
    with pytest.raises(InputError, match=message) as error:
        netlib.load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'checkpoint.pth.tar'}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(tmp_path))
