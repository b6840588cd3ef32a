"""Backbones of timm and losses of pytorch-metric-learning, where these packages are installed."""

import numpy as np
import pytest
import torch
import torchvision
from conftest import At, assert_equal, assert_same_run, images, killed_run, parse, read_logs, refused, run, small_flags
from torch.nn.functional import normalize

import evaluate
import losses
import netlib
from support.errors import InputError

SIZES = {"Class": 8, "Shared": 6}
ARCHS = ["timm/test_efficientnet", "timm/test_vit"]
LIBRARY_LOSSES = ["MultiSimilarityLoss", "ProxyAnchorLoss"]


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


@pytest.fixture
def library():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import losses as library

    return library


def build(arch, img_size, weights_file=None):
    torch.manual_seed(0)
    options = {"weights_file": weights_file, "freeze_batchnorm": True, "img_size": img_size}
    return netlib.build_network(arch, SIZES, pretrained=False, **options).eval()


@torch.no_grad()
def test_one_state_dict_gives_the_same_features_in_torchvisions_and_timms_resnet50(timm, tmp_path):
    torch.manual_seed(3)
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "weights.pth")
    ours, timms = (build(arch, 96, tmp_path / "weights.pth") for arch in ("resnet50", "timm/resnet50"))
    assert ours.started_from == timms.started_from
    assert ours.started_from.startswith(f"{tmp_path}/weights.pth, SHA-256 ")
    for name in ("Pooled", "Early"):
        expected, found = (network(images(96), [name])[name] for network in (ours, timms))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "size", "block", "channels"),
    [
        ("timm/test_efficientnet", 64, "blocks.1", 24),
        ("timm/test_vit", 96, "blocks.0", 64),
        ("timm/test_vit2", 64, "blocks.1", 64),
    ],
)
def test_early_features_are_the_map_at_a_quarter_or_a_quarter_of_the_blocks(timm, arch, size, block, channels):
    network, kept = build(arch, size), {}
    module = network.backbone.layers.get_submodule(block)
    module.register_forward_hook(lambda module, inputs, output: kept.update(maps=output))
    early = network(images(size), ["Early"])["Early"]
    maps = kept["maps"]
    if maps.ndim == 3:  # class token and patches
        side = size // 16
        maps = maps[:, -(side**2) :].transpose(1, 2).reshape(2, channels, side, side)
    expected = normalize(netlib.pool_to_grid(maps).flatten(1), dim=1)
    assert early.shape == (2, 16 * channels)
    torch.testing.assert_close(early, expected)


@torch.no_grad()
@pytest.mark.parametrize("arch", ARCHS)
def test_pooled_features_and_normalisation_are_the_models_own(timm, arch):
    network = build(arch, 64)
    model = network.backbone.layers
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    expected = model.forward_head(model.forward_features((images(64) / 255 - mean) / std), pre_logits=True)
    torch.testing.assert_close(network(images(64), ["Pooled"])["Pooled"], expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_in_the_weights_of_a_timm_model_is_not_used(timm, tmp_path):
    torch.manual_seed(5)
    state = timm.create_model("test_efficientnet", num_classes=10).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    loaded = build("timm/test_efficientnet", 64, tmp_path / "weights.pth").backbone.layers.state_dict()
    assert {name for name in state if name not in loaded} == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(state[name], values) for name, values in loaded.items())


@pytest.mark.parametrize("arch", ARCHS)
def test_a_run_with_a_timm_backbone_resumes_exactly_and_is_scored(timm, class_folders, tmp_path, capsys, arch):
    more = ("--arch", arch, "--img_size", 64, "--eval_every", 1, "--n_epochs", 2, "--bn", "frozen")
    whole = run(small_flags(class_folders, tmp_path / "whole", *more))
    cut = tmp_path / "cut" / "tiny" / "run"
    killed_run(small_flags(class_folders, tmp_path / "cut", *more), At("os.rename", "log_train_Class.csv", 2))
    run(["--resume", cut])
    assert_same_run(cut, whole)
    assert "\nstarted from: random weights\n" in (cut / "Curr_Summary_Class.txt").read_text()
    capsys.readouterr()
    run([whole], evaluate)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Recall @ 1")]
    assert len(set(line.split()[-2:])) == 1  # now, and as logged
    network = netlib.load(whole)
    assert network(images(64, 1))["Class"].shape == (1, 128)
    assert not any(values.any() for name, values in network.named_buffers() if name.endswith("running_mean"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arch", "timm/test_vt"], "has no such model; similar: test_vit, "),
        (["--arch", "timm/test_vit.unheard_of"], "has no such model; similar: test_vit"),
        (["--arch", "timm/test_vit", "--img_size", 100], "--img_size 100: timm/test_vit cannot take it ("),
        (["--arch", "timm/"], "invalid choice: 'timm/' (choose from resnet50, googlenet, "),
    ],
)
def test_names_and_sizes_that_cannot_be_are_one_line(timm, class_folders, tmp_path, capsys, more, message):
    assert message in refused(capsys, small_flags(class_folders, tmp_path / "results", *more))
    assert not (tmp_path / "results").exists()


