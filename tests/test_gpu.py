"""What only a GPU does, without one: cards and drivers that do not fit, what makes the host wait, events and copies."""

import importlib.util
import os
import signal
import sys
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import parse, refused, run, run_in_process, small_flags
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import auxiliaries
import evaluate
import losses
import main
import netlib
from run import options
from support import processes
from support.errors import InputError
from support.output import Progress

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)"
T4, A100, H200, RTX_5090, GTX_1080_TI = (7, 5), (8, 0), (9, 0), (12, 0), (6, 1)
WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


def test_the_suite_is_of_the_cpu():
    if os.environ.get("MIC_TEST_GPU") != "1":
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        assert not torch.cuda.is_available()


@pytest.mark.parametrize("visible", [None, "0", "3,1", "7", " 0,-1", "GPU-8f6d", "MIG-41b3"])
def test_a_gpu_that_pytorch_cannot_use_is_refused_unless_it_is_hidden(visible):
    gpus = ["GPU 0: NVIDIA GeForce GTX 1080 Ti (UUID: GPU-8f6d)"]
    with pytest.raises(InputError) as error:
        auxiliaries.why_no_gpu(TOO_OLD, gpus, visible)
    under = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible!r}"
    expected = f"cannot use GPU 0: NVIDIA GeForce GTX 1080 Ti{under} ({TOO_OLD}); to train on the CPU "
    assert str(error.value) == f"PyTorch {torch.__version__} {expected}set CUDA_VISIBLE_DEVICES=''"
    assert auxiliaries.why_no_gpu(TOO_OLD, [], visible) == f"no CUDA GPU found: {TOO_OLD}"
    for hidden in ("", "-1", "-1,0", "NoDevFiles", "none"):
        said = f"CUDA_VISIBLE_DEVICES={hidden!r} hides all GPUs"
        assert auxiliaries.why_no_gpu("No CUDA GPUs are available", gpus, hidden) == said


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_the_reason_that_pytorch_gives_is_its_whole_first_line(monkeypatch, error):
    line = "CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env variable A"

    def init():
        raise error(f"{line}.\nmore")

    monkeypatch.setattr(torch.cuda, "init", init)
    assert auxiliaries.reason_without_cuda() == line


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform == "win32", reason="is about machines without a GPU")
def test_a_run_is_not_left_to_the_cpu_where_the_driver_lists_a_gpu(
    class_folders, tmp_path, capsys, caplog, monkeypatch
):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    argv = small_flags(class_folders, tmp_path / "results")
    program.write_text("#!/bin/sh\necho 'GPU 0: Tesla T4 (UUID: GPU-8f6d)'\n")
    program.chmod(0o755)
    assert "cannot use GPU 0: Tesla T4 (" in refused(capsys, argv)
    assert not (tmp_path / "results").exists()
    for script in ("echo 'No devices found.'", "echo 'GPU 0: lost'; exit 9"):  # a container with the host's driver only
        program.write_text(f"#!/bin/sh\n{script}\n")
        assert auxiliaries.pick_device(0).type == "cpu"
        assert caplog.messages[-1].startswith("device: CPU (no CUDA GPU found: ")


@pytest.mark.parametrize(
    ("capability", "architectures", "instead"),
    [
        (T4, WHEEL, None),
        ((8, 9), WHEEL, None),  # runs what was built for 8.6
        (GTX_1080_TI, WHEEL, "a build for CUDA 12.6"),
        ((7, 0), WHEEL, "a build for CUDA 12.6"),
        (GTX_1080_TI, ["sm_50", "sm_60", "sm_70"], None),
        ((8, 0), ["sm_75", "sm_86", "sm_90"], "a newer build"),
        (RTX_5090, ["sm_80", "sm_90"], "a newer build"),
        (RTX_5090, ["sm_80", "compute_90"], None),  # is compiled on the card
        (H200, ["sm_80", "sm_90a"], None),
        (GTX_1080_TI, [], None),
        ((9, 4), ["gfx90a", "gfx942"], None),
    ],
)
def test_a_gpu_without_kernels_is_refused_with_the_build_that_has_them(capability, architectures, instead):
    if instead is None:
        auxiliaries.require_kernels("Card", capability, architectures)
        return
    with pytest.raises(
        InputError, match=f"^Card: .* capability {capability[0]}.{capability[1]}, .*; install {instead}"
    ):
        auxiliaries.require_kernels("Card", capability, architectures)


