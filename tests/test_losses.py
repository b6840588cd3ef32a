"""Losses and samplers against golden values, naive float64 loops, finite differences and their distributions."""

import contextlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.nn.functional import normalize

import losses

GOLDEN = Path(__file__).parent / "golden"
TRIPLET_LOSSES = ["marginloss", "triplet"]
ALL_LOSSES = [*TRIPLET_LOSSES, "proxynca"]


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
    value = loss(embeddings, golden["labels"], golden["triplets"])
    assert_golden(value, golden, "margin", {"margin_grad": embeddings, "margin_beta_grad": loss.beta})


def test_triplet_loss_golden(golden):
    embeddings = golden["embeddings"].clone().requires_grad_()
    loss = make_loss("triplet", int(golden["n_classes"]), margin=float(golden["margin"]))
    value = loss(embeddings, golden["labels"], golden["triplets"])
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


def naive_value(name, loss, embeddings, labels, triplets):
    """A loop over triplets (images for proxynca), written from the formulas in float64."""
    x = [[float(v) for v in row] for row in embeddings]

    def squared(a, b):
        return sum((p - q) ** 2 for p, q in zip(a, b))

    if name == "proxynca":

        def scaled(row):
            length = math.sqrt(sum(v * v for v in row))
            return [3 * v / length for v in row]

        proxies = [scaled([float(v) for v in row]) for row in loss.proxies.detach()]
        total = 0.0
        for row, label in zip(x, labels.tolist()):
            row = scaled(row)
            others = [math.exp(-squared(row, proxy)) for c, proxy in enumerate(proxies) if c != label]
            total += squared(row, proxies[label]) + math.log(sum(others))
        return total / len(x)
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
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_losses_agree_with_a_naive_loop(name, nu, labels):
    for seed in range(5):
        torch.manual_seed(seed)
        embeddings, labels_tensor = random_batch(seed, labels)
        loss = make_loss(name, n_classes=12, nu=nu).double()
        if name == "marginloss":
            loss.beta.data = 1.0 + 0.5 * torch.rand(12, dtype=torch.float64)
        arguments = (embeddings, labels_tensor)
        triplets = None
        if name != "proxynca":
            triplets, valid = loss.sampler(embeddings, labels_tensor)
            assert valid.all()
            arguments += (triplets,)
        expected = naive_value(name, loss, embeddings, labels_tensor, triplets)
        assert loss(*arguments).item() == pytest.approx(expected, rel=1e-10)


