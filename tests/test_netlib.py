"""The network against layers composed by hand, BatchNorm policy and weights."""

import functools
import sys
from pathlib import Path

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


def test_a_damaged_download_is_to_be_deleted(monkeypatch, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "exploded",)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth"
    cache.parent.mkdir(parents=True)
    torch.save({"x": Bomb()}, cache)
    with pytest.raises(netlib.WeightsError, match=f"the checksum is wrong.*delete the damaged file {cache}"):
        netlib.build_network("resnet50", SIZES, pretrained=True, freeze_batchnorm=True)
    monkeypatch.setattr(netlib, "checksum", lambda name: "")
    with pytest.raises(netlib.WeightsError, match=f"delete the damaged file {cache}"):
        netlib.build_network("resnet50", SIZES, pretrained=True, freeze_batchnorm=True)
    assert not (tmp_path / "exploded").exists()


def test_images_that_are_not_uint8_rgb_are_refused(network):
    for images in (torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 32, 32, dtype=torch.uint8)):
        with pytest.raises(TypeError, match="uint8 RGB; got"):
            network(images)


def spoil(change):
    """Return a writer of a changed ResNet50 state dict."""
    return lambda path: save_state(path, change)


def cut_off(path):
    save_state(path)
    path.write_bytes(path.read_bytes()[:100_000])


