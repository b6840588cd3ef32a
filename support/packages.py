"""Optional packages: importing them, models of timm, losses of pytorch-metric-learning."""

import difflib
import importlib
import inspect
import shutil
from types import ModuleType

import torch
from torch import Tensor, nn

from support.errors import InputError, first_line


def imported(module: str, package: str, flag: str) -> ModuleType:
    """Import a module of an optional package, or a module that needs such a package.

    Args:
        package: name of the package for pip.
        flag: flag that needs the package, for messages.

    Raises:
        InputError: the package is missing or cannot be imported; the message says which, and why.
    """
    try:
        importlib.import_module(package.replace("-", "_"))
        return importlib.import_module(module)
    except Exception as error:  # imports raise almost anything when packages do not fit together
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{flag}: cannot import {package} ({reason}); try pip install {package}") from error


class TimmBackbone(nn.Module):
    """A model of timm as a backbone: an early feature map, and the pooled features before the classifier.

    The early map is the first one at a quarter of the image's side; for a transformer, the grid of patches after a
    quarter of the blocks.

    Args:
        name: name of the model in timm, with or without a tag.
        img_size: side of the images in pixels.

    Raises:
        InputError: timm is missing, has no such model, or the model cannot take this size.
    """

    def __init__(self, name: str, img_size: int):
        super().__init__()
        imported_timm(name)
        try:
            self.layers = create_timm_model(name, img_size)
            reductions = [stage["reduction"] for stage in self.layers.feature_info]
            self.early = reductions.index(4) if 4 in reductions else max(len(reductions) // 4, 1) - 1
            with torch.no_grad():
                self.eval()(torch.zeros(1, 3, img_size, img_size))
        except (AssertionError, ValueError, RuntimeError) as error:
            raise InputError(f"--img_size {img_size}: timm/{name} cannot take it ({first_line(error)})") from error
        config = self.layers.pretrained_cfg
        self.mean, self.std, self.out_features = config["mean"], config["std"], self.layers.head_hidden_size
        classifiers = [config["classifier"]] if isinstance(config["classifier"], str) else config["classifier"]
        self.unused_weights = tuple(f"{name}." for name in classifiers)

    def forward(self, images: Tensor, with_pooled: bool = True) -> tuple[Tensor, Tensor | None]:
        """Return early maps (B, C, h, w) and pooled features (B, F) of normalised images (B, 3, H, W)."""
        options = {"indices": [self.early], "stop_early": not with_pooled, "intermediates_only": not with_pooled}
        intermediates = self.layers.forward_intermediates(images, **options)
        if not with_pooled:
            return intermediates[0], None
        features, (early_maps,) = intermediates
        return early_maps, self.layers.forward_head(features, pre_logits=True)


def create_timm_model(name: str, img_size: int, pretrained: bool = False) -> nn.Module:
    """Return a model of timm without its classifier.

    Raises:
        InputError: see imported_timm.
    """
    timm = imported_timm(name)
    try:
        # Transformers need the image size
        return timm.create_model(name, pretrained, num_classes=0, img_size=img_size)
    except TypeError:  # convolutional networks take images of any size, and no such argument
        return timm.create_model(name, pretrained, num_classes=0)


def imported_timm(name: str) -> ModuleType:
    """Import timm, and check that it has a model of this name, with or without a tag.

    Raises:
        InputError: timm cannot be imported (see imported), or has no such model.
    """
    timm = imported("timm", "timm", f"--arch timm/{name}")
    models, pretrained = timm.list_models(), timm.list_pretrained()
    architecture, _, tag = name.partition(".")
    if architecture not in models or (tag and name not in pretrained):
        near = difflib.get_close_matches(name, pretrained if tag else models, 3, 0)
        raise InputError(f"--arch timm/{name}: timm {timm.__version__} has no such model; similar: {', '.join(near)}")
    return timm


def resample_grid(layers: nn.Module, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Resample a transformer's position embeddings in a state dict to the grid of its network.

    Args:
        layers: the network.
        state: the state dict; it is returned unchanged if nothing has to be resampled.
        prefix: prefix of its keys.
    """
    name, pos_embed = f"{prefix}pos_embed", getattr(layers, "pos_embed", None)
    if pos_embed is None or name not in state or state[name].ndim != 3 or state[name].shape == pos_embed.shape:
        return state
    from timm.layers import resample_abs_pos_embed

    n_prefix = 0 if getattr(layers, "no_embed_class", False) else layers.num_prefix_tokens
    grid = layers.patch_embed.grid_size
    return state | {name: resample_abs_pos_embed(state[name], list(grid), num_prefix_tokens=n_prefix)}


def library_loss(name: str, n_classes: int, embed_size: int) -> nn.Module:
    """Return a loss of the package pytorch-metric-learning with its own defaults, for `--losses pml/NAME`.

    Args:
        name: name of the loss class.
        n_classes: passed to losses whose constructor requires it.
        embed_size: passed to losses whose constructor requires it.

    Raises:
        InputError: the package or the loss does not exist, or its constructor needs more arguments.
    """
    kind = library_loss_class(name)
    sizes = {"num_classes": n_classes, "embedding_size": embed_size, "descriptors_dim": embed_size}
    try:
        return kind(**{name: size for name, size in sizes.items() if asks_for(kind, name)})
    except TypeError as error:
        raise InputError(f"--losses pml/{name}: needs more than embeddings and labels ({first_line(error)})") from error


def asks_for(kind: type, argument: str) -> bool:
    """Tell whether the constructor of a class, or of a base class, has a parameter of this name without a default."""
    signatures = [inspect.signature(base.__init__) for base in kind.__mro__ if "__init__" in vars(base)]
    parameters = [signature.parameters[argument] for signature in signatures if argument in signature.parameters]
    return any(parameter.default is inspect.Parameter.empty for parameter in parameters)


def library_loss_class(name: str) -> type[nn.Module]:
    """Return a loss class of pytorch-metric-learning.

    Raises:
        InputError: the package cannot be imported (see imported), or has no such loss.
    """
    library = imported("pytorch_metric_learning.losses", "pytorch-metric-learning", f"--losses pml/{name}")
    base = library.BaseMetricLossFunction
    kinds = [kind for kind in vars(library).values() if isinstance(kind, type) and issubclass(kind, base)]
    losses = {kind.__name__: kind for kind in kinds if kind is not base}
    if name not in losses:
        near = ", ".join(difflib.get_close_matches(name, losses, 3, 0))
        raise InputError(f"--losses pml/{name}: pytorch-metric-learning has no such loss; similar: {near}")
    return losses[name]


def require_graphviz() -> None:
    """Check that network_graph can draw.

    Raises:
        InputError: a package, or the program dot, is missing.
    """
    for package in ("torchview", "graphviz"):
        imported(package, package, "--make_graph")
    if not shutil.which("dot"):
        raise InputError("--make_graph: Graphviz's program dot is missing: https://graphviz.org/download")


def network_graph(network: torch.nn.Module, img_size: int) -> bytes:
    """Draw the graph of a network's blocks, for images of img_size pixels, as SVG; see require_graphviz."""
    import torchview  # an optional package

    image = torch.zeros(1, 3, img_size, img_size, dtype=torch.uint8)
    graph = torchview.draw_graph(network, image, device=next(network.parameters()).device, depth=2)
    return graph.visual_graph.pipe(format="svg", quiet=True)