def test_margin_loss_counts_terms_by_hand():
    # points on a line: the first anchor has both terms active and counts twice, the second has none
    loss = make_loss("marginloss", n_classes=2, margin=0.5, beta=1.0).double()
    embeddings = torch.tensor([[0.0], [1.0], [0.6], [9.0], [9.1], [2.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 1, 0])
    triplets = torch.tensor([[0, 1, 2], [3, 4, 5]])
    expected = ((1.0 - 1.0 + 0.5) + (1.0 - 0.6 + 0.5)) / 2
    assert loss(embeddings, labels, triplets).item() == pytest.approx(expected, abs=1e-6)


def test_margin_loss_is_zero_without_active_terms():
    loss = make_loss("marginloss", n_classes=2, margin=0.1, beta=1.0)
    embeddings = torch.tensor([[0.0, 0.0], [0.0, 0.1], [5.0, 0.0]], requires_grad=True)
    value = loss(embeddings, torch.tensor([0, 0, 1]), torch.tensor([[0, 1, 2]]))
    value.backward()
    assert value.item() == 0
    assert not embeddings.grad.any()


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_gradcheck(name):
    embeddings, labels = random_batch(3, LABEL_SETS["unordered"], dim=5)
    loss = make_loss(name, n_classes=10, dim=5, nu=0.1).double()
    parameters = list(loss.parameters())
    triplets = () if name == "proxynca" else (loss.sampler(embeddings, labels)[0],)

    def value(x, *_):
        return loss(x, labels, *triplets)

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


N_DRAWS = 200_000


def frequencies(sampler, embeddings, labels, count):
    """Count, over N_DRAWS draws, what `count` reads off the (B, 3) triplets."""
    totals = 0
    for _ in range(N_DRAWS // len(labels)):
        triplets, valid = sampler(embeddings, labels)
        assert valid.all()
        totals = totals + count(triplets)
    return totals


def p_value(observed, probabilities):
    """Chi-square test of counts in the last dimension against probabilities, rows pooled."""
    observed, probabilities = np.asarray(observed, float), np.asarray(probabilities, float)
    expected = probabilities * observed.sum(-1, keepdims=True)
    used = probabilities > 0
    assert not observed[~used].any()
    return chisquare(observed[used], expected[used], ddof=len(observed) - 1).pvalue


CHI_SQUARE_LABELS = [0, 0, 0, 1, 1, 2, 2, 2]


def negative_probabilities(sampling, embeddings, labels):
    """(B, B) distribution of each anchor's negative, by loops from METHOD's text."""
    n, dim = embeddings.shape
    distances = torch.cdist(embeddings, embeddings)
    result = np.zeros((n, n))
    for a in range(n):
        negatives = [j for j in range(n) if labels[j] != labels[a]]
        positives = [j for j in range(n) if labels[j] == labels[a] and j != a]
        if sampling == "distance":
            for j in negatives:
                d = max(float(distances[a, j]), 0.5)
                result[a, j] = 1 / (d ** (dim - 2) * (1 - d * d / 4) ** ((dim - 3) / 2))
            result[a] /= result[a].sum()
        else:
            for p in positives:
                d_ap = float(distances[a, p])
                candidates = [j for j in negatives if d_ap < float(distances[a, j]) < d_ap + 0.2] or negatives
                for j in candidates:
                    result[a, j] += 1 / len(candidates) / len(positives)
    return result


@pytest.mark.parametrize("sampling", ["distance", "semihard"])
def test_negatives_follow_their_distribution(sampling):
    embeddings, labels = random_batch(11, CHI_SQUARE_LABELS, dim=6)
    generator = torch.Generator().manual_seed(5)
    sampler = losses.SAMPLERS[sampling](generator=generator)
    anchors = torch.arange(len(labels))

    def count(triplets):
        counts = np.zeros((len(labels), len(labels)))
        counts[anchors, triplets[:, 2]] = 1
        return counts

    observed = frequencies(sampler, embeddings, labels, count)
    probabilities = negative_probabilities(sampling, embeddings, labels.tolist())
    assert p_value(observed, probabilities) > 1e-3
    bent = probabilities.copy()
    bent[0, np.argmax(bent[0])] *= 1.2
    bent[0] /= bent[0].sum()
    assert p_value(observed, bent) < 1e-6


@pytest.mark.parametrize("sampling", ["distance", "semihard"])
def test_positives_are_uniform(sampling):
    embeddings, labels = random_batch(11, CHI_SQUARE_LABELS, dim=6)
    sampler = losses.SAMPLERS[sampling](generator=torch.Generator().manual_seed(6))
    anchors = torch.arange(len(labels))

    def count(triplets):
        assert (triplets[:, 0] == anchors).all()
        counts = np.zeros((len(labels), len(labels)))
        counts[anchors, triplets[:, 1]] = 1
        return counts

    observed = frequencies(sampler, embeddings, labels, count)
    positive_mask, _ = losses.pair_masks(labels)
    probabilities = positive_mask.double().numpy()
    probabilities /= probabilities.sum(1, keepdims=True)
    assert p_value(observed, probabilities) > 1e-3
    bent = probabilities.copy()
    bent[0, 1] *= 1.2
    bent[0] /= bent[0].sum()
    assert p_value(observed, bent) < 1e-6


def test_random_sampler_is_uniform_over_all_triplets():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    n = len(labels)
    valid = [
        (a, p, q) for a in range(n) for p in range(n) for q in range(n)
        if a != p and labels[a] == labels[p] and labels[a] != labels[q]
    ]  # fmt: skip
    sampler = losses.RandomSampler(torch.Generator().manual_seed(7))
    weights = torch.tensor([n * n, n, 1])

    def count(triplets):
        return np.bincount((triplets * weights).sum(1), minlength=n**3)

    observed = frequencies(sampler, torch.randn(n, 4), labels, count)
    probabilities = np.zeros(n**3)
    probabilities[[a * n * n + p * n + q for a, p, q in valid]] = 1 / len(valid)
    assert p_value(observed[None], probabilities[None]) > 1e-3
    bent = probabilities.copy()
    bent[np.argmax(bent)] *= 1.2
    assert p_value(observed[None], (bent / bent.sum())[None]) < 1e-6


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
    embeddings.requires_grad_()
    weights = losses.DistanceWeightedSampler().negative_weights(embeddings.detach(), None, losses.pair_masks(labels)[1])
    assert weights.isfinite().all()
    assert (weights.sum(1) > 0).all()
    value = make_loss(name, n_classes=3, dim=dim)(embeddings, labels)
    value.backward()
    assert value.isfinite()
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "sampling"), [("proxynca", "distance"), *((n, s) for n in TRIPLET_LOSSES for s in losses.SAMPLERS)]
)
def test_a_step_is_one_graph(name, sampling):
    embeddings, labels = random_batch(7, LABEL_SETS["unequal"], dtype=torch.float32)
    loss = make_loss(name, n_classes=7, sampling=sampling, nu=0.1)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    batch = embeddings.clone().requires_grad_()
    value = compiled(batch, labels)
    value.backward()
    assert value.isfinite()
    assert batch.grad.isfinite().all()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "sampling"), [("proxynca", "distance"), *((n, s) for n in TRIPLET_LOSSES for s in losses.SAMPLERS)]
)
def test_a_step_never_looks_at_values(name, sampling, monkeypatch):
    # the meta device has no values: any copy to the host, or branch on a value, raises there
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    loss = make_loss(name, n_classes=7, sampling=sampling, nu=0.1).to("meta")
    term = losses.AdversarialLoss(8, 8).to("meta")
    embeddings = torch.empty(10, 8, device="meta", requires_grad=True)
    labels = torch.empty(10, dtype=torch.int64, device="meta")
    (loss(embeddings, labels) + term(embeddings, embeddings)).backward()
    assert embeddings.grad.shape == (10, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("name", "sampling"), [("proxynca", "distance"), *((n, s) for n in TRIPLET_LOSSES for s in losses.SAMPLERS)]
)
def test_a_step_never_waits_for_the_gpu(name, sampling):
    embeddings, labels = (values.cuda() for values in random_batch(7, LABEL_SETS["unequal"], dtype=torch.float32))
    loss = make_loss(name, n_classes=7, sampling=sampling, nu=0.1).cuda()
    embeddings.requires_grad_()
    loss(embeddings, labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(embeddings, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_semihard_sampling_has_the_margin_of_its_task():
    assert make_loss("triplet", 3, sampling="semihard", margin=0.37).sampler.margin == 0.37


def test_the_adversarial_term_keeps_its_precision():
    target, _ = random_batch(1, [0] * 4, dim=3)
    source, _ = random_batch(2, [0] * 4, dim=5)
    term = losses.AdversarialLoss(3, 5, 7)
    plain = term(target.float(), source.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert term(target.float(), source.float()).item() == plain.item()
    assert term(target, source).item() == pytest.approx(plain.item(), rel=1e-5)


def test_the_adversarial_term_is_one_graph():
    target, _ = random_batch(1, [0] * 4, dim=3, dtype=torch.float32)
    source, _ = random_batch(2, [0] * 4, dim=5, dtype=torch.float32)
    term = losses.AdversarialLoss(3, 5, 7)
    compiled = torch.compile(term, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(target, source), term(target, source))
    torch._dynamo.reset()


def test_anchors_without_partners_take_no_part():
    embeddings, labels = random_batch(4, [0, 0, 1, 2], dtype=torch.float64)
    loss = make_loss("triplet", n_classes=3, sampling="random")
    triplets, valid = losses.DistanceWeightedSampler()(embeddings, labels)
    assert valid.tolist() == [True, True, False, False]
    loss.sampler = lambda *_: (triplets, valid)
    torch.testing.assert_close(loss(embeddings, labels), loss(embeddings, labels, triplets[valid]))


def test_an_opposite_point_is_drawn_nearly_always():
    # anchor 0 has negatives at distance 2 and sqrt(2): in many dimensions the first has all the weight
    embeddings = torch.zeros(4, 16)
    embeddings[[0, 1, 2, 3], [0, 0, 0, 1]] = torch.tensor([1.0, 1.0, -1.0, 1.0])
    labels = torch.tensor([0, 0, 1, 1])
    sampler = losses.DistanceWeightedSampler(torch.Generator().manual_seed(0))
    weights = sampler.negative_weights(embeddings, None, losses.pair_masks(labels)[1])
    assert weights.isfinite().all()
    assert weights[0, 2] / weights[0].sum() > 0.999
    assert all(sampler(embeddings, labels)[0][0, 2] == 2 for _ in range(50))


@pytest.mark.parametrize("sampling", losses.SAMPLERS)
def test_draws_come_from_the_generator(sampling):
    embeddings, labels = random_batch(8, [0, 0, 0, 1, 1, 1] * 3)

    def draw(seed):
        sampler = losses.SAMPLERS[sampling](generator=torch.Generator().manual_seed(seed))
        return sampler(embeddings, labels)[0]

    assert (draw(1) == draw(1)).all()
    assert (draw(1) != draw(2)).any()


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_autocast_keeps_float32(name):
    embeddings, labels = random_batch(5, LABEL_SETS["even"], dtype=torch.float32)
    loss = make_loss(name, n_classes=3)
    triplets = () if name == "proxynca" else (loss.sampler(embeddings, labels)[0],)
    plain = loss(embeddings, labels, *triplets)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = loss(embeddings, labels, *triplets)
        half = loss(embeddings.bfloat16(), labels, *triplets)
        assert losses.pairwise_squared_distances(embeddings).dtype == torch.float32
    assert under_autocast.dtype == half.dtype == torch.float32
    assert under_autocast.item() == plain.item()
    assert half.item() == pytest.approx(plain.item(), rel=0.05)


def test_param_groups():
    margin = make_loss("marginloss", 3, beta_lr=0.1).param_groups()
    assert [(group["lr"], group["weight_decay"]) for group in margin] == [(0.1, 0.0)]
    assert make_loss("triplet", 3).param_groups() == []
    assert make_loss("proxynca", 3, proxy_lr=0.2).param_groups()[0]["lr"] == 0.2
    adversarial = losses.AdversarialLoss(4, 4, lr=0.3).param_groups()
    assert [(group["lr"], group["weight_decay"]) for group in adversarial] == [(0.3, 1e-6)]


def test_proxynca_refuses_a_single_class():
    with pytest.raises(ValueError, match="at least 2 classes"):
        make_loss("proxynca", n_classes=1)