@pytest.mark.parametrize(
    ("capability", "tf32", "amp", "lacking"),
    [
        (None, False, "bf16", ""),
        (None, True, "none", "--tf32"),
        (T4, False, "fp16", ""),
        (T4, False, "bf16", "--amp bf16"),
        (None, True, "bf16", "--tf32"),
        (T4, True, "fp16", "--tf32"),
        (A100, True, "bf16", ""),
    ],
)
def test_a_precision_that_the_gpu_lacks_is_refused_in_training_and_left_out_in_scoring(
    capability, tf32, amp, lacking, caplog
):
    scored = auxiliaries.supported_precision(capability, tf32, amp)
    said = "".join(f"{line}\n" for line in caplog.messages)
    if not lacking:
        auxiliaries.require_precision(capability, tf32, amp, is_resumed=False)
        assert (scored, said) == ((tf32, amp), "")
        return
    instead = {"--tf32": "leave it out", "--amp bf16": "give --amp fp16"}[lacking]
    for is_resumed, what_to_do in ((False, instead), (True, "resume the run on such a GPU")):
        with pytest.raises(InputError, match=rf"^{lacking}: needs an NVIDIA GPU .* 8.0 .*; {what_to_do}$"):
            auxiliaries.require_precision(capability, tf32, amp, is_resumed)
    used = "none" if lacking == "--amp bf16" else amp
    assert scored == (False, used)
    in_words = {"none": "float32"}.get(used, used)
    assert said == f"embedding in {in_words}: this device does not support the run's {lacking}\n"


def test_a_card_that_lacks_both_precisions_is_said_to_once(caplog):
    assert auxiliaries.supported_precision(T4, True, "bf16") == (False, "none")
    said = "embedding in float32: this device does not support the run's --tf32 and --amp bf16"
    assert caplog.messages == [said]


def test_float32_on_a_card_that_has_faster_ones_is_hinted_at():
    assert "--amp bf16" in auxiliaries.precision_hint(H200, False, "none")
    for capability, tf32, amp in [
        (T4, False, "none"),
        (H200, True, "none"),
        (H200, False, "bf16"),
        (None, False, "none"),
    ]:
        assert auxiliaries.precision_hint(capability, tf32, amp) is None


@pytest.fixture
def card(monkeypatch):
    """Lets PyTorch have one GPU of a name, a capability and architectures it was built for, which it may warn of."""

    def install(name, capability, architectures=WHEEL, warning=None):
        def name_of(_):
            if warning:
                warnings.warn(warning, stacklevel=1)
            return name

        monkeypatch.setattr(torch.cuda, "get_device_name", name_of)
        answers = {"is_available": True, "device_count": 1, "set_device": None}
        answers |= {"get_device_capability": capability, "get_arch_list": architectures}
        for function, answer in answers.items():
            monkeypatch.setattr(torch.cuda, function, lambda *_, answer=answer: answer)

    return install


def test_the_gpu_that_is_asked_for_is_taken_and_made_the_current_one(card, monkeypatch, caplog, recwarn):
    chosen, device = [], torch.device("cuda", 0)
    card("NVIDIA H200", H200)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert auxiliaries.pick_device(0) == device
    assert chosen == [device]
    assert caplog.messages == ["device: GPU 0, NVIDIA H200"]
    assert auxiliaries.compute_capability(device) == H200
    assert auxiliaries.event_maker(device) is not None
    assert not recwarn.list
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert auxiliaries.compute_capability(device) is None


