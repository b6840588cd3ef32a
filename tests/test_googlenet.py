"""GoogLeNet as a backbone against torchvision's layers composed by hand."""

import pytest
import torch
import torchvision
from conftest import images
from torch.nn.functional import avg_pool2d, normalize

import netlib

STEM = ["conv1", "maxpool1", "conv2", "conv3"]
REST = [
    "maxpool2", "inception3a", "inception3b", "maxpool3", "inception4a", "inception4b", "inception4c", "inception4d",
    "inception4e", "maxpool4", "inception5a", "inception5b",
]  # fmt: skip


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    sizes = {"Class": 8, "Shared": 6}
    return netlib.build_network("googlenet", sizes, pretrained=False, freeze_batchnorm=True).eval()


@pytest.fixture(scope="module")
def reference(network):
    """torchvision's network as its pretrained weights come, with the input transform, and ours' weights."""
    net = torchvision.models.GoogLeNet(aux_logits=False, transform_input=True, init_weights=False).eval()
    net.fc = torch.nn.Identity()
    net.load_state_dict(network.backbone.layers.state_dict())
    return net


def through(net, names, maps):
    for name in names:
        maps = getattr(net, name)(maps)
    return maps


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 64, 100])
def test_pooled_features_are_torchvisions_layers_on_pixels_from_minus_1_to_1(network, reference, size):
    expected = through(reference, STEM + REST, images(size) / 127.5 - 1).mean((2, 3))
    pooled = network(images(size), ["Pooled"])["Pooled"]
    assert pooled.shape == (2, 1024)
    torch.testing.assert_close(pooled, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_normalised_images_give_what_torchvision_gives_with_its_input_transform(network, reference):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (images(64) / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(network(images(64), ["Pooled"])["Pooled"], reference(normalised), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_early_features_are_pooled_maps_of_conv3(network, reference):
    maps = through(reference, STEM, images(224) / 127.5 - 1)
    expected = normalize(avg_pool2d(maps, 18, 12).flatten(1), dim=1)
    early = network(images(224), ["Early"])["Early"]
    assert early.shape == (2, 3072)
    torch.testing.assert_close(early, expected, rtol=1e-3, atol=1e-6)
    assert network(images(64), ["Early"])["Early"].shape == (2, 3072)


@torch.no_grad()
def test_training_mode_has_no_dropout(network):
    network.train()
    first, second = network(images(32)), network(images(32))
    network.eval()
    assert all((first[task] == second[task]).all() for task in first)


@torch.no_grad()
def test_random_weights_tell_images_apart_before_batchnorm_has_seen_any(network):
    pooled = network(images(64, n=4), ["Pooled"])["Pooled"]
    assert pooled.std(0).mean() > 0.01


def test_weights_with_classifiers_are_taken_without_them(tmp_path):
    torch.manual_seed(1)
    state = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False).state_dict()
    torch.save(state, tmp_path / "googlenet.pth")
    built = netlib.build_network(
        "googlenet", {"Class": 8}, pretrained=True, weights_file=tmp_path / "googlenet.pth", freeze_batchnorm=True
    )
    loaded = built.backbone.layers.state_dict()
    assert {name for name in state if name not in loaded} == {
        name for name in state if name.split(".")[0] in ("fc", "aux1", "aux2")
    }
    assert all((state[name] == value).all() for name, value in loaded.items())
