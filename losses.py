"""Triplet samplers, embedding losses and the adversarial term.

Shapes: a batch holds B embeddings of D dimensions with B integer labels; T triplets are a (T, 3) tensor of batch
indices (anchor, positive, negative). Everything runs on the tensors' own device without a copy to the host.
"""

import inspect
from argparse import Namespace
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.packages import LibraryLoss

DISTANCE_FLOOR = 0.5
EPSILON = 1e-8


def full_precision(values: Tensor) -> Tensor:
    """Return `values` in float32, or unchanged where they are float64."""
    return values if values.dtype == torch.float64 else values.float()


def pairwise_squared_distances(embeddings: Tensor) -> Tensor:
    """Return the (B, B) squared Euclidean distances of (B, D) embeddings, in float32 or better even under autocast."""
    with torch.autocast(embeddings.device.type, enabled=False):
        embeddings = full_precision(embeddings)
        squared_norms = embeddings.square().sum(1)
        return torch.addmm(squared_norms[:, None] + squared_norms, embeddings, embeddings.T, alpha=-2).clamp_(min=0)


def triplet_distances(embeddings: Tensor, triplets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared distances anchor-positive and anchor-negative, (T,) each, of (T, 3) triplets."""
    rows = embeddings.index_select(0, triplets.T.reshape(-1)).view(3, -1, embeddings.shape[1])
    squared = (rows[:1] - rows[1:]).square().sum(2)
    return squared[0], squared[1]


def draw_index(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one column per row of (N, M) non-negative weights, with probability proportional to the weight, to 1e-6.

    Unlike torch.multinomial it never waits for the device. A row without a positive weight gives an arbitrary column.
    """
    cumulative = weights.cumsum(1)
    uniform = torch.rand(len(weights), 1, dtype=weights.dtype, device=weights.device, generator=generator)
    # Kept off the row's total by more than rounding, lest a draw fall behind the last positive weight
    threshold = uniform * cumulative[:, -1:] * (1 - 2**-20)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_(max=weights.shape[1] - 1)


def pair_masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (B, B) boolean masks (positive, negative): same label but not the same image, other label."""
    same = labels[:, None] == labels
    return same ^ torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


class TripletSampler:
    """Picks B triplets of a batch; a subclass says how.

    generator: on the embeddings' device; None is its default one, which torch.compile(fullgraph=True) needs.
    """

    def __init__(self, generator: torch.Generator | None = None):
        self.generator = generator

    def __call__(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Draw triplets.

        embeddings: (B, D) float, L2-normalised. labels: (B,) int.
        Returns triplets (B, 3) int64 and valid (B,) bool: False where no such triplet exists, because the batch lacks
        a positive or a negative. Row i has anchor i (except for RandomSampler).
        """
        embeddings = embeddings.detach()
        positive_mask, negative_mask = pair_masks(labels)
        valid = positive_mask.any(1) & negative_mask.any(1)
        anchors = torch.arange(len(labels), device=labels.device)
        positives = draw_index(positive_mask.float(), self.generator)
        negatives = draw_index(self.negative_weights(embeddings, positives, negative_mask), self.generator)
        return torch.stack([anchors, positives, negatives], 1), valid

    def negative_weights(self, embeddings: Tensor, positives: Tensor, negative_mask: Tensor) -> Tensor:
        """Return (B, B) weights in proportion to which each anchor's negative is drawn, 0 where that is impossible.

        positives: (B,) index of each anchor's positive. negative_mask: (B, B) bool.
        """
        raise NotImplementedError


class DistanceWeightedSampler(TripletSampler):
    """Distance-weighted sampling: negatives with probability proportional to 1 / q(d).

    q(d) is the density of pairwise distances of points spread uniformly on the unit sphere,
    log q(d) = (D - 2) log d + (D - 3)/2 log(1 - d^2/4), so that negatives of all distances are equally likely.
    d is clamped from below at 0.5, without an upper cut-off.
    Wu, Manmatha, Smola, Kraehenbuehl: Sampling Matters in Deep Embedding Learning, ICCV 2017, eq. 3 and 4.
    """

    def negative_weights(self, embeddings: Tensor, positives: Tensor, negative_mask: Tensor) -> Tensor:
        log_weights = inverse_density_log_weights(pairwise_squared_distances(embeddings), embeddings.shape[1])
        return log_weights.masked_fill_(~negative_mask, -torch.inf).softmax(1).nan_to_num_(0.0)


def inverse_density_log_weights(squared_distances: Tensor, dim: int) -> Tensor:
    """Return -log q(d) for squared distances d^2 in [0, 4] on the unit sphere in `dim` >= 2 dimensions.

    Finite everywhere: d is clamped from below at 0.5, and 1 - d^2/4 at 1e-8.
    """
    squared_distances = squared_distances.clamp(min=DISTANCE_FLOOR**2)
    opposite = (1 - squared_distances / 4).clamp_(min=EPSILON)
    return squared_distances.log_().mul_((2 - dim) / 2).sub_(opposite.log_(), alpha=(dim - 3) / 2)


class SemihardSampler(TripletSampler):
    """Semihard negatives: uniform among those with d_ap < d_an < d_ap + margin, else among all negatives.

    Schroff, Kalenichenko, Philbin: FaceNet, CVPR 2015, section 3.2 (there with squared distances).
    """

    def __init__(self, margin: float = 0.2, generator: torch.Generator | None = None):
        super().__init__(generator)
        self.margin = margin

    def negative_weights(self, embeddings: Tensor, positives: Tensor, negative_mask: Tensor) -> Tensor:
        distances = pairwise_squared_distances(embeddings).sqrt_()
        candidates = semihard_candidates(distances, positives, negative_mask, self.margin)
        return torch.where(candidates.any(1, keepdim=True), candidates, negative_mask).float()


def semihard_candidates(distances: Tensor, positives: Tensor, negative_mask: Tensor, margin: float) -> Tensor:
    """Return the (B, B) mask of negatives farther than the anchor's positive, but by less than the margin."""
    to_positive = distances.gather(1, positives[:, None])
    return negative_mask & (distances > to_positive) & (distances < to_positive + margin)


class RandomSampler(TripletSampler):
    """B draws, with replacement, from all valid triplets of the batch, each equally likely."""

    def __call__(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See TripletSampler. Rows are invalid only where the batch has no valid triplet at all."""
        positive_mask, negative_mask = pair_masks(labels)
        triplets_per_anchor = positive_mask.sum(1) * negative_mask.sum(1)
        anchors = draw_index(triplets_per_anchor.float().expand(len(labels), -1), self.generator)
        positives = draw_index(positive_mask[anchors].float(), self.generator)
        negatives = draw_index(negative_mask[anchors].float(), self.generator)
        return torch.stack([anchors, positives, negatives], 1), triplets_per_anchor[anchors] > 0


class TripletBasedLoss(nn.Module):
    """A loss over triplets that its sampler picks from the batch.

    sampler: maps (embeddings, labels) to (triplets, valid), see TripletSampler.
    """

    needs_positives = True

    def __init__(self, sampler: TripletSampler):
        super().__init__()
        self.sampler = sampler

    def forward(self, embeddings: Tensor, labels: Tensor, triplets: Tensor | None = None) -> Tensor:
        """Return the scalar loss of a batch, at least in float32; a differentiable zero without valid triplets.

        embeddings: (B, D) float, L2-normalised. labels: (B,) int64 class indices.
        triplets: optional (T, 3) int64 indices (anchor, positive, negative) into the batch, used in place of sampling.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = full_precision(embeddings)
            if triplets is None:
                triplets, valid = self.sampler(embeddings, labels)
            else:
                valid = torch.ones(len(triplets), dtype=torch.bool, device=embeddings.device)
            return self.triplet_loss(embeddings, labels, triplets, valid)

    def triplet_loss(self, embeddings: Tensor, labels: Tensor, triplets: Tensor, valid: Tensor) -> Tensor:
        """Return the scalar loss of (T, 3) triplets; those that are not valid (T,) take no part."""
        raise NotImplementedError

    def param_groups(self) -> list[dict]:
        """Return the optimiser groups of the loss's parameters, without weight decay."""
        return []


class TripletLoss(TripletBasedLoss):
    """Triplet loss: mean of relu(d_ap^2 - d_an^2 + margin).

    Schroff, Kalenichenko, Philbin: FaceNet, CVPR 2015, eq. 2. margin: in units of squared distance.
    """

    def __init__(self, sampler: TripletSampler, margin: float = 0.2):
        super().__init__(sampler)
        self.margin = margin

    def triplet_loss(self, embeddings: Tensor, labels: Tensor, triplets: Tensor, valid: Tensor) -> Tensor:
        """See TripletBasedLoss."""
        to_positive, to_negative = triplet_distances(embeddings, triplets)
        terms = F.relu(to_positive - to_negative + self.margin) * valid
        return terms.sum() / valid.sum().clamp(min=1)


class MarginLoss(TripletBasedLoss):
    """Margin loss with a trained boundary beta_y per class of the anchor.

    sum(relu(d_ap - beta_y + margin) + relu(beta_y - d_an + margin) + nu beta_y) / n_active with
    d = sqrt(|x - x'|^2 + 1e-8); n_active counts the non-zero relu terms of both kinds, no division where it is 0.
    Wu, Manmatha, Smola, Kraehenbuehl: Sampling Matters in Deep Embedding Learning, ICCV 2017, section 4.2.

    n_classes: labels are in [0, n_classes). margin, beta (initial boundary): distances. beta_lr: learning rate of the
    boundaries. nu: weight of the boundaries' regularisation.
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
        self.margin, self.beta_lr, self.nu = margin, beta_lr, nu
        self.beta = nn.Parameter(torch.full((n_classes,), float(beta)))

    def triplet_loss(self, embeddings: Tensor, labels: Tensor, triplets: Tensor, valid: Tensor) -> Tensor:
        """See TripletBasedLoss."""
        to_positive, to_negative = ((squared + EPSILON).sqrt() for squared in triplet_distances(embeddings, triplets))
        beta = self.beta.index_select(0, labels.index_select(0, triplets[:, 0]))
        positive_terms = F.relu(to_positive - beta + self.margin) * valid
        negative_terms = F.relu(beta - to_negative + self.margin) * valid
        n_active = (positive_terms > 0).sum() + (negative_terms > 0).sum()
        total = (positive_terms + negative_terms).sum()
        if self.nu:
            total = total + self.nu * (beta * valid).sum()
        return total / n_active.clamp(min=1)

    def param_groups(self) -> list[dict]:
        return [{"params": [self.beta], "lr": self.beta_lr, "weight_decay": 0.0}]


class ProxyNCALoss(nn.Module):
    """ProxyNCA: mean over the batch of |x - p_y|^2 + logsumexp over c != y of -|x - p_c|^2.

    One trained proxy p_c per class; embeddings and proxies are L2-normalised and scaled by 3.
    Movshovitz-Attias, Toshev, Leung, Ioffe, Singh: No Fuss Distance Metric Learning using Proxies, ICCV 2017, eq. 4.

    n_classes: at least 2; labels are in [0, n_classes). embed_size: D. proxy_lr: learning rate of the proxies.
    Raises ValueError for fewer than two classes: there would be no negative proxy.
    """

    SCALE = 3.0
    needs_positives = False

    def __init__(self, n_classes: int, embed_size: int, proxy_lr: float = 1e-5):
        super().__init__()
        if n_classes < 2:
            raise ValueError(f"ProxyNCA needs at least 2 classes, got {n_classes}")
        self.proxy_lr = proxy_lr
        self.proxies = nn.Parameter(torch.randn(n_classes, embed_size) / 8)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of (B, D) float embeddings with (B,) int64 labels, at least in float32."""
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = F.normalize(full_precision(embeddings), dim=1)
            cosines = embeddings @ F.normalize(self.proxies, dim=1).to(embeddings.dtype).T
            squared = 2 * self.SCALE**2 * (1 - cosines)
            of_class = labels[:, None]
            to_others = (-squared).scatter(1, of_class, -torch.inf)
            return (squared.gather(1, of_class).squeeze(1) + to_others.logsumexp(1)).mean()

    def param_groups(self) -> list[dict]:
        return [{"params": [self.proxies], "lr": self.proxy_lr, "weight_decay": 0.0}]


def reverse_gradient(values: Tensor) -> Tensor:
    """Return the same values with a gradient of opposite sign (gradient reversal, Ganin and Lempitsky, ICML 2015)."""
    return 2 * values.detach() - values


class AdversarialLoss(nn.Module):
    """Adversarial decorrelation of two embeddings, one direction target-source.

    L = - mean over batch and dimensions of (t * normalise(R(s)))^2 with gradient reversal on t and s and a projection
    network R = Linear(D_source, hidden_size), ReLU, Linear(hidden_size, D_target). R learns to correlate the two, the
    reversed gradients drive the encoders apart. MIC paper, section 3.3.

    lr, weight_decay: of the projection network in the optimiser.
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
        """Return the scalar term of (B, D_target) and (B, D_source) float embeddings; both are L2-normalised here."""
        with torch.autocast(target.device.type, enabled=False):
            target, source = (
                reverse_gradient(F.normalize(full_precision(values), dim=1)) for values in (target, source)
            )
            projected = self.projection(source.to(self.projection[0].weight.dtype))
            return -(target * F.normalize(projected, dim=1)).square().mean()

    def param_groups(self) -> list[dict]:
        return [{"params": list(self.parameters()), "lr": self.lr, "weight_decay": self.weight_decay}]


class Objective(nn.Module):
    """What a training step minimises: its task's loss plus the weighted adversarial terms (MIC paper, section 3.3).

    task_losses: the loss of each task. adversaries: direction "target-source" to (term, weight).
    """

    def __init__(self, task_losses: Mapping[str, nn.Module], adversaries: Mapping[str, tuple[AdversarialLoss, float]]):
        super().__init__()
        self.task_losses = nn.ModuleDict(task_losses)
        self.adversaries = nn.ModuleDict({direction: term for direction, (term, _) in adversaries.items()})
        self.weights = {direction: weight for direction, (_, weight) in adversaries.items()}

    def heads(self, task: str) -> list[str]:
        """Return the heads that a step of a task needs: its own, and with an adversarial term all."""
        return list(self.task_losses) if self.adversaries else [task]

    def forward(self, task: str, embeddings: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the terms of a step by name, whose sum is its loss.

        embeddings: {head: (B, D)} of the task's batch. labels: (B,) int64, of the task.
        """
        terms = {task: self.task_losses[task](embeddings[task], labels)}
        for direction, adversary in self.adversaries.items():
            target, source = direction.split("-")
            terms[direction] = self.weights[direction] * adversary(embeddings[target], embeddings[source])
        return terms

    def param_groups(self) -> list[dict]:
        """Return the optimiser groups of all losses and terms."""
        terms = [*self.task_losses.values(), *self.adversaries.values()]
        return [group for term in terms for group in term.param_groups()]


SAMPLERS = {"distance": DistanceWeightedSampler, "semihard": SemihardSampler, "random": RandomSampler}
LOSSES = {"marginloss": MarginLoss, "triplet": TripletLoss, "proxynca": ProxyNCALoss}
"""Samplers and losses by flag name; their constructors name the values of build_loss that they need."""


def takes_sampler(name: str) -> bool:
    """Tell whether the loss `name` works on triplets that a sampler picks."""
    return name in LOSSES and "sampler" in inspect.signature(LOSSES[name]).parameters


def needs_positives(name: str) -> bool:
    """Tell whether the loss `name` is of LOSSES and needs several images of a class in a batch."""
    return name in LOSSES and LOSSES[name].needs_positives


def build_loss(name: str, sampling: str, **values: float) -> nn.Module:
    """Build the loss `name` of LOSSES with the sampler `sampling` of SAMPLERS.

    values: n_classes, embed_size and the task's flags, see options.PAIRS; each constructor takes those that it names.
    A name pml/NAME is a LibraryLoss, without sampler. Raises KeyError for a name that the registries do not hold.
    """

    def named_by(kind: type) -> dict[str, object]:
        """Return the values that a constructor names."""
        return {name: values[name] for name in inspect.signature(kind).parameters if name in values}

    if name.startswith("pml/"):
        return LibraryLoss(name.removeprefix("pml/"), **named_by(LibraryLoss))
    if takes_sampler(name):
        values["sampler"] = SAMPLERS[sampling](**named_by(SAMPLERS[sampling]))
    return LOSSES[name](**named_by(LOSSES[name]))


def build_objective(
    tasks: Mapping[str, Namespace],
    n_classes: Mapping[str, int],
    directions: Mapping[str, float],
    adv_dim: int,
    lr: float,
) -> Objective:
    """Build the loss of each task and the adversarial term of each direction that has a weight.

    tasks: the flags of each task, see options.PAIRS. n_classes: of each task. directions: "target-source" to weight.
    adv_dim: hidden width of the projection networks. lr: their learning rate.
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
