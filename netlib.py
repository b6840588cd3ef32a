"""The two-headed embedding network: backbones by name, BatchNorm policy, precision, building and loading."""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from googlenet import GoogLeNet
from support import processes, weights
from support.errors import InputError, first_line
from support.output import log
from support.packages import TimmBackbone, create_timm_model, resample_grid

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PREFIX = "backbone.layers."
"""Prefix of the backbone's own names in the state dict of an EmbeddingNetwork."""


class ResNet50(nn.Module):
    """torchvision's ResNet50 as a backbone.

    With random weights every residual branch starts at zero, which helps a metric loss to leave the collapsed state in
    which all embeddings coincide.

    Reference:
        Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017, section 5.1.
    """

    out_features = 2048
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    unused_weights = ("fc.",)

    def __init__(self):
        super().__init__()
        self.layers = torchvision.models.resnet50(weights=None, zero_init_residual=True)
        self.layers.fc = nn.Identity()

    def forward(self, images: Tensor, with_pooled: bool = True) -> tuple[Tensor, Tensor | None]:
        """Return early maps and pooled features of normalised images.

        Args:
            images: (B, 3, H, W) normalised.
            with_pooled: whether to compute the pooled features.

        Returns:
            The output of the first residual stage, (B, 256, H/4, W/4), and the globally average-pooled output of the
            last one, (B, 2048), or None without with_pooled.
        """
        net = self.layers
        early_maps = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images)))))
        if not with_pooled:
            return early_maps, None
        return early_maps, torch.flatten(net.avgpool(net.layer4(net.layer3(net.layer2(early_maps)))), 1)


BACKBONES = {"resnet50": ResNet50, "googlenet": GoogLeNet}
"""Backbones by name; a model of timm is named timm/NAME.

A backbone is a module that maps normalised images (B, 3, H, W) to early maps (B, C, h, w) and pooled features
(B, out_features). With with_pooled=False it skips the pooled features and returns None for them.

Attributes of a backbone:
    out_features: number of pooled features.
    layers: the network into which weight files are loaded.
    unused_weights: prefixes of the names in weight files that are ignored, those of classifiers.
    weights: torchvision's weights to download.
    mean: mean for normalising images; default: ImageNet's.
    std: standard deviation for normalising images; default: ImageNet's.
"""


def build_backbone(arch: str, img_size: int) -> nn.Module:
    """Return the backbone of a name, with random weights.

    Raises:
        InputError: timm has no such model, or the model cannot take this image size.
    """
    return TimmBackbone(arch.removeprefix("timm/"), img_size) if arch.startswith("timm/") else BACKBONES[arch]()


