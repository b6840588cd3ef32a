"""The two-headed embedding network, its backbones by name, weights, precision and the BatchNorm policy."""

import hashlib
import http.client
import inspect
import os
import re
import time
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from googlenet import GoogLeNet

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PREFIX = "backbone.layers."
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class WeightsError(ValueError):
    """Weights or a checkpoint cannot be had, read or fitted; the message is one line for the user."""


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

    pretrained: load ImageNet weights by torchvision's name. weights_file: load these weights instead, see read_weights;
    heads that the file holds in the right size are taken too.
    Raises WeightsError when the weights cannot be downloaded, read or fitted, KeyError for an unknown `arch`.
    """
    backbone, state, source = BACKBONES[arch], None, f"--weights {weights_file}"
    if weights_file is not None:
        state = read_weights(weights_file)
    elif pretrained:
        state, source = download_weights(backbone, arch), "downloaded weights"
    network = EmbeddingNetwork(backbone(), embed_sizes, freeze_batchnorm)
    if state is not None:
        fit_weights(network, state, source, arch)
    return network.to(memory_format=torch.channels_last)


def load(run_folder: str | Path, checkpoint: str = "checkpoint.pth.tar") -> EmbeddingNetwork:
    """Rebuild the network of a run in evaluation mode, on the CPU: uint8 RGB (B, 3, H, W) to {"Class", "Shared"}.

    run_folder: a run folder, of which `checkpoint` is read, or a checkpoint file. Nothing is downloaded, and no code in
    the file is executed. Raises WeightsError with one line for whatever is wrong with it.
    """
    path = checkpoint_path(run_folder, checkpoint)
    stored = read_checkpoint(path)
    flags, state = stored["flags"], stored["state_dict"]
    for flag, known in (("arch", list(BACKBONES)), ("bn", ["frozen", "train"])):
        if not isinstance(flags.get(flag), str) or flags[flag] not in known:
            raise WeightsError(f"{path}: its flags say {flag} {shown(flags.get(flag))}, not one of {', '.join(known)}")
    sizes = head_sizes(state)
    if repr(flags.get("embed_sizes")) != repr(list(sizes.values())):
        stored_sizes = shown(flags.get("embed_sizes"))
        raise WeightsError(f"{path}: its flags say embed_sizes {stored_sizes}, its heads have {list(sizes.values())}")
    network = EmbeddingNetwork(BACKBONES[flags["arch"]](), sizes, freeze_batchnorm=flags["bn"] == "frozen")
    fit_weights(network, state, str(path), flags["arch"], needs_heads=True)
    return network.to(memory_format=torch.channels_last).eval()


class SyncedStatistics(torch.autograd.Function):
    """BatchNorm of a share of a batch by the statistics of the whole, for SyncedBatchNorm."""

    @staticmethod
    def forward(ctx, maps: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalised (B, C, H, W) maps, and mean and biased variance, (C,), of the maps of all processes."""
        # Its moments are wanted only: of large channels_last maps torch.var_mean takes over ten times as long
        _, own_mean, own_inverse = torch.native_batch_norm(maps, weight, bias, None, None, True, 0.0, eps)
        moments = torch.stack([own_inverse.pow(-2) - eps, own_mean])
        of_all = [torch.empty_like(moments) for _ in range(distributed.get_world_size())]
        distributed.all_gather(of_all, moments)
        variances, means = torch.stack(of_all, 1)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(maps, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(maps, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; those of the statistics come from the maps of all processes."""
        maps, weight, mean, variance = ctx.saved_tensors
        of_maps, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, maps, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([of_weight, of_bias])
        distributed.all_reduce(sums)
        n_values = maps.numel() / maps.shape[1] * distributed.get_world_size()
        inverse = (variance + ctx.eps).rsqrt()
        slope = weight * inverse.square() * sums[0] / n_values
        offset = weight * inverse * sums[1] / n_values - slope * mean
        # maps * slope + offset in the kernel of BatchNorm, in half the time
        through_statistics = F.batch_norm(maps, torch.zeros_like(mean), torch.ones_like(mean), slope, offset, eps=0.0)
        return of_maps - through_statistics, of_weight, of_bias, None


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that trains by the statistics of the batch of all processes, as torch.nn.SyncBatchNorm does on GPUs.

    That module does not run on the CPU. The processes have shares of one size.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise (B, C, H, W) maps, in training mode together with those of the other processes."""
        if not self.training:
            return super().forward(maps)
        normalised, mean, variance = SyncedStatistics.apply(maps, self.weight, self.bias, self.eps)
        n_values = maps.numel() / maps.shape[1] * distributed.get_world_size()
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * n_values / (n_values - 1), self.momentum)
        self.num_batches_tracked += 1
        return normalised


def distribute(network: nn.Module, has_unused: bool) -> DistributedDataParallel:
    """Return the network with gradients that are the mean over all processes.

    has_unused: some heads may take no part in a step. Statistics of BatchNorm need no synchronisation: they are frozen,
    or those of all processes.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
    return DistributedDataParallel(network, find_unused_parameters=has_unused, **{sync: False})


def synchronise_batchnorm(network: EmbeddingNetwork) -> EmbeddingNetwork:
    """Return the network with BatchNorm layers that train by the maps of all processes; frozen ones stay."""
    if network.freeze_batchnorm:
        return network
    if network.mean.is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                synced = SyncedBatchNorm(child.num_features, child.eps, child.momentum).to(child.weight)
                synced.load_state_dict(child.state_dict())
                setattr(parent, name, synced)
    return network


def compile_network(
    network: EmbeddingNetwork, image_shape: tuple[int, ...], amp: str, outputs: Sequence[str] | None = None
) -> nn.Module:
    """Return the network as torch.compile makes it for training, or as it is, with a line that says why.

    Both share their weights; keep and save `network`, whose state dict has the usual keys. image_shape: (B, 3, H, W)
    of a training batch. outputs: that training asks for, see EmbeddingNetwork.forward; others compile anew. The first
    forward and backward pass, which compile, happen here and leave no trace in weights, statistics and random numbers.
    """
    start = time.perf_counter()
    device = network.mean.device
    statistics = {name: values.clone() for name, values in network.named_buffers()}
    network.train()
    try:
        with torch.random.fork_rng([device.index] if device.type == "cuda" else []):
            compiled = torch.compile(network, dynamic=False)
            with autocast(device, amp):
                embeddings = compiled(torch.zeros(image_shape, dtype=torch.uint8, device=device), outputs)
            sum(values.sum() for values in embeddings.values()).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing C++ compiler, an old GPU, a bug: a compiler can fail in any way
        print(f"--compile: torch.compile does not work here ({first_line(error)[:200]}); training goes on without it")
        compiled = network
    else:
        print(f"--compile: the network was compiled in {time.perf_counter() - start:.0f} s")
    network.zero_grad()
    with torch.no_grad():
        for name, values in network.named_buffers():
            values.copy_(statistics[name])
    return compiled


def download_weights(backbone: type[nn.Module], arch: str) -> dict[str, Tensor]:
    """Return the backbone's pretrained state dict from torchvision's cache or the network. Raises WeightsError."""
    elsewhere = (
        "pass a local torchvision state dict with --weights FILE, or train from random weights with --not_pretrained"
    )
    cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(backbone.weights.url).name
    try:
        if cache.exists() and not hashlib.sha256(cache.read_bytes()).hexdigest().startswith(checksum(cache.name)):
            raise ValueError("the checksum is wrong")
        return backbone.weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, http.client.HTTPException) as error:
        raise WeightsError(
            f"cannot download the pretrained {arch} weights ({first_line(error)}): {elsewhere}"
        ) from error
    except Exception as error:  # a damaged file makes the unpickler raise almost anything
        to_do = f"delete the damaged file {cache}" if cache.exists() else "the download was damaged: try again"
        raise WeightsError(
            f"the pretrained {arch} weights cannot be read ({first_line(error)}): {to_do}, or {elsewhere}"
        ) from error


def checksum(name: str) -> str:
    """Return the start of the SHA-256 in the name of a weight file of torchvision, as in resnet50-0676ba61.pth."""
    return name.rsplit(".", 1)[0].rsplit("-", 1)[-1]


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_file(path: str | Path, source: str) -> object:
    """Read a file of torch.save, or a .safetensors; no code in the file is executed.

    source: what the message calls the file. Raises WeightsError where the file is missing, damaged, or holds objects
    other than tensors and plain values.
    """
    if os.path.isdir(path):
        raise WeightsError(f"{source}: is a folder; name a file in it, of a run folder its checkpoint.pth.tar")
    if not os.path.isfile(path):
        raise WeightsError(f"{source}: no such file; give a torchvision state dict (.pth) or a checkpoint (.pth.tar)")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not look at the checksums
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        with warnings.catch_warnings(record=True):  # torch warns of files that are refused here anyhow
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise WeightsError(f"{source}: reading it needs a package: pip install safetensors") from error
    except OSError as error:
        raise WeightsError(f"{source}: cannot be read ({error.strerror or first_line(error)})") from error
    except Exception as error:  # untrusted bytes make the unpickler raise almost anything
        pickled = re.search(r"GLOBAL (\S+)", str(error))
        if pickled:
            raise WeightsError(
                f"{source}: holds a pickled object ({shown(pickled[1])}), which could run code when loaded; "
                "store tensors and plain values only"
            ) from error
        raise WeightsError(
            f"{source}: cannot be read ({type(error).__name__}); it is damaged or truncated, or was not written by "
            "torch.save"
        ) from error


def is_state_dict(value: object) -> bool:
    """Tell whether a value is a dict of tensors by name."""
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in a file: torchvision's or this program's, as it is, in a checkpoint or a .safetensors.

    Raises WeightsError where the file cannot be read or holds no state dict.
    """
    content = read_file(path, f"--weights {path}")
    state = content["state_dict"] if isinstance(content, dict) and "state_dict" in content else content
    if not is_state_dict(state) or not state:
        raise WeightsError(
            f"--weights {path}: holds no state dict of tensors; give a torchvision state dict (.pth) or a checkpoint"
        )
    return state


def checkpoint_path(path: str | Path, checkpoint: str) -> Path:
    """Return `checkpoint` in the run folder `path`, or `path` itself where it is a file. Raises WeightsError."""
    path = Path(path)
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise WeightsError(f"{path}: no such run folder or checkpoint file")
    if not os.path.isfile(path / checkpoint):
        others = ", ".join(sorted(file.name for file in path.glob("*.pth.tar")))
        hint = f"name one of its checkpoints: {others}" if others else "it holds no checkpoint (*.pth.tar) at all"
        raise WeightsError(f"{path}: no {checkpoint} in this folder; {hint}")
    return path / checkpoint


def read_checkpoint(path: str | Path) -> dict[str, dict]:
    """Read a checkpoint file, or the best one of a run folder: {"state_dict", "flags", "progress"}, each a dict.

    No code in the file is executed. Raises WeightsError with one line for whatever is wrong with it; what the flags
    hold is not looked at.
    """
    path = checkpoint_path(path, "checkpoint.pth.tar")
    stored = read_file(path, str(path))
    is_whole = isinstance(stored, dict) and is_state_dict(stored.get("state_dict"))
    if not is_whole or not all(isinstance(stored.get(part), dict) for part in ("flags", "progress")):
        raise WeightsError(
            f"{path}: no checkpoint of this program, which holds a state_dict of tensors, flags and progress"
        )
    return stored


def head_sizes(state: dict[str, Tensor]) -> dict[str, int]:
    """Return the embedding size of each head in a state dict of this program, by task."""
    weights = {key.split(".")[1]: value for key, value in state.items() if re.fullmatch(r"heads\.\w+\.weight", key)}
    return {task: value.shape[0] for task, value in weights.items() if value.ndim == 2}


def fit_weights(
    network: EmbeddingNetwork, state: dict[str, Tensor], source: str, arch: str, needs_heads: bool = False
) -> None:
    """Copy a state dict into the network: torchvision's, without its classifiers, or one of this program.

    Without needs_heads, heads that are missing or have another size keep their random weights. All else must be there.
    Raises WeightsError that names the architecture that fits instead, or the first keys that are missing, unexpected or
    of another shape or type.
    """
    own = network.state_dict()
    is_ours = any(key.startswith(PREFIX) for key in state)
    if not is_ours:
        unused = network.backbone.unused_weights
        state = {PREFIX + key: value for key, value in state.items() if not key.startswith(unused)}
    notes = []
    for task in () if needs_heads else network.heads:
        keys = [f"heads.{task}.weight", f"heads.{task}.bias"]
        if not all(key in state and fits(state[key], own[key]) for key in keys):
            own, state = ({key: values[key] for key in values if key not in keys} for values in (own, state))
            if is_ours:
                size = network.heads[task].out_features
                notes.append(f"{source}: has no {task} head of size {size}; it starts at random")
    problems = misfits(own, state)
    if problems:
        raise WeightsError(f"{source}: {name_arch(state, arch)} ({problems})")
    if notes:
        print("\n".join(notes))
    network.load_state_dict(state, strict=False)


def misfits(own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """Return what keeps a state dict from being copied into `own`, with the first keys of each kind; empty if nothing.

    Counters of batches may be missing: they are of no use, and old state dicts do not have them.
    """
    problems = {
        "missing": [key for key in own if key not in state and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state if key not in own],
        "of another shape or type": [key for key in own if key in state and not fits(state[key], own[key])],
        "not finite": [
            key
            for key in own
            if key in state and fits(state[key], own[key]) and not state[key].float().isfinite().all()
        ],
    }
    return "; ".join(
        f"{len(keys)} {kind}: {', '.join(shown(key.removeprefix(PREFIX)) for key in keys[:3])}"
        f"{', ...' if len(keys) > 3 else ''}"
        for kind, keys in problems.items()
        if keys
    )


def name_arch(state: dict[str, Tensor], arch: str) -> str:
    """Return in words that a state dict is not that of `arch`, and which architecture's backbone fits it instead."""
    state = {key: value for key, value in state.items() if key.startswith(PREFIX)}
    for other in BACKBONES:
        with torch.device("meta"):
            backbone = BACKBONES[other]()
        unused = tuple(PREFIX + prefix for prefix in backbone.unused_weights)
        candidate = {key: value for key, value in state.items() if not key.startswith(unused)}
        own = {PREFIX + key: value for key, value in backbone.layers.state_dict().items()}
        if other != arch and not misfits(own, candidate):
            return f"these are the weights of {other}, not of {arch}; --arch {other}"
    return f"not the weights of torchvision's {arch}"


def shown(value: object) -> str:
    """Return a value of unknown origin as one short line."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def fits(value: Tensor, own: Tensor) -> bool:
    """Tell whether a stored tensor can be copied into the network's own."""
    is_plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    return is_plain and value.shape == own.shape and value.is_floating_point() == own.is_floating_point()


def describe_graph(
    network: EmbeddingNetwork, img_size: int
) -> tuple[dict[str, tuple[str, list[str]]], list[tuple[str, str]]]:
    """Return the network as a graph of its stages: {name: (kind, lines of text)} and edges (name, name).

    The kinds are data, layer and head. The lines say what the stage is, its output for one image of img_size pixels,
    and its parameters.
    """
    stages, n_early = trace_stages(network, img_size)
    chain = ["images", *stages, "Pooled"]
    early = chain[n_early]
    early_size = 16 * stages[early][1][0]
    nodes = {"images": ("data", ["images", "RGB, normalised", f"3 x {img_size} x {img_size}"])}
    for name, (what, shape, n_parameters) in stages.items():
        counted = [f"{n_parameters:,} parameters"] if n_parameters else []
        nodes[name] = ("layer", [name, what, " x ".join(map(str, shape)), *counted])
    nodes["Early"] = ("data", ["Early", "4 x 4 average pooling, L2", str(early_size), "for the first clustering"])
    nodes["Pooled"] = ("data", ["Pooled", str(network.backbone.out_features)])
    for task, head in network.heads.items():
        counted = f"{sum(values.numel() for values in head.parameters()):,} parameters"
        nodes[task] = ("head", [task, "Linear, L2", str(head.out_features), counted])
    edges = [*zip(chain, chain[1:]), (early, "Early"), *(("Pooled", task) for task in network.heads)]
    return nodes, edges


def trace_stages(network: EmbeddingNetwork, img_size: int) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], int]:
    """Return the direct children of torchvision's network in the order they run, and how many of them early_maps runs.

    By name: (what it is, shape of its output for one image, number of parameters).
    """
    stages: dict[str, tuple[str, tuple[int, ...], int]] = {}

    def record(name: str, module: nn.Module, output: Tensor) -> None:
        """Take what one child did."""
        what = type(module).__name__
        if isinstance(module, nn.Sequential):
            what = f"{len(module)} x {type(module[0]).__name__}"
        stages[name] = (what, tuple(output.shape[1:]), sum(values.numel() for values in module.parameters()))

    backbone, was_training = network.backbone, network.training
    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: record(name, module, output))
        for name, module in backbone.layers.named_children()
    ]
    network.eval()
    try:
        with torch.no_grad():
            early_maps = backbone.early_maps(torch.zeros(1, 3, img_size, img_size, device=network.mean.device))
            n_early = len(stages)
            backbone.pooled(early_maps)
    finally:
        for handle in handles:
            handle.remove()
        network.train(was_training)
    return stages, n_early