def test_what_pytorch_says_of_a_gpu_is_shown_unless_one_line_refuses_it(card, recwarn):
    card("GTX 1080 Ti", GTX_1080_TI, warning="Found GPU0\nof several lines")
    with pytest.raises(InputError, match=r"^GTX 1080 Ti: PyTorch \S+ has no kernels"):
        auxiliaries.pick_device(0)
    assert not recwarn.list
    card("NVIDIA H200", H200, warning="Found GPU1\nof several lines")
    auxiliaries.pick_device(0)
    assert [str(warning.message) for warning in recwarn.list] == ["Found GPU1\nof several lines"]


@pytest.mark.parametrize(
    ("installed", "more", "printed", "message"),
    [
        (("GTX 1080 Ti", GTX_1080_TI), [], [], "error: GTX 1080 Ti: PyTorch "),
        (("Tesla T4", T4), ["--amp", "bf16"], ["device: GPU 0, Tesla T4"], "error: --amp bf16: needs an NVIDIA GPU of"),
        (("Tesla T4", T4), ["--tf32"], ["device: GPU 0, Tesla T4"], "error: --tf32: needs an NVIDIA GPU of"),
        (("H200", H200), ["--amp", "bf16"], ["device: GPU 0, H200"], "no images of --dataset"),
        (("H200", H200), [], ["device: GPU 0, H200", "hint: on this GPU --amp bf16 "], "no images of --dataset"),
    ],
)
def test_a_run_begins_by_what_its_gpu_can_do(card, tmp_path, capsys, installed, more, printed, message):
    card(*installed)
    with pytest.raises(SystemExit):
        run(small_flags(tmp_path, tmp_path / "results", *more))
    out, error = capsys.readouterr()
    said = [line for line in out.splitlines() if line.startswith(("device: ", "hint: "))]
    assert len(said) == len(printed)
    assert all(line.startswith(start) for line, start in zip(said, printed, strict=True))
    assert message in error
    assert not (tmp_path / "results").exists()


def test_a_resumed_run_whose_precision_is_settled_gets_no_hint(card, tmp_path, caplog):
    card("H200", H200)
    main.prepare_device(parse(*small_flags(tmp_path, tmp_path)), is_resumed=True)
    assert caplog.messages == ["device: GPU 0, H200"]


def outlive_torchrun():
    """End as torchrun does where it is killed, but for a process that does not answer SIGTERM, as one in NCCL."""
    ready, tell = os.pipe()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        processes.die_with_parent(os.getppid(), signal.SIGKILL)
        os.write(tell, b"ready")
        time.sleep(20)
        os.write(2, b"alive")
        os._exit(0)
    os.read(ready, 5)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_process_that_waits_for_the_others_on_a_gpu_ends_with_torchrun():
    assert run_in_process(outlive_torchrun) == (-signal.SIGKILL, "")


@pytest.mark.parametrize(
    ("has_gpu", "signum", "backend"), [(True, signal.SIGKILL, "cpu:gloo,cuda:nccl"), (False, signal.SIGTERM, "gloo")]
)
def test_processes_of_torchrun_end_with_it_by_what_they_answer(monkeypatch, has_gpu, signum, backend):
    called = []
    for name, value in {"TORCHELASTIC_RUN_ID": "tests", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(processes, "die_with_parent", lambda *values: called.append(values))

    def connect(backend, timeout):
        called.append(backend)
        raise ConnectionError

    monkeypatch.setattr(torch.distributed, "init_process_group", connect)
    with pytest.raises(ConnectionError), processes.connected():
        pass
    assert called == [(os.getppid(), signum), backend]


class Gpu:
    """A GPU that works behind the host: work is given to it in seconds; `now` is the host's time."""

    def __init__(self):
        self.now = self.free_at = 0.0

    def work(self, seconds):
        """Give it work, which begins when it has done all before."""
        self.free_at = max(self.free_at, self.now) + seconds

    def event(self):
        """Return a new event, with what the program uses of torch.cuda.Event."""
        return GpuEvent(self)


class GpuEvent:
    """A moment between two pieces of work."""

    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.free_at, self.gpu.now)

    def query(self):
        return self.gpu.now >= self.at

    def synchronize(self):
        self.gpu.now = max(self.gpu.now, self.at)

    def elapsed_time(self, later):
        return 1000 * (later.at - self.at)