class EmbeddingNetwork(nn.Module):
    """One backbone with a linear head per task; outputs of the heads are L2-normalised.

    Args:
        backbone: see BACKBONES; images are normalised with its `mean` and `std`, or those of ImageNet.
        embed_sizes: task name to embedding dimension D, such as {"Class": 128, "Shared": 128}.
        freeze_batchnorm: keep all BatchNorm layers in evaluation mode, with their running statistics, also in training.
            Their scale and shift are trained either way.
        detached_heads: tasks whose heads pass no gradient to the backbone.

    Attributes:
        amp: precision of the backbone: none (float32, or a caller's autocast) or a name in AMP_TYPES.
        started_from: weights that the network started from, in words.

    Reference:
        MIC paper, section 3.
    """

    def __init__(
        self,
        backbone: nn.Module,
        embed_sizes: dict[str, int],
        freeze_batchnorm: bool,
        detached_heads: Sequence[str] = (),
    ):
        super().__init__()
        self.backbone = backbone
        self.detached_heads = tuple(detached_heads)
        self.freeze_batchnorm = freeze_batchnorm
        self.started_from, self.amp = "random weights", "none"
        self.heads = nn.ModuleDict({task: nn.Linear(backbone.out_features, d) for task, d in embed_sizes.items()})
        mean, std = getattr(backbone, "mean", IMAGENET_MEAN), getattr(backbone, "std", IMAGENET_STD)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "EmbeddingNetwork":
        """Switch between training and evaluation mode; frozen BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        if self.freeze_batchnorm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor, outputs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Embed a batch of images.

        Args:
            images: (B, 3, H, W) uint8 RGB; they are normalised here, on the device.
            outputs: what to compute: head names; "Pooled", the backbone's (B, out_features) output; "Early", the
                features of the first clustering, (B, 16 * channels of the early maps), L2-normalised: 4096 for
                ResNet50, 3072 for GoogLeNet. None: all heads.

        Returns:
            {output: (B, D) float32}; rows of heads are L2-normalised.

        Raises:
            TypeError: the images have another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise TypeError(f"images are (B, 3, H, W) uint8 RGB; got {tuple(images.shape)} {images.dtype}")
        outputs = list(self.heads) if outputs is None else outputs
        images = images.contiguous(memory_format=torch.channels_last).float()
        device_type, dtype = images.device.type, AMP_TYPES.get(self.amp)
        with torch.autocast(device_type, dtype) if dtype else contextlib.nullcontext():
            early_maps, pooled = self.backbone((images - self.mean) / self.std, set(outputs) != {"Early"})
        features = {}
        if "Early" in outputs:
            features["Early"] = F.normalize(torch.flatten(pool_to_grid(early_maps.float()), 1), dim=1)
        if pooled is not None:
            features["Pooled"] = pooled.float()
            # Compute the heads in float32, even in a caller's autocast: they are cheap, and the scores gain precision
            with torch.autocast(device_type, enabled=False):
                for task, head in self.heads.items():
                    if task in outputs:
                        pooled = features["Pooled"].detach() if task in self.detached_heads else features["Pooled"]
                        features[task] = F.normalize(head(pooled), dim=1)
        return {name: features[name] for name in outputs}


def pool_to_grid(maps: Tensor) -> Tensor:
    """Average-pool (B, C, H, W) maps to (B, C, 4, 4).

    Maps of 56 x 56 are pooled with window 18 and stride 12, as in the published code; other sizes adaptively.
    """
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
    img_size: int = 224,
    detached_heads: Sequence[str] = (),
) -> EmbeddingNetwork:
    """Build the network for a name of BACKBONES or "timm/NAME", in channels_last memory format.

    Args:
        embed_sizes: see EmbeddingNetwork.
        pretrained: download torchvision's or timm's ImageNet weights.
        weights_file: load these weights instead: a state dict of the backbone, or a checkpoint of this program, of
            which heads of matching size are loaded as well.
        freeze_batchnorm: see EmbeddingNetwork.
        img_size: side of the images in pixels, for backbones of timm.
        detached_heads: see EmbeddingNetwork.

    Raises:
        InputError: the weights cannot be downloaded or read, or do not fit the network.
        KeyError: `arch` is unknown.
    """
    network = EmbeddingNetwork(build_backbone(arch, img_size), embed_sizes, freeze_batchnorm, detached_heads)
    if weights_file is not None:
        state, source = weights.read_state_dict(weights_file), f"--weights {weights_file}"
        digest = hashlib.sha256(Path(weights_file).read_bytes()).hexdigest()
        network.started_from = f"{weights_file}, SHA-256 {digest[:12]}"
    elif pretrained:
        state, source = pretrained_state(arch, img_size), "downloaded weights"
        if arch.startswith("timm/"):
            config = network.backbone.layers.pretrained_cfg
            network.started_from = f"timm {config['architecture']}.{config['tag']}"
        else:
            network.started_from = f"torchvision {BACKBONES[arch].weights}"
    if pretrained or weights_file is not None:
        state, fresh = adapted_state(network, state)
        load_state(network, state, source, arch)
        for task in fresh:
            log.info(f"{source}: has no {task} head of size {embed_sizes[task]}; it starts at random")
    return network.to(memory_format=torch.channels_last)


def pretrained_state(arch: str, img_size: int) -> dict[str, Tensor]:
    """Return a pretrained state dict of torchvision or timm; download it if it is not in their cache.

    Raises:
        InputError: there are no such weights, or they cannot be downloaded or read.
    """
    try:
        if not arch.startswith("timm/"):
            return BACKBONES[arch].weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
        return create_timm_model(arch.removeprefix("timm/"), img_size, pretrained=True).state_dict()
    # There is no network, there are no such weights, or the file is damaged: the unpickler then raises almost anything
    except Exception as error:
        raise InputError(
            f"cannot get the pretrained {arch} weights ({first_line(error)}): delete a damaged file from the cache of "
            "torch or Hugging Face, pass one with --weights FILE, or train from random weights with --not_pretrained"
        ) from error


def adapted_state(network: EmbeddingNetwork, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Adapt a state dict to an EmbeddingNetwork: rename its keys, resample position embeddings, fill in missing heads.

    Heads that are missing or have another size keep their initial weights.

    Args:
        network: the network that will load the state dict.
        state: state dict of torchvision's or timm's network, or of this program's.

    Returns:
        The state dict, and the tasks of heads that keep their initial weights; empty for state dicts of other programs,
        which have no heads at all.
    """
    is_ours = any(name.startswith(PREFIX) for name in state)
    if not is_ours:
        unused = network.backbone.unused_weights
        state = {PREFIX + name: values for name, values in state.items() if not name.startswith(unused)}
    if isinstance(network.backbone, TimmBackbone):
        state = resample_grid(network.backbone.layers, state, PREFIX)
    fresh = []
    for task, head in network.heads.items():
        initial = {f"heads.{task}.{name}": values for name, values in head.state_dict().items()}
        if not all(name in state and state[name].shape == values.shape for name, values in initial.items()):
            state = state | initial
            fresh.append(task)
    return state, fresh if is_ours else []


