"""Training steps: golden values, what moves in a step of the other task, overflowing gradients, and learning."""

import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_thread, parse, read_logs, refused, run, small_flags
from torch.nn import functional as F

import losses
import main
import netlib
from run import options
from run.folder import LAST
from support.weights import read_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "steps.npz"


@pytest.fixture(scope="module")
def golden():
    """The values of three steps, of the tasks Class, Shared, Class."""
    with np.load(GOLDEN) as values:
        return {name: values[name] for name in values}


class FloatNetwork(netlib.EmbeddingNetwork):
    """The network on images of floats that are taken as they are: not uint8, not normalised."""

    def forward(self, images, outputs):
        pooled = self.backbone(images)[1]
        return {task: F.normalize(self.heads[task](pooled), dim=1) for task in outputs}


class GoldenTriplets(losses.TripletSampler):
    """Gives the triplets of the steps, one step after the other."""

    def __init__(self, triplets):
        super().__init__()
        self.steps = iter(triplets)

    def __call__(self, embeddings, labels):
        return torch.from_numpy(next(self.steps)), torch.ones(len(labels), dtype=torch.bool)


def drawn(name, shape):
    """Return the weights or statistics of a name in torchvision's or the published code's state dict."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
        values = rng.uniform(0.5, 1.5, shape)
    elif len(shape) == 1:  # biases and running_mean
        values = 0.1 * rng.normal(size=shape)
    else:
        values = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
    return torch.from_numpy(np.float32(values))


def draw_weights(module, published_name):
    """Fill a module with the golden values' weights. published_name: a name here to that of the published code."""
    state = module.state_dict()
    for name, values in state.items():
        if not name.endswith("num_batches_tracked"):
            values.copy_(drawn(published_name(name), tuple(values.shape)))


def golden_batches(n_classes):
    """Return the images and triplets of the steps, drawn as the golden values' were."""
    rng = np.random.default_rng(23)
    batches = []
    for task in ("Class", "Shared", "Class"):
        labels = np.repeat(rng.choice(n_classes[task], 4, replace=False), 4)
        images = (rng.normal(size=(16, 3, 64, 64)) + 0.3 * labels[:, None, None, None]).astype(np.float32)
        triplets = []
        for anchor in range(16):
            same = np.flatnonzero((labels == labels[anchor]) & (np.arange(16) != anchor))
            triplets.append((anchor, rng.choice(same), rng.choice(np.flatnonzero(labels != labels[anchor]))))
        batches.append((task, images, labels, np.array(triplets)))
    return batches


