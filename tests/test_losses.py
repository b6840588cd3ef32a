"""Losses and samplers against golden values, naive float64 loops, finite differences and their distributions."""

import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_thread
from scipy.stats import chisquare
from torch.nn.functional import normalize

import losses

GOLDEN = Path(__file__).parent / "golden"
TRIPLET_LOSSES = [name for name in losses.LOSSES if losses.takes_sampler(name)]
STEPS = [(name, "distance") for name in losses.LOSSES if name not in TRIPLET_LOSSES]
STEPS += [(name, sampling) for name in TRIPLET_LOSSES for sampling in losses.SAMPLERS]


@pytest.fixture(scope="module", autouse=True)
def on_one_thread():
    """Thousands of tiny steps: threads would wait for each other most of the time."""
    with one_thread():
        yield


@pytest.fixture(params=["losses_a", "losses_b"])
def golden(request):
    with np.load(GOLDEN / f"{request.param}.npz") as values:
        return {name: torch.from_numpy(np.asarray(values[name])) for name in values}


def make_loss(name, n_classes, dim=8, sampling="distance", **changes):
    values = {"margin": 0.2, "beta": 1.2, "beta_lr": 5e-4, "nu": 0.0, "proxy_lr": 1e-5} | changes
    return losses.build_loss(name, sampling, n_classes=n_classes, embed_size=dim, **values)