def load_state(network: EmbeddingNetwork, state: dict[str, Tensor], source: str, arch: str) -> None:
    """Load a state dict into a network.

    Raises:
        InputError: a name is missing on one side, or a shape differs.
    """
    try:
        network.load_state_dict(state)
    except RuntimeError as error:  # its message has one line per kind of mismatch, with all names
        reasons = [line.strip()[:120] for line in str(error).splitlines()[1:4]]
        raise InputError(f"{source}: not the weights of {arch} ({'; '.join(reasons)})") from error


def load(run_folder: str | Path, checkpoint: str = "checkpoint.pth.tar") -> EmbeddingNetwork:
    """Rebuild the network of a run on the CPU, in evaluation mode.

    It maps images (B, 3, H, W) uint8 RGB to embeddings {"Class", "Shared"}. Nothing is downloaded, and no code in the
    file is executed.

    Args:
        run_folder: a run folder, or a checkpoint file.
        checkpoint: name of the checkpoint in the run folder.

    Raises:
        InputError: the checkpoint cannot be used; the message is one line.
    """
    path = weights.checkpoint_path(run_folder, checkpoint)
    return rebuild(weights.read_checkpoint(path), path)


def rebuild(stored: Mapping[str, Mapping], path: Path) -> EmbeddingNetwork:
    """Build the network of a checkpoint; see load.

    Args:
        stored: content of the checkpoint.
        path: path of the checkpoint, for messages.
    """
    flags, state = stored["flags"], stored["state_dict"]
    try:
        arch = flags["arch"]
        sizes = {name.split(".")[1]: len(values) for name, values in state.items() if name.startswith("heads.")}
        backbone = build_backbone(arch, flags["img_size"])
        network = EmbeddingNetwork(backbone, sizes, freeze_batchnorm=flags["bn"] == "frozen")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its flags or heads are not those of a run ({first_line(error)})") from error
    load_state(network, state, str(path), arch)
    return network.to(memory_format=torch.channels_last).eval()


def try_compile(device: torch.device) -> None:
    """Compile a small function and its gradient, to find out early whether torch.compile works on a device.

    Raises:
        InputError: it does not work.
    """
    try:
        torch.compile(lambda x: (x * x).sum())(torch.ones(8, device=device, requires_grad=True)).backward()
    except Exception as error:  # it raises almost anything without a compiler, Python's headers or a recent GPU
        reason = next((line for line in str(error).splitlines() if "error: " in line), first_line(error))
        raise InputError(
            f"--compile: torch.compile cannot be used here ({reason}); install what is missing, or start a new run "
            "without it"
        ) from error


def for_training(network: EmbeddingNetwork, compiled: bool, has_unused_heads: bool) -> nn.Module:
    """Wrap the network for training steps: compiled, and with gradients averaged over all processes.

    The wrapped network shares weights and mode with `network`, which is the one to evaluate and store. On GPUs,
    BatchNorm that trains computes its statistics over the batch of all processes; on CPUs run/options.py rejects that
    combination.

    Args:
        network: the network, on its device.
        compiled: whether to compile the network. With several processes the graph is split, so that the exchange of
            gradients overlaps the backward pass.
        has_unused_heads: whether some heads take no part in a step.
    """
    if processes.world_size() > 1 and not network.freeze_batchnorm:
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
        if isinstance(network.backbone, TimmBackbone):  # its BatchNorm may include an activation
            from timm.layers import convert_sync_batchnorm as convert
        convert(network)
    trained = network
    if processes.world_size() > 1:
        trained = DistributedDataParallel(
            network, find_unused_parameters=has_unused_heads, gradient_as_bucket_view=True
        )
        # DDP has just broadcast the first process's buffers. They stay equal, because every update uses the whole
        # batch. The argument broadcast_buffers is deprecated, and False would also skip this first broadcast
        trained.broadcast_buffers = False
    return torch.compile(trained, dynamic=False) if compiled else trained