def test_the_grid_of_a_transformers_weights_is_brought_to_the_size_of_the_images(timm, tmp_path):
    model = timm.create_model("test_vit")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    own = model.pos_embed.shape
    for size in (64, 96, 160):
        layers = build("timm/test_vit", size, tmp_path / "weights.pth").backbone.layers
        assert layers.pos_embed.shape == (1, 1 + (size // 16) ** 2, own[2])
        torch.testing.assert_close(layers.pos_embed[:, 0], model.pos_embed[:, 0])  # the class token's
    torch.testing.assert_close(layers.pos_embed, model.pos_embed)  # 160 is the model's own


def test_an_unknown_model_is_not_taken_for_a_bad_size(timm):
    with pytest.raises(InputError, match="has no such model; similar: "):
        build("timm/sknet", 64)


def test_a_timm_model_without_pretrained_weights_says_so(timm):
    with pytest.raises(InputError, match="No pretrained weights exist for test_vit4.*--weights FILE"):
        netlib.build_network("timm/test_vit4", SIZES, pretrained=True, freeze_batchnorm=True, img_size=64)


def batch(n_classes=5):
    generator = torch.Generator().manual_seed(1)
    embeddings = normalize(torch.randn(20, 8, generator=generator), dim=1).requires_grad_()
    return embeddings, torch.arange(20) % n_classes


@pytest.mark.parametrize("name", LIBRARY_LOSSES)
def test_values_and_gradients_are_those_of_the_librarys_own_call(library, name):
    options = {"margin": 0.2, "beta": 1.2, "beta_lr": 1.0, "nu": 0.0, "proxy_lr": 0.5}
    torch.manual_seed(2)
    ours = losses.build_loss(f"pml/{name}", "distance", n_classes=5, embed_size=8, **options)
    torch.manual_seed(2)
    theirs = library.ProxyAnchorLoss(5, 8) if name == "ProxyAnchorLoss" else library.MultiSimilarityLoss()
    found = []
    for loss in (ours, theirs):
        embeddings, labels = batch()
        value = loss(embeddings, labels)
        value.backward()
        found.append((value.detach(), embeddings.grad, [values.grad for values in loss.parameters()]))
    assert_equal(*found, name)
    groups = ours.param_groups()
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.5, 0.0)] * (name == "ProxyAnchorLoss")


@pytest.mark.parametrize("name", ["CosFaceLoss", "SubCenterArcFaceLoss", "P2SGradLoss", "SoftTripleLoss", "MarginLoss"])
def test_losses_get_the_sizes_that_they_or_their_bases_ask_for(library, name):
    loss = losses.LibraryLoss(name, n_classes=5, embed_size=8)
    assert torch.isfinite(loss(*batch()))
    expected = {
        "CosFaceLoss": (8, 5),
        "SubCenterArcFaceLoss": (8, 15),
        "P2SGradLoss": (8, 5),
        "SoftTripleLoss": (8, 50),
    }
    assert [tuple(values.shape) for values in loss.parameters()] == ([expected[name]] if name in expected else [])


@pytest.mark.parametrize("name", LIBRARY_LOSSES)
def test_a_run_with_a_loss_of_the_library_trains_it_and_resumes_exactly(library, class_folders, tmp_path, name):
    more = ("--losses", f"pml/{name}", f"pml/{name}", "--proxy_lr", 0.01, 0.02, "--task_p", 1, 1)
    more += ("--n_epochs", 2)
    whole = run(small_flags(class_folders, tmp_path / "whole", *more))
    assert np.isfinite(read_logs(whole)["log_train_Class.csv"][["Class Loss", "Shared Loss"]].to_numpy()).all()
    cut = tmp_path / "cut" / "tiny" / "run"
    killed_run(small_flags(class_folders, tmp_path / "cut", *more), At("os.rename", "log_train_Class.csv", 2))
    run(["--resume", cut])
    assert_same_run(cut, whole)
    optimizer = torch.load(whole / "last.pth.tar", weights_only=True)["training"]["optimizer"]
    rates = [group["lr"] for group in optimizer["param_groups"]]
    assert rates == ([1e-3, 0.01, 0.02, 1e-3] if name == "ProxyAnchorLoss" else [1e-3, 1e-3])


def test_sampling_does_not_apply_to_losses_of_the_library_and_says_so(library, caplog):
    args = parse("--losses", "pml/ContrastiveLoss", "triplet", "--sampling", "random", "random")
    assert args.cs_per_bs == [4, 4]
    assert caplog.messages == ["--sampling: does not apply to --losses pml/ContrastiveLoss"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ContrastivLoss", "pytorch-metric-learning has no such loss; similar: ContrastiveLoss"),
        ("SelfSupervisedLoss", "pml/SelfSupervisedLoss: "),
        ("GenericPairLoss", "needs more than embeddings and labels (GenericPairLoss.__init__() missing"),
    ],
)
def test_losses_that_cannot_be_are_one_line(library, class_folders, tmp_path, capsys, name, message):
    argv = small_flags(class_folders, tmp_path / "results", "--losses", f"pml/{name}", "marginloss")
    assert message in refused(capsys, argv)
    assert not (tmp_path / "results").exists()