def train_step(network, objective, optimizer, task, images, labels):
    """Train one step; return the task's loss and the adversarial term, weighted."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = [(torch.as_tensor(images), torch.as_tensor(labels))]
    with main.Progress("", 0) as bar:
        found = main.train_one_epoch(network, objective, optimizer, scaler, [(0, task)], batch, bar)
    return found[f"{task} Loss"], found["Adversarial Loss"]


@pytest.fixture(scope="module")
def steps(golden):
    """What three training steps in float64 give: the embeddings before them, what each finds, the betas after them."""
    n_classes = dict(zip(("Class", "Shared"), map(int, golden["n_classes"])))
    batches = golden_batches(n_classes)
    lr, weight = float(golden["lr"]), float(golden["adv_weight"])
    network = FloatNetwork(netlib.ResNet50(), dict.fromkeys(n_classes, 128), freeze_batchnorm=True)
    draw_weights(network, lambda name: name.removeprefix(netlib.PREFIX).replace("heads.", "last_linear."))
    values = {"losses": "marginloss", "sampling": "distance", "embed_sizes": 128, "margin": 0.2, "nu": 0.0}
    task = Namespace(**values, beta=1.2, beta_lr=5e-4, proxy_lr=1e-5)
    tasks = dict.fromkeys(n_classes, task)
    objective = losses.build_objective(tasks, n_classes, {"Class-Shared": weight}, adv_dim=512, lr=lr)
    draw_weights(objective.adversaries["Class-Shared"], lambda name: name.replace("projection", "adv.regressor"))
    for name, loss in objective.task_losses.items():
        loss.sampler = GoldenTriplets([triplets for of, _, _, triplets in batches if of == name])
    network, objective = network.double().eval(), objective.double()
    optimizer, _ = main.build_optimizer(parse("--lr", lr), network, objective)
    found = []
    with one_thread():
        with torch.no_grad():
            before = network(torch.from_numpy(batches[0][1]).double(), list(n_classes))
        for name, images, labels, _ in batches:
            loss, adversarial = train_step(network, objective, optimizer, name, images.astype(float), labels)
            sums = [[values.sum().item(), values.square().sum().item()] for values in network.parameters()]
            found.append((loss, adversarial / weight, np.sum(sums, axis=0)))
    betas = {name: loss.beta.detach().numpy() for name, loss in objective.task_losses.items()}
    return {"batches": batches, "before": before, "found": found, "betas": betas}


def test_the_first_steps_are_those_of_the_published_code(golden, steps):
    for i, (_, _, labels, triplets) in enumerate(steps["batches"]):
        assert (labels == golden["labels"][i]).all()
        assert (triplets == golden["triplets"][i]).all()
    for task in ("Class", "Shared"):
        expected = golden[f"{task.lower()}_embeddings"]
        np.testing.assert_allclose(steps["before"][task].numpy(), expected, rtol=0, atol=1.1e-6)
        # Stored in float32. Of the task that is not the step's, momentum moves the betas on
        beta = golden[f"beta_{task.lower()}_zeroed"]
        np.testing.assert_allclose(steps["betas"][task], beta, rtol=3e-7)
    assert np.abs(golden["beta_class"] / golden["beta_class_zeroed"] - 1).max() > 1e-4  # where they would rest
    losses_found, adversarial, sums = zip(*steps["found"])
    np.testing.assert_allclose(losses_found, golden["metric_loss_zeroed_f64"], rtol=5e-14)
    np.testing.assert_allclose(adversarial, golden["adversarial_f64"], rtol=5e-14)
    np.testing.assert_allclose(sums, golden["param_sums_f64"], rtol=5e-14)


def parameters_before_and_after(parts, tasks):
    """Train a step of each task; return the parameters before the first and after each, by name."""
    network, objective, optimizer = parts
    rng, states = np.random.default_rng(0), []
    for task in (None, *tasks):
        if task:
            images = rng.integers(0, 255, (8, 3, 32, 32), dtype=np.uint8)
            train_step(network, objective, optimizer, task, images, np.repeat([0, 1], 4))
        named = [*network.named_parameters(), *objective.named_parameters()]
        states.append({name: values.detach().clone() for name, values in named})
    return states


@pytest.mark.parametrize("loss", ["marginloss", "proxynca"])
def test_what_a_loss_trains_moves_on_in_a_step_of_the_other_task_and_the_backbone_rests(loss):
    args = parse("--lr", 1e-3, "--losses", loss, loss, "--embed_sizes", 8, 6)
    torch.manual_seed(0)
    sizes = {"Class": 8, "Shared": 6}
    network = netlib.build_network("small", sizes, pretrained=False, freeze_batchnorm=True, detached_heads=["Shared"])
    objective = losses.build_objective(options.per_task(args), dict.fromkeys(sizes, 2), {}, args.adv_dim, args.lr)
    optimizer, _ = main.build_optimizer(args, network, objective)
    states = parameters_before_and_after((network, objective, optimizer), ("Class", "Shared", "Class"))
    moved = [
        {".".join(name.split(".")[:2]) for name in before if not torch.equal(before[name], after[name])}
        for before, after in zip(states, states[1:])
    ]
    of_class, of_shared = ({f"heads.{task}", f"task_losses.{task}"} for task in sizes)
    # Shared's head and betas have not had a gradient before the second step; from then on momentum moves both
    assert moved == [{"backbone.layers", *of_class}, of_class | of_shared, {"backbone.layers", *of_class, *of_shared}]


def test_float16_gradients_that_overflow_at_every_scale_end_a_run(tiny_run, class_folders, tmp_path, capsys):
    """Normalising features that are next to nothing makes the gradients as large as the adversarial weight does."""
    first = tiny_run("--n_epochs", 1)
    state = read_checkpoint(first)["state_dict"]
    state["backbone.layers.late_bn.weight"] *= 1e-6
    state["backbone.layers.late_bn.bias"] *= 0
    for task in ("Class", "Shared"):
        state[f"heads.{task}.bias"] *= 0
    torch.save(state, tmp_path / "small.pth.tar")
    more = ["--weights", tmp_path / "small.pth.tar", "--amp", "fp16", "--adv_weights", 1e9, "--n_epochs", 40]
    error = refused(capsys, small_flags(class_folders, tmp_path, *more, "--task_p", 1, 1, "--bs", 4), code=1)
    last = tmp_path / "tiny" / "run" / LAST
    assert "; diverged in epoch " in error
    assert "the float16 gradients overflow at every step, whatever their scale: try --amp bf16 or none" in error
    assert error.endswith(f"; {last} holds the state before that epoch\n")
    stored = read_checkpoint(last)
    assert all(torch.equal(values, state[name]) for name, values in stored["state_dict"].items() if "weight" in name)


def test_training_learns_and_its_logs_tell_how_labels_match_the_known_factors(tmp_path):
    flags = ["--img_size", 64, "--bs", 56, "--cs_per_bs", 4, 4, "--shared_num_classes", 8, "--cluster_update_freq", 13]
    folder = run(small_flags(".", tmp_path, "--dataset", "shapes", "--n_epochs", 12, *flags))
    before, logs = read_checkpoint(folder, LAST)["progress"]["initial_scores"]["Recall @ 1"], read_logs(folder)
    assert logs["log_val_Class.csv"]["Recall @ 1"].iloc[-1] > before + 0.2
    losses_logged = logs["log_train_Class.csv"][["Class Loss", "Shared Loss"]]
    assert (losses_logged.iloc[-1] < 0.75 * losses_logged.iloc[0]).all()
    mining = logs["log_mining.csv"]
    factors = ["AMI class", "AMI background", "AMI orientation", "AMI size", "AMI light"]
    assert list(mining)[-5:] == factors
    assert mining[factors].stack().between(-0.1, 1).all()
    assert mining["AMI background"][0] > 0.5
    probe = logs["log_probe.csv"]
    for name in ("Class", "Mined", "background", "orientation", "size", "light"):
        columns = [f"{name} from Class", f"{name} from Shared", f"{name} by chance"]
        assert probe[columns].stack().between(0, 1).all()
        if name != "Mined":
            assert probe[[f"Test {column}" for column in columns]].stack().between(0, 1).all()
    assert "Test Mined by chance" not in probe