UNUSABLE = {
    "nothing": (lambda path: None, "no such file"),
    "a folder": (lambda path: path.mkdir(), "is a folder; name a file in it"),
    "bytes": (lambda path: path.write_bytes(b"not a checkpoint"), "cannot be read .*damaged or truncated"),
    "cut off": (cut_off, "cannot be read .*damaged or truncated"),
    "a list": (lambda path: torch.save([1, 2], path), "no state dict"),
    "no tensors": (lambda path: torch.save({}, path), "no state dict"),
    "a class": (lambda path: torch.save({"conv1.weight": object}, path), r"holds a pickled object \(object\)"),
    "a module": (
        lambda path: torch.save(torch.nn.Linear(2, 2), path),
        r"pickled object \(torch.nn.modules.linear.Linear\)",
    ),
    "odd names": (lambda path: torch.save({1: torch.zeros(1)}, path), "no state dict"),
    "sparse": (
        spoil(lambda state: state | {"conv1.weight": state["conv1.weight"].to_sparse()}),
        "1 of another shape or type: conv1.weight",
    ),
    "one missing": (
        spoil(lambda state: {name: value for name, value in state.items() if name != "conv1.weight"}),
        r"not the weights of torchvision's resnet50 \(1 missing: conv1.weight\)",
    ),
    "one more": (spoil(lambda state: state | {"conv9.weight": torch.zeros(1)}), r"\(1 unexpected: conv9.weight\)"),
    "resnet18": (
        lambda path: torch.save(torchvision.models.resnet18(weights=None).state_dict(), path),
        "not the weights of torchvision's resnet50 .* missing: .*of another shape",
    ),
    "googlenet": (
        lambda path: torch.save(torchvision.models.googlenet(aux_logits=True, init_weights=False).state_dict(), path),
        "these are the weights of googlenet, not of resnet50; --arch googlenet",
    ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_weights_are_told_in_one_line(tmp_path, kind):
    write, message = UNUSABLE[kind]
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(netlib.WeightsError, match=message) as error:
        build_from(path)
    assert str(error.value).startswith(f"--weights {path}: ")
    assert "\n" not in str(error.value)


def test_a_file_name_that_cannot_be(tmp_path):
    with pytest.raises(netlib.WeightsError, match="no such file"):
        build_from(tmp_path / ("x" * 300))


def test_weights_of_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "weights.safetensors"
    state = save_state(tmp_path / "weights.pth")
    safetensors.save_file(state, path)
    loaded = build_from(path).backbone.layers.state_dict()
    assert all((loaded[name] == value).all() for name, value in state.items() if not name.startswith("fc."))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(netlib.WeightsError, match="cannot be read"):
        build_from(path)


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(netlib.WeightsError, match="pip install safetensors"):
        build_from(tmp_path / "weights.safetensors")


def test_failed_download_says_what_to_do(monkeypatch):
    def refuse(self, **options):
        raise OSError("no route")

    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", refuse)
    with pytest.raises(netlib.WeightsError, match="--weights FILE, or train from random weights with --not_pretrained"):
        netlib.build_network("resnet50", SIZES, pretrained=True, freeze_batchnorm=True)


@pytest.mark.parametrize(("arch", "name"), [("resnet50", "ResNet50_Weights"), ("googlenet", "GoogLeNet_Weights")])
def test_pretrained_weights_are_torchvisions_first_checked_and_without_code(arch, name, monkeypatch):
    asked, kind = [], getattr(torchvision.models, name)
    monkeypatch.setattr(kind, "get_state_dict", lambda self, **options: asked.append((self, options)))
    netlib.download_weights(netlib.BACKBONES[arch], arch)
    weights, options = asked[0]
    assert weights is kind.IMAGENET1K_V1
    assert options == {"progress": True, "check_hash": True, "weights_only": True}


@pytest.fixture(scope="module")
def small():
    """A GoogLeNet with heads, and what a checkpoint of it holds."""
    torch.manual_seed(2)
    network = netlib.build_network("googlenet", SIZES, pretrained=False, freeze_batchnorm=False).eval()
    flags = {"arch": "googlenet", "embed_sizes": [8, 6], "bn": "train"}
    return network, {"state_dict": network.state_dict(), "flags": flags, "progress": {}}


def start_from(path, sizes):
    torch.manual_seed(3)
    return netlib.build_network("googlenet", sizes, pretrained=True, weights_file=path, freeze_batchnorm=True).eval()


@torch.no_grad()
def test_a_checkpoint_as_weights_brings_its_heads(small, tmp_path, capsys):
    network, stored = small
    torch.save(stored, tmp_path / "checkpoint.pth.tar")
    again = start_from(tmp_path / "checkpoint.pth.tar", SIZES)
    for name, values in network(images(32)).items():
        torch.testing.assert_close(again(images(32))[name], values, rtol=0, atol=0)
    assert capsys.readouterr().out == ""


@torch.no_grad()
def test_only_heads_may_be_missing_from_a_checkpoint(small, tmp_path, capsys):
    network, stored = small
    torch.save(stored, tmp_path / "checkpoint.pth.tar")
    other = start_from(tmp_path / "checkpoint.pth.tar", SIZES | {"Shared": 7})
    assert capsys.readouterr().out.endswith("has no Shared head of size 7; it starts at random\n")
    outputs = other(images(32), ["Class", "Pooled", "Shared"])
    for name, values in network(images(32), ["Class", "Pooled"]).items():
        torch.testing.assert_close(outputs[name], values, rtol=0, atol=0)
    assert outputs["Shared"].shape == (2, 7)
    state = {name: value for name, value in stored["state_dict"].items() if "conv3" not in name}
    torch.save(stored | {"state_dict": state}, tmp_path / "checkpoint.pth.tar")
    with pytest.raises(netlib.WeightsError, match="5 missing: conv3.conv.weight, conv3.bn.weight, conv3.bn.bias, ..."):
        start_from(tmp_path / "checkpoint.pth.tar", SIZES)


def test_a_checkpoint_of_the_other_architecture_as_weights(small, tmp_path):
    torch.save(small[1], tmp_path / "checkpoint.pth.tar")
    with pytest.raises(netlib.WeightsError, match="these are the weights of googlenet, not of resnet50"):
        build_from(tmp_path / "checkpoint.pth.tar")


@torch.no_grad()
def test_load_gives_the_stored_network_from_a_folder_or_a_file(small, tmp_path):
    network, stored = small
    torch.save(stored, tmp_path / "checkpoint_set2.pth.tar")
    for loaded in (netlib.load(tmp_path, "checkpoint_set2.pth.tar"), netlib.load(tmp_path / "checkpoint_set2.pth.tar")):
        assert not any(module.training for module in loaded.modules())
        outputs = loaded(images(32))
        assert set(outputs) == {"Class", "Shared"}
        for name, values in network(images(32)).items():
            torch.testing.assert_close(outputs[name], values, rtol=0, atol=0)
    with pytest.raises(netlib.WeightsError, match="no checkpoint.pth.tar .* checkpoints: checkpoint_set2.pth.tar"):
        netlib.load(tmp_path)


def changed_flags(**flags):
    return lambda stored: stored | {"flags": stored["flags"] | flags}


def without(*keys):
    return lambda stored: stored | {"state_dict": {k: v for k, v in stored["state_dict"].items() if k not in keys}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_flags(arch="resnet50"), "these are the weights of googlenet, not of resnet50"),
        (changed_flags(arch="vgg"), "its flags say arch vgg, not one of resnet50, googlenet"),
        (changed_flags(arch=["googlenet"]), r"its flags say arch \['googlenet'\], not one of"),
        (changed_flags(bn=None), "its flags say bn None, not one of frozen, train"),
        (changed_flags(bn="\n" * 999), "its flags say bn "),
        (changed_flags(embed_sizes=[8, 8]), r"embed_sizes \[8, 8\], its heads have \[8, 6\]"),
        (changed_flags(embed_sizes=torch.zeros(9)), "embed_sizes tensor"),
        (changed_flags(embed_sizes=10**30), "embed_sizes 1000"),
        (without("heads.Shared.weight"), r"its heads have \[8\]"),
        (without("heads.Shared.bias"), r"1 missing: heads.Shared.bias"),
        (without("backbone.layers.conv1.bn.running_mean"), r"1 missing: conv1.bn.running_mean"),
        (lambda stored: stored | {"flags": [1]}, "no checkpoint of this program"),
        (lambda stored: stored | {"progress": None}, "no checkpoint of this program"),
        (lambda stored: stored["state_dict"], "no checkpoint of this program"),
        (lambda stored: stored | {"state_dict": {"a": 1}}, "no checkpoint of this program"),
        (lambda stored: [stored], "no checkpoint of this program"),
        (lambda stored: stored | {"extra": object}, r"holds a pickled object \(object\)"),
    ],
)
def test_load_tells_what_is_wrong_in_one_line(small, tmp_path, change, message):
    torch.save(change(small[1]), tmp_path / "checkpoint.pth.tar")
    with pytest.raises(netlib.WeightsError, match=message) as error:
        netlib.load(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'checkpoint.pth.tar'}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_load_of_a_missing_folder_an_empty_one_and_a_truncated_file(small, tmp_path):
    with pytest.raises(netlib.WeightsError, match="no such run folder or checkpoint file"):
        netlib.load(tmp_path / "absent")
    with pytest.raises(netlib.WeightsError, match="holds no checkpoint"):
        netlib.load(tmp_path)
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(small[1], path)
    path.write_bytes(path.read_bytes()[: 2**20])
    with pytest.raises(netlib.WeightsError, match="cannot be read .*truncated"):
        netlib.load(tmp_path)


