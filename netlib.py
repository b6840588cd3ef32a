"""The two-headed embedding network: its backbones by name, BatchNorm policy, precision, building and loading."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from googlenet import GoogLeNet
from run import processes, weights
from run.errors import InputError, first_line

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PREFIX = "backbone.layers."
"""What stands before torchvision's names in the state dict of an EmbeddingNetwork."""


class ResNet50(nn.Module):
    """torchvision's ResNet50 as a backbone: (B, 3, H, W) normalised images to (B, 2048) pooled features.

    Random weights start with every residual branch at zero (Goyal et al. 2017, section 5.1), which helps a metric loss
    out of the collapsed state in which all embeddings coincide.
    """

    out_features = 2048
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    unused_weights = ("fc.",)

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


BACKBONES = {"resnet50": ResNet50, "googlenet": GoogLeNet}


class EmbeddingNetwork(nn.Module):
    """One backbone with a linear head per task, both outputs L2-normalised (MIC paper, section 3).

    backbone: module with `out_features`, `early_maps` and `pooled`, see ResNet50 and GoogLeNet.
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
        of the first clustering, (B, 16 times the channels of the early maps), L2-normalised: 4096 for ResNet50, 3072
        for GoogLeNet. Default: all heads.
        Returns {output: (B, D) float32}, rows of heads L2-normalised. Raises TypeError for other images.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise TypeError(f"images are (B, 3, H, W) uint8 RGB; got {tuple(images.shape)} {images.dtype}")
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


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Return the context in which the network runs: amp is none (float32) or a name of AMP_TYPES."""
    return torch.autocast(device.type, AMP_TYPES.get(amp), enabled=amp in AMP_TYPES)


def build_network(
    arch: str,
    embed_sizes: dict[str, int],
    *,
    pretrained: bool,
    weights_file: str | Path | None = None,
    freeze_batchnorm: bool,
) -> EmbeddingNetwork:
    """Build the network for a name of BACKBONES, in channels_last memory format.

    pretrained: load ImageNet weights by torchvision's name. weights_file: load these weights instead, torchvision's
    or this program's; heads that the file holds in the right size are taken too.
    Raises InputError when the weights cannot be downloaded, read or fitted, KeyError for an unknown `arch`.
    """
    state = None
    if weights_file is not None:
        state, source = weights.read_state_dict(weights_file), f"--weights {weights_file}"
    elif pretrained:
        state, source = weights.download(BACKBONES[arch].weights, arch), "downloaded weights"
    network = EmbeddingNetwork(BACKBONES[arch](), embed_sizes, freeze_batchnorm)
    if state is not None:
        weights.load_strictly(network, with_own_heads(network, state, source), source, arch)
    return network.to(memory_format=torch.channels_last)


def with_own_heads(network: EmbeddingNetwork, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return a state dict, torchvision's or this program's, under the network's names, with the network's random
    heads where it has none of the right size."""
    is_ours = any(name.startswith(PREFIX) for name in state)
    if not is_ours:
        unused = network.backbone.unused_weights
        state = {PREFIX + name: values for name, values in state.items() if not name.startswith(unused)}
    for task, head in network.heads.items():
        own = {f"heads.{task}.{name}": values for name, values in head.state_dict().items()}
        if any(name not in state or state[name].shape != values.shape for name, values in own.items()):
            state = state | own
            if is_ours:
                print(f"{source}: has no {task} head of size {head.out_features}; it starts at random")
    return state


def load(run_folder: str | Path, checkpoint: str = "checkpoint.pth.tar") -> EmbeddingNetwork:
    """Rebuild the network of a run in evaluation mode, on the CPU: uint8 RGB (B, 3, H, W) to {"Class", "Shared"}.

    run_folder: a run folder, of which `checkpoint` is read, or a checkpoint file. Nothing is downloaded, and no code in
    the file is executed. Raises InputError with one line for whatever is wrong with it.
    """
    path = weights.checkpoint_path(run_folder, checkpoint)
    stored = weights.read_checkpoint(path)
    flags, state = stored["flags"], stored["state_dict"]
    try:
        if flags["arch"] not in BACKBONES:
            raise InputError(f"{path}: its flags say arch {flags['arch']}, not one of {', '.join(BACKBONES)}")
        sizes = {name.split(".")[1]: len(values) for name, values in state.items() if name.startswith("heads.")}
        network = EmbeddingNetwork(BACKBONES[flags["arch"]](), sizes, freeze_batchnorm=flags["bn"] == "frozen")
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its flags or heads are not those of a run ({first_line(error)})") from error
    weights.load_strictly(network, state, str(path), flags["arch"])
    return network.to(memory_format=torch.channels_last).eval()


def for_training(network: EmbeddingNetwork, compiled: bool, has_unused_heads: bool) -> nn.Module:
    """Return the network as training steps run it: compiled, and with gradients that are the mean over all processes.

    It shares its weights with `network`, which is what is evaluated and stored. has_unused_heads: some heads take no
    part in a step. On GPUs, BatchNorm that trains takes its statistics over the batch of all processes.
    """
    if processes.count() > 1 and not network.freeze_batchnorm:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    trained = torch.compile(network, dynamic=False) if compiled else network
    if processes.count() == 1:
        return trained
    return DistributedDataParallel(trained, find_unused_parameters=has_unused_heads)