def random_batch(seed, labels, dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    embeddings = normalize(torch.randn(len(labels), dim, generator=generator, dtype=dtype), dim=1)
    return embeddings, torch.as_tensor(labels)


def with_triplets(loss, triplets):
    """Let a loss take these (T, 3) triplets, all valid, in place of those that its sampler draws; return it."""
    loss.sampler = lambda embeddings, labels: (triplets, torch.ones(len(triplets), dtype=torch.bool))
    return loss


def assert_matches(actual, expected, *, is_gradient=False):
    tolerance = {"rtol": 1e-3, "atol": 1e-6} if is_gradient else {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(actual.detach(), expected.to(actual.dtype), **tolerance)


def assert_golden(value, golden, name, gradients):
    """Compare a loss with golden["<name>_loss"], and gradients, name in the file to tensor, after backward."""
    value.backward()
    assert_matches(value, golden[f"{name}_loss"])
    for gradient, tensor in gradients.items():
        assert_matches(tensor.grad, golden[gradient], is_gradient=True)


def test_margin_loss_golden(golden):
    loss = make_loss("marginloss", int(golden["n_classes"]), margin=float(golden["margin"]))
    loss.beta.data = golden["beta"].clone()
    embeddings = golden["embeddings"].clone().requires_grad_()
    value = with_triplets(loss, golden["triplets"])(embeddings, golden["labels"])
    assert_golden(value, golden, "margin", {"margin_grad": embeddings, "margin_beta_grad": loss.beta})


def test_triplet_loss_golden(golden):
    embeddings = golden["embeddings"].clone().requires_grad_()
    loss = make_loss("triplet", int(golden["n_classes"]), margin=float(golden["margin"]))
    value = with_triplets(loss, golden["triplets"])(embeddings, golden["labels"])
    assert_golden(value, golden, "triplet", {"triplet_grad": embeddings})


def test_proxynca_golden(golden):
    embeddings = golden["embeddings"].clone().requires_grad_()
    loss = make_loss("proxynca", int(golden["n_classes"]), dim=embeddings.shape[1])
    loss.proxies.data = golden["proxies"].clone()
    value = loss(embeddings, golden["labels"])
    assert_golden(value, golden, "proxynca", {"proxynca_grad": embeddings, "proxynca_proxy_grad": loss.proxies})


def test_adversarial_golden(golden):
    target = golden["embeddings"].clone().requires_grad_()
    source = golden["aux_embeddings"].clone().requires_grad_()
    term = losses.AdversarialLoss(target.shape[1], source.shape[1], len(golden["adv_b1"]))
    state = {"0.weight": "adv_W1", "0.bias": "adv_b1", "2.weight": "adv_W2", "2.bias": "adv_b2"}
    term.projection.load_state_dict({key: golden[name] for key, name in state.items()})
    first, last = term.projection[0].weight, term.projection[2].weight
    gradients = {"adv_class_grad": target, "adv_aux_grad": source, "adv_W1_grad": first, "adv_W2_grad": last}
    assert_golden(term(target, source), golden, "adv", gradients)


def test_distance_sampling_distribution_golden(golden):
    _, negative_mask = losses.pair_masks(golden["labels"])
    weights = losses.DistanceWeightedSampler().negative_weights(golden["embeddings"], None, negative_mask)
    assert_matches(weights / weights.sum(1, keepdim=True), golden["distance_sampling_probs"])


def test_semihard_candidates_golden(golden):
    _, negative_mask = losses.pair_masks(golden["labels"])
    triplets = golden["triplets"]
    assert (triplets[:, 0] == torch.arange(len(triplets))).all()
    distances = losses.pairwise_squared_distances(golden["embeddings"]).sqrt()
    candidates = losses.semihard_candidates(distances, triplets[:, 1], negative_mask, 0.2)
    assert (candidates == golden["semihard_candidates"]).all()


def naive_value(name, loss, embeddings, labels, triplets=None):
    """A loop over triplets (images for proxynca), written from the formulas in float64."""
    x = embeddings.numpy()

    def squared(one, other):
        return ((one - other) ** 2).sum()

    if name == "proxynca":
        x, proxies = (3 * p / np.linalg.norm(p, axis=1, keepdims=True) for p in (x, loss.proxies.detach().numpy()))
        terms = []
        for row, label in zip(x, labels.tolist()):
            others = [math.exp(-squared(row, proxy)) for c, proxy in enumerate(proxies) if c != label]
            terms.append(squared(row, proxies[label]) + math.log(sum(others)))
        return np.mean(terms)
    total, n_active = 0.0, 0
    for anchor, positive, negative in triplets.tolist():
        d_ap, d_an = squared(x[anchor], x[positive]), squared(x[anchor], x[negative])
        if name == "triplet":
            total += max(0.0, d_ap - d_an + loss.margin)
            continue
        beta = float(loss.beta.detach()[labels[anchor]])
        terms = (math.sqrt(d_ap + 1e-8) - beta + loss.margin, beta - math.sqrt(d_an + 1e-8) + loss.margin)
        total += sum(max(0.0, term) for term in terms) + loss.nu * beta
        n_active += sum(term > 0 for term in terms)
    return total / len(triplets) if name == "triplet" else total / max(n_active, 1)


LABEL_SETS = {
    "even": [0, 0, 1, 1, 2, 2],
    "unequal": [4, 4, 4, 4, 4, 1, 1, 6, 6, 6],
    "unordered": [9, 2, 9, 5, 2, 5, 5, 0, 0, 9],
}


@pytest.mark.parametrize("labels", LABEL_SETS.values(), ids=LABEL_SETS)
@pytest.mark.parametrize("nu", [0.0, 0.05])
@pytest.mark.parametrize("name", losses.LOSSES)
def test_losses_agree_with_a_naive_loop(name, nu, labels):
    for seed in range(5):
        torch.manual_seed(seed)
        embeddings, labels_tensor = random_batch(seed, labels)
        loss = make_loss(name, n_classes=12, nu=nu).double()
        if name == "marginloss":
            loss.beta.data = 1.0 + 0.5 * torch.rand(12, dtype=torch.float64)
        triplets = None
        if name in TRIPLET_LOSSES:
            triplets = loss.sampler(embeddings, labels_tensor)[0]
            with_triplets(loss, triplets)
        expected = naive_value(name, loss, embeddings, labels_tensor, triplets)
        assert loss(embeddings, labels_tensor).item() == pytest.approx(expected, rel=1e-10)


def test_margin_loss_counts_terms_by_hand():
    # points on a line: the first anchor has both terms active and counts twice, the second has none
    loss = make_loss("marginloss", n_classes=2, margin=0.5, beta=1.0).double()
    embeddings = torch.tensor([[0.0], [1.0], [0.6], [9.0], [9.1], [2.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 1, 0])
    triplets = torch.tensor([[0, 1, 2], [3, 4, 5]])
    expected = ((1.0 - 1.0 + 0.5) + (1.0 - 0.6 + 0.5)) / 2
    assert with_triplets(loss, triplets)(embeddings, labels).item() == pytest.approx(expected, abs=1e-6)
    value = with_triplets(loss, triplets[1:])(embeddings.requires_grad_(), labels)
    assert value.item() == 0
    value.backward()
    assert not embeddings.grad.any()


@pytest.mark.parametrize("name", losses.LOSSES)
def test_gradcheck(name):
    embeddings, labels = random_batch(3, LABEL_SETS["unordered"], dim=5)
    loss = make_loss(name, n_classes=10, dim=5, nu=0.1).double()
    parameters = list(loss.parameters())
    if name in TRIPLET_LOSSES:
        with_triplets(loss, loss.sampler(embeddings, labels)[0])

    def value(x, *_):
        return loss(x, labels)

    assert torch.autograd.gradcheck(value, (embeddings.requires_grad_(), *parameters))


def test_gradcheck_adversarial_is_reversed_on_embeddings():
    torch.manual_seed(0)
    target, _ = random_batch(1, [0] * 4, dim=3)
    source, _ = random_batch(2, [0] * 4, dim=5)
    term = losses.AdversarialLoss(3, 5, 7).double()
    target.requires_grad_()
    source.requires_grad_()

    def plain(t, s, *_):
        t, s = normalize(t, dim=1), normalize(s, dim=1)
        return -(t * normalize(term.projection(s), dim=1)).square().mean()

    parameters = tuple(term.parameters())
    assert torch.autograd.gradcheck(plain, (target, source, *parameters))
    plain_gradients = torch.autograd.grad(plain(target, source), (target, source, *parameters))
    gradients = torch.autograd.grad(term(target, source), (target, source, *parameters))
    for i, (gradient, plain_gradient) in enumerate(zip(gradients, plain_gradients)):
        torch.testing.assert_close(gradient, -plain_gradient if i < 2 else plain_gradient)


N_DRAWS = 40_000


def assert_drawn_as(sampler, embeddings, labels, row_and_column, probabilities):
    """Draw N_DRAWS triplets and compare the counts of cells with their probabilities by a chi-square test, rows pooled;
    it must tell a distribution apart in which one cell is off by half.

    row_and_column: the two columns of a cell's indices that it reads off (B, 3) triplets.
    """
    observed = np.zeros(probabilities.shape)
    for _ in range(N_DRAWS // len(labels)):
        triplets, valid = sampler(embeddings, labels)
        assert valid.all()
        np.add.at(observed, tuple(row_and_column(triplets).T.numpy()), 1)
    assert not observed[probabilities == 0].any()

    def p_value(probabilities):
        expected, used = probabilities * observed.sum(1, keepdims=True), probabilities > 0
        return chisquare(observed[used], expected[used], ddof=len(observed) - 1).pvalue

    bent = probabilities.copy()
    bent[0, np.argmax(bent[0])] *= 1.5
    bent[0] /= bent[0].sum()
    assert p_value(probabilities) > 1e-3
    assert p_value(bent) < 1e-6


CHI_SQUARE_LABELS = [0, 0, 0, 1, 1, 2, 2, 2]


def negative_probabilities(sampling, embeddings, labels):
    """(B, B) distribution of each anchor's negative, by loops over its definition."""
    n, dim = embeddings.shape
    distances = torch.cdist(embeddings, embeddings)
    result = np.zeros((n, n))
    for a in range(n):
        negatives = [j for j in range(n) if labels[j] != labels[a]]
        positives = [j for j in range(n) if labels[j] == labels[a] and j != a]
        for p in positives:
            d_ap = float(distances[a, p])
            if sampling == "semihard":
                candidates = [j for j in negatives if d_ap < float(distances[a, j]) < d_ap + 0.2] or negatives
                weights = [1.0] * len(candidates)
            else:
                candidates, floored = negatives, [max(float(distances[a, j]), 0.5) for j in negatives]
                weights = [1 / (d ** (dim - 2) * (1 - d * d / 4) ** ((dim - 3) / 2)) for d in floored]
            result[a, candidates] += np.array(weights) / sum(weights) / len(positives)
    return result


@pytest.mark.parametrize("sampling", ["distance", "semihard"])
def test_negatives_follow_their_distribution(sampling):
    embeddings, labels = random_batch(11, CHI_SQUARE_LABELS, dim=6)
    torch.manual_seed(5)
    sampler = losses.SAMPLERS[sampling]()
    expected = negative_probabilities(sampling, embeddings, labels.tolist())
    assert_drawn_as(sampler, embeddings, labels, lambda triplets: triplets[:, [0, 2]], expected)


@pytest.mark.parametrize("sampling", ["distance", "semihard"])
def test_positives_are_uniform(sampling):
    embeddings, labels = random_batch(11, CHI_SQUARE_LABELS, dim=6)
    torch.manual_seed(6)
    sampler = losses.SAMPLERS[sampling]()
    assert (sampler(embeddings, labels)[0][:, 0] == torch.arange(len(labels))).all()
    same = [[a != p and labels[a] == labels[p] for p in range(len(labels))] for a in range(len(labels))]
    expected = np.array(same) / np.sum(same, axis=1, keepdims=True)
    assert_drawn_as(sampler, embeddings, labels, lambda triplets: triplets[:, [0, 1]], expected)


def test_random_sampler_is_uniform_over_all_triplets():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    n = len(labels)
    valid = [
        (a, p, q) for a in range(n) for p in range(n) for q in range(n)
        if a != p and labels[a] == labels[p] and labels[a] != labels[q]
    ]  # fmt: skip
    expected = np.zeros((1, n**3))
    expected[0, [a * n * n + p * n + q for a, p, q in valid]] = 1 / len(valid)
    torch.manual_seed(7)
    sampler = losses.RandomSampler()

    def cell(triplets):
        return torch.stack([torch.zeros(n, dtype=torch.int64), triplets @ torch.tensor([n * n, n, 1])], 1)

    assert_drawn_as(sampler, torch.randn(n, 4), labels, cell, expected)


@pytest.mark.parametrize("dim", [2, 3, 4, 128, 2048])
def test_inverse_density_is_finite_everywhere(dim):
    distances = torch.cat([torch.linspace(0, 2, 10_001), torch.tensor([2.0, 2.0 - 1e-7, 2.0 + 1e-6])])
    assert losses.inverse_density_log_weights(distances.square(), dim).isfinite().all()


DEGENERATE = {
    "one class": ([0, 0, 0, 0], False),
    "no positives": ([0, 1, 2, 3], False),
    "one image": ([0], False),
    "some anchors alone": ([0, 0, 1, 2], True),
}


@pytest.mark.parametrize(("labels", "has_triplets"), DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("sampling", losses.SAMPLERS)
@pytest.mark.parametrize("name", TRIPLET_LOSSES)
def test_degenerate_batches(name, sampling, labels, has_triplets):
    embeddings, labels = random_batch(2, labels, dtype=torch.float32)
    loss = make_loss(name, n_classes=4, sampling=sampling, nu=0.1, beta=0.9)
    for batch in (embeddings, embeddings[:1].expand(len(labels), -1), torch.cat([-embeddings[-1:], embeddings[1:]])):
        batch = batch.clone().requires_grad_()
        value = loss(batch, labels)
        value.backward()
        assert value.isfinite()
        assert batch.grad.isfinite().all()
        if not has_triplets:
            assert value.item() == 0
            assert not batch.grad.any()


@pytest.mark.parametrize("dim", [2, 2048])
@pytest.mark.parametrize("name", TRIPLET_LOSSES)
def test_extreme_dimensions_and_opposite_points_are_finite(name, dim):
    embeddings, labels = random_batch(6, [0, 0, 1, 1, 2, 2], dim=dim, dtype=torch.float32)
    embeddings[2], embeddings[3] = -embeddings[0], embeddings[0]
    value = make_loss(name, n_classes=3, dim=dim)(embeddings.requires_grad_(), labels)
    value.backward()
    assert value.isfinite()
    assert embeddings.grad.isfinite().all()


def test_semihard_sampling_has_the_margin_of_its_task():
    assert make_loss("triplet", 3, sampling="semihard", margin=0.37).sampler.margin == 0.37


def test_anchors_without_partners_take_no_part():
    embeddings, labels = random_batch(4, [0, 0, 1, 2], dtype=torch.float64)
    loss = make_loss("triplet", n_classes=3, sampling="random")
    triplets, valid = losses.DistanceWeightedSampler()(embeddings, labels)
    assert valid.tolist() == [True, True, False, False]
    loss.sampler = lambda *_: (triplets, valid)
    torch.testing.assert_close(loss(embeddings, labels), with_triplets(loss, triplets[valid])(embeddings, labels))


def test_an_opposite_point_is_drawn_nearly_always():
    # anchor 0 has negatives at distance 2 and sqrt(2): in many dimensions the first has all the weight
    embeddings = torch.zeros(4, 16)
    embeddings[[0, 1, 2, 3], [0, 0, 0, 1]] = torch.tensor([1.0, 1.0, -1.0, 1.0])
    labels = torch.tensor([0, 0, 1, 1])
    sampler = losses.DistanceWeightedSampler()
    assert all(sampler(embeddings, labels)[0][0, 2] == 2 for _ in range(50))


def build(directions, name="marginloss", sampling="distance", **of_shared):
    """Build the objective of embeddings of 4 and 3 dimensions, 7 classes and 8 clusters."""
    values = {"losses": name, "sampling": sampling, "margin": 0.2, "beta": 1.2, "beta_lr": 0.1, "nu": 0.1}
    tasks = {"Class": values | {"embed_sizes": 4}, "Shared": values | {"embed_sizes": 3} | of_shared}
    tasks = {task: Namespace(proxy_lr=0.2, **flags) for task, flags in tasks.items()}
    return losses.build_objective(tasks, {"Class": 7, "Shared": 8}, directions, adv_dim=9, lr=0.3)


def both_embeddings(labels, device="cpu"):
    """Return the embeddings of both heads and the labels of one batch."""
    heads = {name: random_batch(1, labels, dim, torch.float32)[0] for name, dim in (("Class", 4), ("Shared", 3))}
    return {name: values.to(device).requires_grad_() for name, values in heads.items()}, torch.tensor(labels).to(device)


@pytest.mark.parametrize("task", ["Class", "Shared"])
def test_terms_of_a_step_are_its_loss_and_the_weighted_adversarial_ones(task):
    objective = build({"Class-Shared": 2500.0, "Shared-Class": 3.0}, losses="proxynca")
    embeddings, labels = both_embeddings([0, 0, 1, 1, 4, 4])
    torch.manual_seed(0)
    terms = objective(task, embeddings, labels)
    torch.manual_seed(0)
    expected = {task: objective.task_losses[task](embeddings[task], labels)}
    first, second = objective.adversaries["Class-Shared"], objective.adversaries["Shared-Class"]
    expected["Class-Shared"] = 2500 * first(embeddings["Class"], embeddings["Shared"])
    expected["Shared-Class"] = 3 * second(embeddings["Shared"], embeddings["Class"])
    assert list(terms) == list(expected)
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_terms_keep_their_precision_under_autocast_and_with_half_precision_embeddings(name):
    objective = build({"Class-Shared": 2.0}, name)
    embeddings, labels = both_embeddings(LABEL_SETS["even"])
    half = {head: values.bfloat16() for head, values in embeddings.items()}
    for given in (embeddings, half):
        torch.manual_seed(0)
        expected = objective("Class", {head: values.float() for head, values in given.items()}, labels)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            terms = objective("Class", given, labels)
        assert list(terms) == list(expected)
        for term, value in terms.items():
            torch.testing.assert_close(value, expected[term], rtol=0, atol=0)  # dtypes too


class Spread(losses.Loss):
    """Has all that a new loss needs: a forward, and constructor arguments named like flags."""

    def __init__(self, margin):
        super().__init__()
        self.margin = margin

    def forward(self, embeddings, labels):
        return (embeddings @ embeddings.T - self.margin).relu().mean()


class CenterLoss(losses.Loss):
    """A loss that trains parameters of its own has their learning rate, too."""

    def __init__(self, n_classes, embed_size, beta_lr):
        super().__init__()
        self.centers, self.learning_rate = torch.nn.Parameter(torch.zeros(n_classes, embed_size)), beta_lr

    def forward(self, embeddings, labels):
        return (embeddings - self.centers[labels]).square().mean()


def test_a_new_loss_is_a_forward_and_constructor_arguments_named_like_flags(monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "spread", Spread)
    monkeypatch.setitem(losses.LOSSES, "center", CenterLoss)
    assert not any(losses.takes_sampler(name) for name in ("spread", "center"))
    objective = build({}, "spread", losses="center")
    assert objective.task_losses["Class"].margin == 0.2
    (group,) = objective.param_groups()
    assert (group["lr"], group["weight_decay"], group["params"][0].shape) == (0.1, 0, (8, 3))
    embeddings, labels = both_embeddings([0, 0, 1, 1])
    for task in embeddings:
        objective(task, embeddings, labels)[task].backward()
    assert all(values.grad.any() for values in [*embeddings.values(), *group["params"]])


def test_a_step_needs_all_heads_only_with_an_adversarial_term():
    assert build({"Class-Shared": 1.0}).heads("Class") == ["Class", "Shared"]
    plain = build({"Class-Shared": 0.0, "Shared-Class": 0.0})  # without weight a direction is left out
    assert plain.heads("Class") == ["Class"]
    assert plain.heads("Shared") == ["Shared"]
    embeddings, labels = both_embeddings([0, 0, 1, 1])
    assert list(plain("Shared", {"Shared": embeddings["Shared"]}, labels)) == ["Shared"]


def test_groups_of_the_objective_in_order_with_their_rates():
    objective = build({"Shared-Class": 1.0, "Class-Shared": 2.0}, losses="proxynca")
    groups = objective.param_groups()
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 0), (0.2, 0), (0.3, 1e-6), (0.3, 1e-6)]
    shapes = [[tuple(values.shape) for values in group["params"]] for group in groups]
    # boundaries of 7 classes, proxies of 8 clusters, then from Class to Shared, then from Shared to Class
    assert shapes == [[(7,)], [(8, 3)], [(9, 4), (9,), (3, 9), (3,)], [(9, 3), (9,), (4, 9), (4,)]]
    assert sum(len(group["params"]) for group in groups) == len(list(objective.parameters()))


@pytest.mark.parametrize(("name", "sampling"), STEPS)
def test_a_step_is_one_graph(name, sampling):
    objective = build({"Class-Shared": 10.0}, name, sampling)
    embeddings, labels = both_embeddings(LABEL_SETS["unequal"])
    terms = torch.compile(objective, fullgraph=True, backend="aot_eager")("Class", embeddings, labels)
    sum(terms.values()).backward()
    assert all(values.grad.isfinite().all() for values in embeddings.values())
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "sampling"), STEPS)
def test_a_step_never_waits_for_the_gpu(name, sampling):
    objective = build({"Class-Shared": 10.0}, name, sampling).cuda()
    embeddings, labels = both_embeddings(LABEL_SETS["unequal"], "cuda")
    sum(objective("Class", embeddings, labels).values()).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(objective("Class", embeddings, labels).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
