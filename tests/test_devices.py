"""GPUs of Apple (mps) and Intel (xpu), with a stand-in: what is moved there is computed on the CPU."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from conftest import QUIET_TRACKERS, TINY
from test_checkpoint import assert_same_end, checkpoint, only_run, stop_at

from data import sequences_at
from parameters import Parameters
from utils_alg1.base.errors import CANNOT_TRAIN, Alg1Error
from utils_alg1.report import results as results_module
from utils_alg1.training.arithmetic import Arithmetic
from utils_alg1.training.checkpoint import read_checkpoint
from utils_alg1.training.distributed import Distributed
from utils_alg1.training.progress import Clock
from utils_alg1.training.runtime import Runtime, check_memory, start_runtime

PLACES = ["mps", "xpu", "xpu:1"]


@dataclass
class StandIn:
    """What was asked of a device that is not there."""

    moved: set[str] = field(default_factory=set)  # the devices that tensors were moved to
    waited_for: list[str] = field(default_factory=list)  # the devices that were synchronized


@pytest.fixture
def stand_in(monkeypatch):
    """Make PyTorch believe in two GPUs of a kind: `stand_in("xpu")`; their tensors stay on the CPU."""

    def pretend(kind: str, memory: int = 1 << 40) -> StandIn:
        asked, to = StandIn(), torch.Tensor.to

        def here(argument):
            if isinstance(argument, torch.device) and argument.type == kind:
                asked.moved.add(str(argument))
                return torch.device("cpu")
            return argument

        def move(tensor, *args, **kwargs):
            return to(tensor, *map(here, args), **{name: here(value) for name, value in kwargs.items()})

        module = {"mps": torch.mps, "xpu": torch.xpu}[kind]
        if kind == "mps":
            monkeypatch.setattr(module, "recommended_max_memory", lambda: memory)
            monkeypatch.setattr(module, "synchronize", lambda: asked.waited_for.append("mps"))
        else:
            properties = SimpleNamespace(total_memory=memory)
            monkeypatch.setattr(module, "get_device_properties", lambda device: properties)
            monkeypatch.setattr(module, "synchronize", lambda device: asked.waited_for.append(str(device)))
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch.Tensor, "to", move)
        return asked

    return pretend


@pytest.fixture(autouse=True)
def no_picture_and_short_samples(monkeypatch):
    monkeypatch.setattr("utils_alg1.report.pictures.draw_loss_curve", lambda *_: None)
    monkeypatch.setattr("utils_alg1.report.pictures.draw_attention", lambda *_: b"")
    monkeypatch.setattr(results_module, "SAMPLE_LENGTH", 4)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("flags", [(), ("--dropout", 0.1, "--positions", "rotary", "--optimizer", "muon")])
def test_a_run_on_a_device_is_resumed_to_the_same_bytes(
    device, flags, train, text_file, stand_in, monkeypatch
):
    asked = stand_in(device.split(":")[0])
    flags = [*TINY, *QUIET_TRACKERS, "--data", text_file, "--device", device, *flags]
    result = train(*flags, "--runs-dir", "whole")
    assert (result.code, result.err) == (0, "")
    assert f"device   {device}, float32, 1 thread\n" in result.out
    assert asked.moved == {device}
    stop_at(2, monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    assert train(*flags).code == 130
    result = train("--resume", "latest")
    assert (result.code, result.err) == (0, "")
    assert_same_end()
    recorded = read_checkpoint(checkpoint(6)).metadata["arithmetic"]
    expected = Arithmetic(device.split(":")[0], "float32", gradient="autograd")
    assert Arithmetic(**recorded) == expected
    described = json.loads((only_run() / "meta/full_config.json").read_text("utf-8"))["runtime"]
    assert described["device"] == device


@pytest.mark.parametrize("device", PLACES)
def test_every_reading_of_the_clock_waits_for_the_device(device, train, text_file, stand_in, monkeypatch):
    asked, readings, now = stand_in(device.split(":")[0]), [], Clock._now

    def reading(clock):
        before = len(asked.waited_for)
        value = now(clock)
        readings.append(len(asked.waited_for) - before)
        return value

    monkeypatch.setattr(Clock, "_now", reading)
    assert train(*TINY, *QUIET_TRACKERS, "--data", text_file, "--device", device).code == 0
    assert set(readings) == {1} and len(readings) > 6
    assert set(asked.waited_for) == {device}


def test_no_memory_is_pinned_for_a_device(stand_in, monkeypatch):
    """A copy that is not waited for could read memory that is freed already; CUDA alone keeps track of it."""
    stand_in("xpu")
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    x, y = sequences_at(torch.tensor([0, 2]).numpy(), torch.arange(9).numpy(), 3, torch.device("xpu"))
    assert (x.tolist(), y.tolist()) == ([[0, 1, 2], [2, 3, 4]], [[1, 2, 3], [3, 4, 5]])


@pytest.mark.parametrize("device", PLACES)
def test_the_memory_of_the_device_is_what_a_model_must_fit_into(device, stand_in):
    stand_in(device.split(":")[0], memory=1 << 30)
    params = Parameters.from_values({"n_embd": 4096, "n_layer": 12}, {})
    with pytest.raises(Alg1Error, match=rf"GiB or more to train, and {device} has 1$") as caught:
        check_memory(params, 65, torch.device(device))
    assert caught.value.exit_code == CANNOT_TRAIN
    stand_in(device.split(":")[0])
    check_memory(params, 65, torch.device(device))


@pytest.mark.parametrize("kind, words", [("mps", "an Apple GPU"), ("xpu", "an Intel GPU")])
def test_auto_leaves_a_device_alone_and_says_how_to_use_it(kind, words, train, text_file, stand_in):
    asked = stand_in(kind)
    line = f"{words} is here, which auto leaves alone: --device {kind} trains on it\n"
    flags = [*TINY, *QUIET_TRACKERS, "--data", text_file]
    result = train(*flags)
    assert result.code == 0 and result.out.count(line) == 1
    assert "device   cpu, float32, 1 thread\n" in result.out and not asked.moved
    assert train("--resume", "latest", "--max-iters", 7).out.count(line) == 1
    assert line not in train(*flags, "--device", "cpu").out
    other = start_runtime(Parameters.from_values({"threads": 1}, {}), Distributed(rank=1, world_size=2))
    assert other.device.type == "cpu"


def test_what_a_device_began_goes_on_without_it_in_one_line(train, text_file, stand_in, monkeypatch):
    flags = [*TINY, *QUIET_TRACKERS, "--data", text_file]
    stand_in("xpu")
    stop_at(2, monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    assert train(*flags, "--device", "xpu").code == 130
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    result = train("--resume", "latest")
    assert (result.code, result.err) == (
        2,
        "error: --device xpu: this machine has no such device\nhint: use --device auto or --device cpu\n",
    )
    result = train("--resume", "latest", "--device", "cpu")
    assert (result.code, result.err) == (
        0,
        "warning: the run was computed with xpu, and continues with cpu:"
        " it may not end with the same bytes\n",
    )


@pytest.mark.parametrize("device", PLACES)
def test_a_text_is_drawn_and_scored_on_a_device(device, train, sample, text_file, stand_in):
    assert train(*TINY, *QUIET_TRACKERS, "--data", text_file).code == 0
    asked = stand_in(device.split(":")[0])
    for flags in (("--max-new-tokens", 20), ("--score", text_file)):
        on_cpu = sample(*flags, "--device", "cpu")
        assert not asked.moved
        on_device = sample(*flags, "--device", device)
        assert asked.moved == {device}
        assert (on_device.code, on_device.out) == (0, on_cpu.out)
        asked.moved.clear()


def test_autocast_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *arguments: arguments)
    for device in ("mps", "xpu"):
        runtime = Runtime(torch.device(device), Arithmetic(device, "bfloat16"))
        assert runtime.autocast() == (device, torch.bfloat16)
        assert not runtime.loss_scaler().is_enabled()


@pytest.mark.parametrize(
    "device, dtype, macos, error, hint",
    [
        ("mps", "bfloat16", 14, None, None),
        ("xpu", "bfloat16", 0, None, None),
        (
            "mps",
            "bfloat16",
            13,
            "--dtype bfloat16 needs macOS 14, and the device is mps",
            "use --dtype float32",
        ),
        (
            "xpu",
            "float16",
            0,
            "--dtype float16 needs CUDA, and the device is xpu",
            "use --dtype float32 or --dtype bfloat16",
        ),
    ],
)
def test_a_dtype_that_a_device_cannot_compute_is_refused(
    device, dtype, macos, error, hint, stand_in, monkeypatch, caplog
):
    stand_in(device)
    monkeypatch.setattr(
        torch.backends.mps, "is_macos_or_newer", lambda major, minor: (macos, 0) >= (major, minor)
    )
    params = Parameters.from_values({"device": device, "dtype": dtype, "threads": 1}, {})
    expected = Arithmetic(device, dtype, gradient="autograd")
    if error is None:
        assert start_runtime(params).arithmetic == expected
        return
    with pytest.raises(Alg1Error) as caught:
        start_runtime(params)
    assert (caught.value.message, caught.value.hint) == (error, hint)
    # A run that another machine has begun so goes on in float32, with a warning.
    assert start_runtime(params, recorded=vars(expected)).arithmetic.dtype == "float32"
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"warning: the run was computed with {dtype}, and continues with float32:"
    )
