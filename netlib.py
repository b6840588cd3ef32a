"""The two-headed embedding network, its ResNet50 backbone, pretrained weights and the BatchNorm policy."""

import http.client
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class WeightsError(ValueError):
    """Pretrained weights cannot be had or do not fit; the message is one line for the user."""


class ResNet50(nn.Module):
    """torchvision's ResNet50 as a backbone: (B, 3, H, W) normalised images to (B, 2048) pooled features.

    Random weights start with every residual branch at zero (Goyal et al. 2017, section 5.1), which helps a metric loss
    out of the collapsed state in which all embeddings coincide.
    """

    out_features = 2048

    def __init__(self):
        super().__init__()
        self.layers = torchvision.models.resnet50(weights=None, zero_init_residual=True)
        self.layers.fc = nn.Identity()

    def early_maps(self, images: Tensor) -> Tensor:
        """Return the output of the first residual stage, (B, 256, H/4, W/4)."""
        net = self.layers
        return net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images)))))

    def pooled(self, early_maps: Tensor) -> Tensor:
        """Return the globally average-pooled output of the last stage, (B, 2048), from the first stage's maps."""
        net = self.layers
        maps = net.layer4(net.layer3(net.layer2(early_maps)))
        return torch.flatten(net.avgpool(maps), 1)

    @staticmethod
    def download() -> dict[str, Tensor]:
        """Return torchvision's IMAGENET1K_V1 state dict, from its cache or the network."""
        weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
        return weights.get_state_dict(progress=True, check_hash=True)


BACKBONES = {"resnet50": ResNet50}


class EmbeddingNetwork(nn.Module):
    """One backbone with a linear head per task, both outputs L2-normalised (MIC paper, section 3).

    backbone: module with `out_features`, `early_maps` and `pooled`, see ResNet50.
    embed_sizes: task name to embedding dimension D, e.g. {"Class": 128, "Shared": 128}.
    freeze_batchnorm: keep the running statistics of all BatchNorm layers (evaluation mode) also in training; their
    scale and shift are trained either way.
    """

    def __init__(self, backbone: nn.Module, embed_sizes: dict[str, int], freeze_batchnorm: bool):
        super().__init__()
        self.backbone = backbone
        self.freeze_batchnorm = freeze_batchnorm
        self.heads = nn.ModuleDict({task: nn.Linear(backbone.out_features, d) for task, d in embed_sizes.items()})
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "EmbeddingNetwork":
        """Switch between training and evaluation mode; frozen BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        if self.freeze_batchnorm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor, outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Embed a batch.

        images: (B, 3, H, W) uint8 RGB; normalisation happens here, on the device.
        outputs: what to compute: head names; "Pooled", the backbone's (B, out_features) output; "Early", the features
        of the first clustering, (B, channels * 16), L2-normalised. Default: all heads.
        Returns {output: (B, D) float32}, rows of heads L2-normalised.
        """
        outputs = list(self.heads) if outputs is None else outputs
        images = images.contiguous(memory_format=torch.channels_last).float()
        early_maps = self.backbone.early_maps((images - self.mean) / self.std)
        features = {}
        if "Early" in outputs:
            features["Early"] = F.normalize(torch.flatten(pool_to_grid(early_maps.float()), 1), dim=1)
        if set(outputs) - {"Early"}:
            features["Pooled"] = self.backbone.pooled(early_maps).float()
            # The heads are cheap: in full precision even under autocast, for the digits of the scores
            with torch.autocast(images.device.type, enabled=False):
                for task, head in self.heads.items():
                    if task in outputs:
                        features[task] = F.normalize(head(features["Pooled"]), dim=1)
        return {name: features[name] for name in outputs}


def pool_to_grid(maps: Tensor) -> Tensor:
    """Average-pool (B, C, H, W) maps to (B, C, 4, 4): window 18, stride 12 at 56 x 56 as published, else adaptive."""
    if maps.shape[-2:] == (56, 56):
        return F.avg_pool2d(maps, kernel_size=18, stride=12)
    return F.adaptive_avg_pool2d(maps, 4)


def build_network(
    arch: str,
    embed_sizes: dict[str, int],
    *,
    pretrained: bool,
    weights_file: str | Path | None = None,
    freeze_batchnorm: bool,
) -> EmbeddingNetwork:
    """Build the network for a name of BACKBONES, in channels_last memory format.

    pretrained: load ImageNet weights by torchvision's name. weights_file: load this state dict instead.
    Raises WeightsError when the weights cannot be downloaded, read or fitted, KeyError for an unknown `arch`.
    """
    backbone = BACKBONES[arch]()
    if weights_file is not None:
        fit_weights(backbone, read_weights(weights_file), f"--weights {weights_file}", arch)
    elif pretrained:
        fit_weights(backbone, download_weights(backbone, arch), "downloaded weights", arch)
    network = EmbeddingNetwork(backbone, embed_sizes, freeze_batchnorm)
    return network.to(memory_format=torch.channels_last)


def download_weights(backbone: nn.Module, arch: str) -> dict[str, Tensor]:
    """Return the backbone's pretrained state dict from torchvision's cache or the network. Raises WeightsError."""
    elsewhere = (
        "pass a local torchvision state dict with --weights FILE, or train from random weights with --not_pretrained"
    )
    try:
        return backbone.download()
    except (OSError, http.client.HTTPException) as error:
        raise WeightsError(
            f"cannot download the pretrained {arch} weights ({first_line(error)}): {elsewhere}"
        ) from error
    except Exception as error:  # a damaged file makes the unpickler raise almost anything
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise WeightsError(
            f"the pretrained {arch} weights cannot be read: delete the damaged file in {cache}, or {elsewhere}"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict of tensors; no code in the file is executed.

    Raises WeightsError where the file is missing or is no plain state dict.
    """
    try:
        if not Path(path).is_file():
            raise WeightsError(f"--weights {path}: no such file; give a torchvision state dict (.pth)")
        with warnings.catch_warnings(record=True):  # torch warns of files that are refused here anyhow
            state = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # untrusted bytes make the unpickler raise almost anything
        raise WeightsError(
            f"--weights {path}: cannot be read as a state dict of tensors ({type(error).__name__}); it is damaged, or "
            "not a file written by torch.save(network.state_dict(), ...)"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise WeightsError(f"--weights {path}: holds no state dict of tensors; give a torchvision state dict (.pth)")
    return state


def fit_weights(backbone: nn.Module, state: dict[str, Tensor], source: str, arch: str) -> None:
    """Copy a torchvision state dict into the backbone; its classifier (fc.*) is not used.

    Raises WeightsError that names the first keys that are missing, unexpected or of another shape or type.
    """
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    own = backbone.layers.state_dict()
    problems = {
        "missing": [key for key in own if key not in state and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state if key not in own],
        "of another shape or type": [key for key in own if key in state and not fits(state[key], own[key])],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(keys)} {kind}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
            for kind, keys in problems.items()
            if keys
        )
        raise WeightsError(f"{source}: not the weights of torchvision's {arch} ({listed})")
    backbone.layers.load_state_dict(state, strict=False)


def fits(value: Tensor, own: Tensor) -> bool:
    """Tell whether a stored tensor can be copied into the network's own."""
    is_plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    return is_plain and value.shape == own.shape and value.is_floating_point() == own.is_floating_point()