def test_read_checkpoint_returns_its_three_parts(small, tmp_path):
    torch.save(small[1], tmp_path / "checkpoint.pth.tar")
    for path in (tmp_path, tmp_path / "checkpoint.pth.tar"):
        stored = netlib.read_checkpoint(path)
        assert stored["flags"] == small[1]["flags"]
        assert list(stored["state_dict"]) == list(small[1]["state_dict"])


@pytest.mark.parametrize(("arch", "early"), [("resnet50", "layer1"), ("googlenet", "conv3")])
def test_graph_has_every_stage_with_its_shape_and_all_parameters(arch, early):
    network = netlib.build_network(arch, SIZES, pretrained=False, freeze_batchnorm=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    nodes, edges = netlib.describe_graph(network, 224)
    assert all((before[name] == value).all() for name, value in network.state_dict().items())
    assert network.training
    counted = [line for _, lines in nodes.values() for line in lines if line.endswith(" parameters")]
    n_parameters = sum(int(line.removesuffix(" parameters").replace(",", "")) for line in counted)
    assert n_parameters == sum(values.numel() for values in network.parameters())
    assert "56 x 56" in nodes[early][1][2]
    assert (early, "Early") in edges
    assert nodes["Early"][1][2] == str(network(images(224), ["Early"])["Early"].shape[1])
    assert {("Pooled", "Class"), ("Pooled", "Shared")} <= set(edges)
    assert {name for edge in edges for name in edge} == set(nodes)
    layers = [
        name for name, module in network.backbone.layers.named_children() if not isinstance(module, torch.nn.Identity)
    ]
    assert [name for name, (kind, _) in nodes.items() if kind == "layer"] == layers


class Tiny(torch.nn.Module):
    """The least that is a backbone."""

    out_features = 4

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())

    def early_maps(self, images):
        return self.layers(images)

    def pooled(self, early_maps):
        return early_maps.mean((2, 3))


def compile_tiny(monkeypatch, compiler, freeze_batchnorm):
    monkeypatch.setattr(torch, "compile", compiler)
    network = netlib.EmbeddingNetwork(Tiny(), SIZES, freeze_batchnorm)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    compiled = netlib.compile_network(network, (4, 3, 32, 32), "none")
    assert (torch.get_rng_state() == state).all()
    assert all((before[name] == value).all() for name, value in network.state_dict().items())
    assert all(values.grad is None for values in network.parameters())
    return network, compiled


@pytest.mark.parametrize("frozen", [True, False])
def test_compiled_network_computes_the_same_and_leaves_no_trace(monkeypatch, capsys, frozen):
    network, compiled = compile_tiny(monkeypatch, functools.partial(torch.compile, backend="eager"), frozen)
    assert "--compile: the network was compiled in " in capsys.readouterr().out
    assert compiled is not network
    compiled.train()
    assert network.training
    assert network.backbone.layers[1].training != frozen
    expected = network(images(32, n=4))
    for name, values in compiled(images(32, n=4)).items():
        torch.testing.assert_close(values, expected[name])


def test_a_compiler_that_does_not_work_is_told_and_done_without(monkeypatch, capsys):
    def failing(network, **options):
        def fail(*_):
            network.backbone.layers[1].running_mean.add_(1)
            raise RuntimeError("no working C++ compiler\nand more lines")

        return fail

    network, compiled = compile_tiny(monkeypatch, failing, False)
    assert compiled is network
    told = capsys.readouterr().out
    assert told == (
        "--compile: torch.compile does not work here (no working C++ compiler); training goes on without it\n"
    )
