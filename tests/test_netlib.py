"""The network against layers composed by hand, BatchNorm policy and weights."""

import pytest
import torch
import torchvision
from torch.nn.functional import avg_pool2d, linear, normalize

import netlib

SIZES = {"Class": 8, "Shared": 6}


def images(size, n=2):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


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
    assert set(network(images(32))) == {"Class", "Shared"}


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
def test_batchnorm_policy(frozen):
    network = netlib.build_network("resnet50", SIZES, pretrained=False, freeze_batchnorm=frozen)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    layer = network.backbone.layers.bn1
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    network.train()
    network(images(32, n=4))["Class"][:, 0].sum().backward()
    optimizer.step()
    after = layer.state_dict()
    assert (after["running_mean"] == before["running_mean"]).all() == frozen
    assert (after["running_var"] == before["running_var"]).all() == frozen
    assert (after["weight"] != before["weight"]).any()
    assert (after["bias"] != before["bias"]).any()


def test_autocast_gives_float32_embeddings(network):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = network(images(32), ["Class", "Pooled", "Early"])
    assert all(values.dtype == torch.float32 for values in outputs.values())
    torch.testing.assert_close(outputs["Class"].norm(dim=1), torch.ones(2))


def save_state(path, change=lambda state: state):
    torch.manual_seed(5)
    state = torchvision.models.resnet50(weights=None).state_dict()
    torch.save(change(state), path)
    return state


def build_from(path):
    return netlib.build_network("resnet50", SIZES, pretrained=True, weights_file=path, freeze_batchnorm=True)


def test_weights_file_is_loaded(tmp_path):
    state = save_state(tmp_path / "weights.pth")
    loaded = build_from(tmp_path / "weights.pth").backbone.layers.state_dict()
    assert all((loaded[name] == value).all() for name, value in state.items() if not name.startswith("fc."))


def test_random_bytes_are_refused_in_one_line(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for size in (1, 5, 40, 300) * 5:
        path = tmp_path / "random.pth"
        path.write_bytes(bytes(torch.randint(0, 256, (size,), generator=generator).tolist()))
        with pytest.raises(netlib.WeightsError) as error:
            build_from(path)
        assert "\n" not in str(error.value)


def test_a_damaged_download_is_to_be_deleted(monkeypatch):
    def damaged():
        raise EOFError

    monkeypatch.setattr(netlib.ResNet50, "download", staticmethod(damaged))
    with pytest.raises(netlib.WeightsError, match="delete the damaged file in .*checkpoints"):
        netlib.build_network("resnet50", SIZES, pretrained=True, freeze_batchnorm=True)


def test_unusable_weights_are_named(tmp_path):
    with pytest.raises(netlib.WeightsError, match="no such file"):
        build_from(tmp_path / "missing.pth")
    path = tmp_path / "weights.pth"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(netlib.WeightsError, match="cannot be read"):
        build_from(path)
    save_state(path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(netlib.WeightsError, match="cannot be read"):
        build_from(path)
    torch.save([1, 2], path)
    with pytest.raises(netlib.WeightsError, match="no state dict"):
        build_from(path)
    torch.save({"conv1.weight": object}, path)
    with pytest.raises(netlib.WeightsError, match="cannot be read"):
        build_from(path)
    torch.save({1: torch.zeros(1)}, path)
    with pytest.raises(netlib.WeightsError, match="no state dict"):
        build_from(path)
    save_state(path, lambda state: state | {"conv1.weight": state["conv1.weight"].to_sparse()})
    with pytest.raises(netlib.WeightsError, match="1 of another shape or type: conv1.weight"):
        build_from(path)
    with pytest.raises(netlib.WeightsError, match="cannot be read"):
        build_from(tmp_path / ("x" * 300))
    save_state(path, lambda state: {name: value for name, value in state.items() if name != "conv1.weight"})
    with pytest.raises(netlib.WeightsError, match="1 missing: conv1.weight"):
        build_from(path)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    with pytest.raises(netlib.WeightsError, match="not the weights of torchvision's resnet50"):
        build_from(path)


def test_failed_download_says_what_to_do(monkeypatch):
    def refuse():
        raise OSError("no route")

    monkeypatch.setattr(netlib.ResNet50, "download", staticmethod(refuse))
    with pytest.raises(netlib.WeightsError, match="--weights FILE, or train from random weights with --not_pretrained"):
        netlib.build_network("resnet50", SIZES, pretrained=True, freeze_batchnorm=True)


def test_pretrained_weights_are_those_of_the_first_release(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torchvision.models.ResNet50_Weights, "get_state_dict", lambda self, **options: asked.append((self, options))
    )
    netlib.ResNet50.download()
    weights, options = asked[0]
    assert weights is torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    assert options["check_hash"]
