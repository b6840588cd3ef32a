"""Triplet samplers, losses, the adversarial term, and the objective of a training step.

Shapes: a batch holds B embeddings of D dimensions with B integer labels; T triplets are a (T, 3) tensor of batch
indices (anchor, positive, negative). Nothing here but LibraryLoss waits for the GPU or branches on the values of a
tensor, so that a step compiles to one graph. Objective calls the losses in full precision, outside autocast.
"""

import inspect
from argparse import Namespace
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import packages

DISTANCE_FLOOR = 0.5
EPSILON = 1e-8


def pairwise_squared_distances(embeddings: Tensor) -> Tensor:
    """Return the (B, B) squared Euclidean distances of (B, D) embeddings."""
    squared_norms = embeddings.square().sum(1)
    return torch.addmm(squared_norms[:, None] + squared_norms, embeddings, embeddings.T, alpha=-2).clamp_(min=0)


def squared_triplet_distances(embeddings: Tensor, triplets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared distances d_ap^2 and d_an^2, (T,) each, of (T, 3) triplets of (B, D) embeddings."""
    anchor_positive_negative = embeddings.index_select(0, triplets.T.reshape(-1)).view(3, -1, embeddings.shape[1])
    squared = (anchor_positive_negative[:1] - anchor_positive_negative[1:]).square().sum(2)
    return squared[0], squared[1]


def draw_index(weights: Tensor) -> Tensor:
    """Draw one column per row of (N, M) non-negative weights, with probabilities proportional to them (within 1e-6).

    Unlike torch.multinomial it never waits for the device. A row without a positive weight gives an arbitrary column.
    """
    cumulative = weights.cumsum(1)
    uniform = torch.rand(len(weights), 1, dtype=weights.dtype, device=weights.device)
    # Shrink slightly, so that rounding cannot push the draw past the last positive weight
    threshold = uniform * cumulative[:, -1:] * (1 - 2**-20)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_(max=weights.shape[1] - 1)


def pair_masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (B, B) boolean masks of positives (same label, another image) and negatives (another label)."""
    same = labels[:, None] == labels
    return same ^ torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


class TripletSampler:
    """Draw one triplet per image of a batch; a subclass says how negatives are drawn."""

    def __call__(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Draw triplets.

        Args:
            embeddings: (B, D) float, L2-normalised.
            labels: (B,) int.

        Returns:
            triplets: (B, 3) int64. Row i has anchor i (except for RandomSampler).
            valid: (B,) bool, False if the batch holds no positive or no negative of the anchor.
        """
        embeddings = embeddings.detach()
        positive_mask, negative_mask = pair_masks(labels)
        valid = positive_mask.any(1) & negative_mask.any(1)
        anchors = torch.arange(len(labels), device=labels.device)
        positives = draw_index(positive_mask.float())
        negatives = draw_index(self.negative_weights(embeddings, positives, negative_mask))
        return torch.stack([anchors, positives, negatives], 1), valid

    def negative_weights(self, embeddings: Tensor, positives: Tensor, negative_mask: Tensor) -> Tensor:
        """Return (B, B) weights with which the negative of each anchor (row) is drawn; 0 if an image is not a negative.

        Args:
            embeddings: (B, D) float, without gradient.
            positives: (B,) int64, the index of each anchor's positive.
            negative_mask: (B, B) bool.
        """
        raise NotImplementedError


class DistanceWeightedSampler(TripletSampler):
    """Draw each negative in proportion to 1 / q(d), so that all distances d are about equally likely.

    q(d) is the density of pairwise distances of points spread uniformly on the unit sphere,
    log q(d) = (D - 2) log d + (D - 3)/2 log(1 - d^2/4). d is clamped from below at 0.5, without an upper cut-off.

    Reference:
        Wu, Manmatha, Smola, Kraehenbuehl: Sampling Matters in Deep Embedding Learning, ICCV 2017, eq. 3 and 4.
    """

    def negative_weights(self, embeddings: Tensor, positives: Tensor, negative_mask: Tensor) -> Tensor:
        log_weights = inverse_density_log_weights(pairwise_squared_distances(embeddings), embeddings.shape[1])
        return log_weights.masked_fill_(~negative_mask, -torch.inf).softmax(1).nan_to_num_(0.0)


def inverse_density_log_weights(squared_distances: Tensor, dim: int) -> Tensor:
    """Return -log q(d) for squared distances d^2 in [0, 4] on the unit sphere in `dim` >= 2 dimensions.

    The result is always finite: d is clamped from below at 0.5, and 1 - d^2/4 at 1e-8.
    """
    squared_distances = squared_distances.clamp(min=DISTANCE_FLOOR**2)
    opposite = (1 - squared_distances / 4).clamp_(min=EPSILON)
    return squared_distances.log_().mul_((2 - dim) / 2).sub_(opposite.log_(), alpha=(dim - 3) / 2)


class SemihardSampler(TripletSampler):
    """Draw negatives uniformly from those with d_ap < d_an < d_ap + margin; if there are none, from all negatives.

    Reference:
        Schroff, Kalenichenko, Philbin: FaceNet, CVPR 2015, section 3.2 (there with squared distances).
    """

    def __init__(self, margin: float = 0.2):
        self.margin = margin

    def negative_weights(self, embeddings: Tensor, positives: Tensor, negative_mask: Tensor) -> Tensor:
        distances = pairwise_squared_distances(embeddings).sqrt_()
        candidates = semihard_candidates(distances, positives, negative_mask, self.margin)
        return torch.where(candidates.any(1, keepdim=True), candidates, negative_mask).float()


def semihard_candidates(distances: Tensor, positives: Tensor, negative_mask: Tensor, margin: float) -> Tensor:
    """Return the (B, B) mask of negatives with d_ap < d_an < d_ap + margin."""
    d_ap = distances.gather(1, positives[:, None])
    return negative_mask & (distances > d_ap) & (distances < d_ap + margin)


class RandomSampler(TripletSampler):
    """Draw B times, with replacement, from all triplets of the batch, each with equal probability."""

    def __call__(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See TripletSampler. Rows are invalid only if the batch has no triplet at all."""
        positive_mask, negative_mask = pair_masks(labels)
        triplets_per_anchor = positive_mask.sum(1) * negative_mask.sum(1)
        anchors = draw_index(triplets_per_anchor.float().expand(len(labels), -1))
        positives = draw_index(positive_mask[anchors].float())
        negatives = draw_index(negative_mask[anchors].float())
        return torch.stack([anchors, positives, negatives], 1), triplets_per_anchor[anchors] > 0


class Loss(nn.Module):
    """Base class of losses on a batch of embeddings.

    A subclass defines `forward` and is entered in LOSSES; everything else has a default. build_loss passes its
    constructor the arguments that it names: flags of the task, n_classes, embed_size, or a triplet sampler.

    Attributes:
        needs_positives: whether a batch has to hold several images of a class; if not, --cs_per_bs is 1 (except for
            pml/NAME).
        learning_rate: learning rate of the loss's own parameters; set by losses that have any.
    """

    needs_positives = True
    learning_rate: float

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch.

        Args:
            embeddings: (B, D) float32 (float64 in an objective of float64), L2-normalised.
            labels: (B,) int64 in [0, n_classes).

        Returns:
            A scalar; a differentiable zero if the batch holds nothing to learn from.
        """
        raise NotImplementedError

    def param_groups(self) -> list[dict]:
        """Return parameter groups of the loss's own parameters for the optimiser, without weight decay."""
        parameters = list(self.parameters())
        return [{"params": parameters, "lr": self.learning_rate, "weight_decay": 0.0}] if parameters else []


class TripletBasedLoss(Loss):
    """A loss over the triplets that a sampler picks from the batch; a subclass defines `triplet_loss`.

    Args:
        sampler: maps (embeddings, labels) to (triplets, valid), see TripletSampler.
    """

    def __init__(self, sampler: TripletSampler):
        super().__init__()
        self.sampler = sampler

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """See Loss."""
        return self.triplet_loss(embeddings, labels, *self.sampler(embeddings, labels))

    def triplet_loss(self, embeddings: Tensor, labels: Tensor, triplets: Tensor, valid: Tensor) -> Tensor:
        """Return the scalar loss of the triplets (T, 3) that are valid, (T,) bool."""
        raise NotImplementedError


class TripletLoss(TripletBasedLoss):
    """Triplet loss: mean of relu(d_ap^2 - d_an^2 + margin).

    Args:
        margin: in units of squared distance.

    Reference:
        Schroff, Kalenichenko, Philbin: FaceNet, CVPR 2015, eq. 2.
    """

    def __init__(self, sampler: TripletSampler, margin: float = 0.2):
        super().__init__(sampler)
        self.margin = margin

    def triplet_loss(self, embeddings: Tensor, labels: Tensor, triplets: Tensor, valid: Tensor) -> Tensor:
        """See TripletBasedLoss."""
        squared_ap, squared_an = squared_triplet_distances(embeddings, triplets)
        terms = F.relu(squared_ap - squared_an + self.margin) * valid
        return terms.sum() / valid.sum().clamp(min=1)


class MarginLoss(TripletBasedLoss):
    """Margin loss with a trained boundary beta_y for each class y of the anchor.

    sum(relu(d_ap - beta_y + margin) + relu(beta_y - d_an + margin) + nu beta_y) / n_active, where
    d = sqrt(|x - x'|^2 + 1e-8) and n_active, at least 1, counts the relu terms of both kinds that are not zero.

    Args:
        margin: a distance.
        beta: initial boundary of all classes, a distance.
        beta_lr: learning rate of the boundaries.
        nu: weight of the boundaries' regularisation.

    Reference:
        Wu, Manmatha, Smola, Kraehenbuehl: Sampling Matters in Deep Embedding Learning, ICCV 2017, section 4.2.
    """

    def __init__(
        self,
        sampler: TripletSampler,
        n_classes: int,
        margin: float = 0.2,
        beta: float = 1.2,
        beta_lr: float = 5e-4,
        nu: float = 0.0,
    ):
        super().__init__(sampler)
        self.margin, self.nu, self.learning_rate = margin, nu, beta_lr
        self.beta = nn.Parameter(torch.full((n_classes,), float(beta)))

    def triplet_loss(self, embeddings: Tensor, labels: Tensor, triplets: Tensor, valid: Tensor) -> Tensor:
        """See TripletBasedLoss."""
        squared_ap, squared_an = squared_triplet_distances(embeddings, triplets)
        d_ap, d_an = (squared_ap + EPSILON).sqrt(), (squared_an + EPSILON).sqrt()
        anchor = triplets[:, 0]
        beta = self.beta.index_select(0, labels.index_select(0, anchor))
        positive_terms = F.relu(d_ap - beta + self.margin) * valid
        negative_terms = F.relu(beta - d_an + self.margin) * valid
        n_active = (positive_terms > 0).sum() + (negative_terms > 0).sum()
        total = (positive_terms + negative_terms).sum()
        if self.nu:
            total = total + self.nu * (beta * valid).sum()
        return total / n_active.clamp(min=1)


class ProxyNCALoss(Loss):
    """ProxyNCA: mean over the batch of |x - p_y|^2 + logsumexp over c != y of -|x - p_c|^2.

    One trained proxy p_c per class; embeddings and proxies are L2-normalised and scaled by 3.

    Args:
        proxy_lr: learning rate of the proxies.

    Reference:
        Movshovitz-Attias, Toshev, Leung, Ioffe, Singh: No Fuss Distance Metric Learning using Proxies, ICCV 2017,
        eq. 4.
    """

    needs_positives = False
    SCALE = 3.0

    def __init__(self, n_classes: int, embed_size: int, proxy_lr: float = 1e-5):
        super().__init__()
        self.learning_rate = proxy_lr
        self.proxies = nn.Parameter(torch.randn(n_classes, embed_size) / 8)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """See Loss."""
        cosines = F.normalize(embeddings, dim=1) @ F.normalize(self.proxies, dim=1).T
        squared = 2 * self.SCALE**2 * (1 - cosines)
        positive = labels[:, None]  # the index of the proxy of the image's class; the others are negative
        to_positive = squared.gather(1, positive).squeeze(1)
        to_negatives = (-squared).scatter(1, positive, -torch.inf)
        return (to_positive + to_negatives.logsumexp(1)).mean()


class LibraryLoss(Loss):
    """A loss of the package pytorch-metric-learning, named pml/NAME, see packages.library_loss.

    Args:
        proxy_lr: learning rate of the loss's own parameters.
    """

    needs_positives = False  # some do need them, but options.check leaves --cs_per_bs to the user

    def __init__(self, name: str, n_classes: int, embed_size: int, proxy_lr: float = 1e-5):
        super().__init__()
        self.learning_rate = proxy_lr
        self.loss = packages.library_loss(name, n_classes, embed_size)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """See Loss."""
        return self.loss(embeddings, labels)


def reverse_gradient(values: Tensor) -> Tensor:
    """Return the same values, with a gradient of opposite sign.

    Reference:
        Ganin, Lempitsky: Unsupervised Domain Adaptation by Backpropagation, ICML 2015.
    """
    return 2 * values.detach() - values


class AdversarialLoss(nn.Module):
    """Adversarial term that makes a target embedding independent of a source embedding.

    The term is -mean((t * normalise(R(s)))^2) over batch and dimensions, where t and s are target and source with
    reversed gradients, and R is a projection network: Linear(D_source, hidden_size), ReLU, Linear(hidden_size,
    D_target). R learns to correlate the two embeddings; the reversed gradients decorrelate them.

    Args:
        target_size: D_target.
        source_size: D_source.
        hidden_size: hidden width of R.
        lr: learning rate of R.
        weight_decay: weight decay of R.

    Reference:
        Roth, Brattoli, Ommer: MIC: Mining Interclass Characteristics for Improved Metric Learning, ICCV 2019,
        section 3.3.
    """

    def __init__(
        self, target_size: int, source_size: int, hidden_size: int = 512, lr: float = 1e-5, weight_decay: float = 1e-6
    ):
        super().__init__()
        self.lr, self.weight_decay = lr, weight_decay
        self.projection = nn.Sequential(
            nn.Linear(source_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, target_size)
        )

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        """Return the scalar term of (B, D_target) and (B, D_source) embeddings; both are L2-normalised here."""
        target = reverse_gradient(F.normalize(target, dim=1))
        source = reverse_gradient(F.normalize(source, dim=1))
        return -(target * F.normalize(self.projection(source), dim=1)).square().mean()

    def param_groups(self) -> list[dict]:
        """Return the parameter group of the projection network for the optimiser."""
        return [{"params": list(self.parameters()), "lr": self.lr, "weight_decay": self.weight_decay}]


class Objective(nn.Module):
    """What a training step minimises: the loss of its task and the weighted adversarial terms.

    Args:
        task_losses: {task: its Loss}.
        adversaries: {direction "target-source": (term, weight)}.
    """

    def __init__(self, task_losses: Mapping[str, Loss], adversaries: Mapping[str, tuple[AdversarialLoss, float]]):
        super().__init__()
        self.task_losses = nn.ModuleDict(task_losses)
        self.adversaries = nn.ModuleDict({direction: term for direction, (term, _) in adversaries.items()})
        self.weights = {direction: weight for direction, (_, weight) in adversaries.items()}

    def heads(self, task: str) -> list[str]:
        """Return the heads that a step of a task needs: its own or, if there is an adversarial term, all."""
        return list(self.task_losses) if self.adversaries else [task]

    def forward(self, task: str, embeddings: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the terms of a step by name; their sum is its loss. All are computed in full precision.

        Args:
            task: the task of the step.
            embeddings: {head: (B, D)} of its batch.
            labels: (B,) int64, of the task.
        """
        with torch.autocast(labels.device.type, enabled=False):
            embeddings = {head: full_precision(values) for head, values in embeddings.items()}
            terms = {task: self.task_losses[task](embeddings[task], labels)}
            for direction, adversary in self.adversaries.items():
                target, source = direction.split("-")
                terms[direction] = self.weights[direction] * adversary(embeddings[target], embeddings[source])
        return terms

    def param_groups(self) -> list[dict]:
        """Return the parameter groups of all losses and terms for the optimiser."""
        terms = [*self.task_losses.values(), *self.adversaries.values()]
        return [group for term in terms for group in term.param_groups()]


def full_precision(values: Tensor) -> Tensor:
    """Return values in float32, or unchanged if they are float64."""
    return values if values.dtype == torch.float64 else values.float()


SAMPLERS = {"distance": DistanceWeightedSampler, "semihard": SemihardSampler, "random": RandomSampler}
LOSSES = {"marginloss": MarginLoss, "triplet": TripletLoss, "proxynca": ProxyNCALoss}
"""Samplers and losses by the names that --sampling and --losses take."""


def loss_class(name: str) -> type[Loss]:
    """Return the class of a loss, given a name in LOSSES or pml/NAME."""
    return LibraryLoss if name.startswith("pml/") else LOSSES[name]


def takes_sampler(name: str) -> bool:
    """Tell whether a loss works on triplets that a sampler picks."""
    return "sampler" in inspect.signature(loss_class(name)).parameters


def build_loss(name: str, sampling: str, **values: float) -> Loss:
    """Build a loss; its constructor and that of its sampler get the `values` that they have parameters for.

    Args:
        name: a name in LOSSES, or pml/NAME.
        sampling: a name in SAMPLERS; ignored by losses without a sampler.
        **values: n_classes, embed_size and the task's flags, see options.PAIRS.
    """

    def built(kind: type, **more: object) -> object:
        """Call a constructor with those of the values that are its parameters."""
        parameters = inspect.signature(kind).parameters
        return kind(**{key: value for key, value in (values | more).items() if key in parameters})

    sampler = built(SAMPLERS[sampling]) if takes_sampler(name) else None
    return built(loss_class(name), sampler=sampler, name=name.removeprefix("pml/"))


def build_objective(
    tasks: Mapping[str, Namespace],
    n_classes: Mapping[str, int],
    directions: Mapping[str, float],
    adv_dim: int,
    lr: float,
) -> Objective:
    """Build the loss of each task and the adversarial term of each direction that has a weight.

    Args:
        tasks: {task: its flags}, see options.PAIRS.
        n_classes: {task: its number of classes}.
        directions: {"target-source": weight}.
        adv_dim: hidden width of the projection networks.
        lr: their learning rate.
    """
    task_losses, adversaries = {}, {}
    for name, task in tasks.items():
        values = vars(task) | {"n_classes": n_classes[name], "embed_size": task.embed_sizes}
        task_losses[name] = build_loss(values.pop("losses"), values.pop("sampling"), **values)
    for direction, weight in directions.items():
        if weight > 0:
            target, source = (tasks[name].embed_sizes for name in direction.split("-"))
            adversaries[direction] = AdversarialLoss(target, source, adv_dim, lr), weight
    return Objective(task_losses, adversaries)