@pytest.mark.parametrize(("per_step", "idle"), [(10.0, 3.0), (2.0, 3.0 + 9 * 1.0)])
def test_loading_is_the_time_in_which_the_gpu_has_nothing_to_do(per_step, idle, monkeypatch):
    """A batch takes 3 s, during which the GPU is still at the step before: it waits for the first one, or for all."""
    gpu, stopwatch = Gpu(), auxiliaries.Stopwatch()
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.now)

    def batches():
        for i in range(10):
            gpu.now += 3.0
            yield i

    with stopwatch.measure("training"):
        for _ in stopwatch.loading(batches(), gpu.event):
            gpu.work(per_step)
            if _ == 9:
                gpu.now = gpu.free_at  # the losses are read
    assert stopwatch.seconds["loading"] == pytest.approx(idle)
    assert stopwatch.seconds["training"] == pytest.approx(10 * per_step)


def test_features_are_copied_while_the_next_batch_is_computed():
    gpu, got = Gpu(), []

    def computed():
        for i in range(4):
            gpu.now += 3.0  # the batch is loaded
            gpu.work(4.0)
            yield {"Class": torch.full((2, 3), float(i))}

    for batch in evaluate.on_host(computed(), gpu.event):
        got.append(batch["Class"][0, 0])
    assert got == [0, 1, 2, 3]
    assert gpu.now == 3.0 + 4 * 4.0  # one batch after the other takes 4 * (3 + 4) s


def test_no_gradient_is_held_while_a_step_computes_its_loss(class_folders):
    torch.manual_seed(0)
    args = parse("--embed_sizes", 8, 6)
    network = netlib.build_network("small", {"Class": 8, "Shared": 6}, pretrained=False, freeze_batchnorm=True)
    objective = losses.build_objective(options.per_task(args), {"Class": 4, "Shared": 4}, {}, args.adv_dim, args.lr)
    optimizer, _ = main.build_optimizer(args, network, objective)
    held = []
    network.register_forward_pre_hook(
        lambda *_: held.append(sum(parameter.grad is not None for parameter in network.parameters()))
    )
    batch = torch.randint(255, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) // 2
    steps, scaler = [(0, "Class"), (0, "Shared"), (1, "Class")], torch.amp.GradScaler("cpu", enabled=False)
    with Progress("", 0) as bar:
        main.train_one_epoch(network, objective, optimizer, scaler, steps, [batch] * 3, bar)
    assert held == [0, 0, 0]


class HostWaits(TorchDispatchMode):
    """Counts what makes the host wait for the device "gpu", and what it copies there; gives numbers in place of it."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        source = args[0].device.type if args and isinstance(args[0], torch.Tensor) else "cpu"
        target = torch.device(kwargs.get("device") or source).type
        if name == "_local_scalar_dense" and source == "gpu":
            self.found["reads"] += 1
            return 1
        if name in ("nonzero", "multinomial", "equal"):  # they wait inside
            self.found["values"] += 1
        is_copy = name in ("_to_copy", "to")  # the latter in inference mode
        if is_copy and (source, target) == ("cpu", "gpu"):
            self.found["to the device"] += 1
            self.found["to the device, waited for"] += not kwargs.get("non_blocking")
        if is_copy and (source, target) == ("gpu", "cpu"):
            self.found["to the host"] += 1
            with _disable_current_modes():  # a tensor that is no fake
                return torch.ones(args[0].shape, dtype=args[0].dtype)
        return function(*args, **kwargs)

    @property
    def waits(self):
        """How often the host has waited."""
        return sum(self.found[what] for what in ("reads", "values", "to the host", "to the device, waited for"))


class StepCounter(Progress):
    """Notes at the end of each step how often the host has waited."""

    def __init__(self, waits):
        super().__init__("", 0)
        self.host, self.noted = waits, []

    def update(self, n_images):
        self.noted.append(self.host.waits)


def on_fake_gpu(module):
    """Put a module's parameters and buffers on the device "gpu", without values."""
    for part in module.modules():
        for name, values in part._parameters.items():
            if values is not None:
                fake = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="gpu")
                part._parameters[name] = torch.nn.Parameter(fake)
        for name, values in part._buffers.items():
            if values is not None:
                part._buffers[name] = torch.empty_strided(
                    values.shape, values.stride(), dtype=values.dtype, device="gpu"
                )
    return module


def fake_cases():
    """Return (backbone, loss, sampler, directions): each of them, and each loss with each sampler that it takes."""
    both, cases = {"Class-Shared": 50.0, "Shared-Class": 50.0}, []
    for loss in losses.LOSSES:
        samplers = list(losses.SAMPLERS) if losses.takes_sampler(loss) else ["distance"]
        cases += [("small", loss, sampler, both) for sampler in samplers]
    backbones = ["resnet50", "googlenet"]
    backbones += ["timm/test_efficientnet", "timm/test_vit"] if importlib.util.find_spec("timm") else []
    cases += [(backbone, "marginloss", "distance", {"Class-Shared": 50.0}) for backbone in backbones]
    return [*cases, ("small", "marginloss", "distance", {})]


def compute_on_fake_gpu():
    """Train steps, embed and score on a device that does not exist, where tensors have a device and no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Module(backend_registration._DummyBackendModule):
        """What torch.autocast asks of a device's module."""

        def get_amp_supported_dtype(self):
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend("gpu", backend_module=Module())
    for backbone, loss, sampler, directions in fake_cases():
        case = f"{backbone} {loss} {sampler} {list(directions)}"
        args = parse("--losses", loss, loss, "--sampling", sampler, sampler, "--embed_sizes", 8, 6)
        network = netlib.build_network(
            backbone, {"Class": 8, "Shared": 6}, pretrained=False, freeze_batchnorm=True, img_size=64
        )
        objective = losses.build_objective(options.per_task(args), {"Class": 4, "Shared": 3}, directions, 16, args.lr)
        with FakeTensorMode(allow_non_fake_inputs=True):
            batch = torch.zeros(8, 3, 64, 64, dtype=torch.uint8), torch.arange(8) // 2
            on_fake_gpu(network)
            on_fake_gpu(objective)
            optimizer = torch.optim.Adam([*network.parameters(), *objective.parameters()], foreach=True)
            scaler, steps = torch.amp.GradScaler("cpu", enabled=False), [(0, "Class"), (0, "Shared")]
            with HostWaits() as host, StepCounter(host) as counter:
                main.train_one_epoch(network, objective, optimizer, scaler, steps, [batch] * 2, counter)
            assert counter.noted == [0, 0], f"{case}: the host has waited after each step {counter.noted} times"
            assert host.waits, f"{case}: the losses are never read"
            with HostWaits() as host, torch.no_grad():
                features = network(batch[0].to("gpu", non_blocking=True), ["Class", "Shared", "Early"])
            assert {values.device.type for values in features.values()} == {"gpu"}, case
            assert host.waits == 0, case
    embeddings, labels = np.random.default_rng(0).normal(size=(60, 4)), np.arange(60) // 3
    copies = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for block_size in (4, 64):
            with HostWaits() as host:
                evaluate.retrieval_scores(embeddings, labels, [1], "gpu", block_size=block_size)
            copies[block_size] = host.found["to the device"]
            assert host.found["to the host"] == -(-60 // block_size)
    assert copies[4] == copies[64], f"copies to the device grow with the number of blocks: {copies}"


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this PyTorch fakes no device"
)
def test_no_tensor_is_on_another_device_and_no_step_makes_the_host_wait():
    """In a process of its own, as a device cannot be taken back."""
    ended = run_in_process(compute_on_fake_gpu)
    assert ended.returncode == 0, ended.stderr
