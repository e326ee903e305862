"""What a run stands on: device, threads, dtype, seeds, memory and signals."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import PROJECT, QUIET_TRACKERS, TINY
from hypothesis import given
from hypothesis import strategies as st

from parameters import ModelConfig, Parameters
from utils_alg1.base.errors import CANNOT_TRAIN, OTHER_PROGRAMS, Alg1Error
from utils_alg1.console import signals as signals_module
from utils_alg1.console.script import run_script
from utils_alg1.console.signals import StopSignals
from utils_alg1.run_directory import RunFolder, checkpoint_paths, list_runs
from utils_alg1.training import arithmetic as arithmetic_module
from utils_alg1.training import runtime as runtime_module
from utils_alg1.training.arithmetic import (
    Arithmetic,
    Processor,
    choose_arithmetic,
    environment,
    recorded_arithmetic,
)
from utils_alg1.training.devices import find_device, memory_of, visible_gpus
from utils_alg1.training.distributed import SINGLE_PROCESS, Distributed, is_lost_connection
from utils_alg1.training.runtime import (
    Compiled,
    Runtime,
    memory_guard,
    smaller_settings,
    start_runtime,
)
from utils_alg1.training.seeds import derive_seed, generator, seed_initial_weights
from utils_alg1.utils_config_loader import RESUMED

SMALL = {"n_embd": 64, "n_head": 4, "n_layer": 4, "block_size": 32, "batch_size": 4}
NARROW = SMALL | {"batch_size": 64}  # a large step of a narrow model
MIDDLE = {"n_embd": 128, "n_head": 4, "n_layer": 4, "block_size": 64, "batch_size": 12}
LARGE = {"n_embd": 384, "n_head": 6, "n_layer": 6, "block_size": 256, "batch_size": 8}

SEEDS = st.integers(0, 2**63 - 1)


@pytest.fixture
def machine(monkeypatch):
    """Make torch believe in so many GPUs: `machine(cuda=2, bf16=False)`, `machine(xpu=1)`, `machine(mps=1)`.

    What it returns are the CUDA devices that were made the current one.
    """

    def pretend(cuda: int = 0, mps: int = 0, xpu: int = 0, bf16: bool = True) -> list[torch.device]:
        current: list[torch.device] = []

        def make_current(device):
            current.append(device)
            return contextlib.nullcontext()

        def is_bf16_supported(including_emulation: bool = True) -> bool:
            return bf16 or including_emulation

        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        monkeypatch.setattr(torch.cuda, "device", make_current)
        monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
        counts = {"cuda": cuda, "mps": mps, "xpu": xpu}
        kind = next((kind for kind, n in counts.items() if n), None)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: counts[kind] if kind else 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: kind and torch.device(kind))
        return current

    return pretend


@pytest.fixture(autouse=True)
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def parameters(**values) -> Parameters:
    return Parameters.from_values(values, {})


# --- device, threads, dtype ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, gpus, expected",
    [
        ("auto", {}, "cpu"),
        ("auto", {"mps": 1}, "cpu"),
        ("auto", {"xpu": 2}, "cpu"),
        ("auto", {"cuda": 1}, "cuda"),
        ("cpu", {}, "cpu"),
        ("cpu", {"cuda": 2}, "cpu"),
        ("cpu:0", {}, "cpu:0"),
        ("cuda", {"cuda": 1}, "cuda"),
        ("cuda:0", {"cuda": 1}, "cuda:0"),
        ("cuda:1", {"cuda": 2}, "cuda:1"),
        ("mps", {"mps": 1}, "mps"),
        ("mps:0", {"mps": 1}, "mps:0"),
        ("xpu", {"xpu": 1}, "xpu"),
        ("xpu:1", {"xpu": 2}, "xpu:1"),
    ],
)
def test_a_device_that_is_there_is_found(name, gpus, expected, machine):
    machine(**gpus)
    assert find_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    "name, gpus",
    [
        ("cuda", {}),
        ("cuda:0", {}),
        ("cuda", {"xpu": 1}),
        ("mps", {}),
        ("mps", {"cuda": 1}),
        ("xpu:1", {"mps": 1}),
        ("cpu:1", {}),
    ],
)
def test_a_device_that_is_not_there_is_an_error(name, gpus, machine, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine(**gpus)
    with pytest.raises(Alg1Error, match=f"^--device {name}: this machine has no such device$") as caught:
        find_device(name)
    assert caught.value.hint == "use --device auto or --device cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(Alg1Error) as caught:
        find_device(name)
    hides = "CUDA_VISIBLE_DEVICES=-1 may hide it: unset that, or use --device cpu"
    assert caught.value.hint == (hides if name.startswith("cuda") else "use --device auto or --device cpu")


@pytest.mark.parametrize(
    "name, gpus, message",
    [
        ("cuda:3", {"cuda": 1}, "1 GPU is visible; it is cuda:0"),
        ("cuda:2", {"cuda": 2}, "2 GPUs are visible; they are cuda:0 to cuda:1"),
        ("xpu:1", {"xpu": 1}, "1 GPU is visible; it is xpu:0"),
        ("mps:1", {"mps": 1}, "1 GPU is visible; it is mps:0"),
    ],
)
def test_a_number_that_no_gpu_has_is_an_error_that_tells_the_numbers(
    name, gpus, message, machine, monkeypatch
):
    (kind,) = gpus
    variable = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}.get(kind, "NONE")
    machine(**gpus)
    for value, renumbered in ((None, ""), ("3", f"{variable}=3 numbers the GPUs that it names from 0: ")):
        if value is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, value)
        with pytest.raises(Alg1Error) as caught:
            find_device(name)
        assert caught.value.message == f"--device {name}: {message}"
        expected = renumbered if kind != "mps" else ""
        assert caught.value.hint == f"{expected}use --device {kind}:0"


@pytest.mark.parametrize(
    "named, gpus, expected",
    [
        (None, 0, []),
        (None, 2, ["0", "1"]),
        ("3, 5", 2, ["3", "5"]),
        ("GPU-8932f937,GPU-1", 2, ["GPU-8932f937", "GPU-1"]),
        ("1,9,2", 1, ["1"]),  # CUDA ignores what follows a number that no GPU has
        ("", 0, []),
    ],
)
def test_the_visible_gpus_are_named_as_cuda_names_them(named, gpus, expected, machine, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    machine(cuda=gpus)
    assert visible_gpus() == expected


@pytest.mark.parametrize("name", ["banana", "", "cuda:x", "xpu:-1", "meta", "xla", "CPU "])
def test_what_is_no_device_is_an_error(name, machine):
    machine(cuda=1)
    with pytest.raises(Alg1Error) as caught:
        find_device(name)
    assert caught.value.message == f"--device {name}: not one of auto, cpu, cuda, cuda:N, mps, xpu, xpu:N"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_are_set_and_recorded(threads):
    runtime = start_runtime(parameters(device="cpu", threads=threads))
    assert torch.get_num_threads() == runtime.threads == threads


def test_more_threads_than_cores_cost_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for threads in (0, 2, 3):
        assert not caplog.records
        start_runtime(parameters(device="cpu", threads=threads))
    (record,) = caplog.records
    assert record.getMessage() == "warning: 3 threads share 2 cores, where fewer would be faster"
    caplog.clear()
    start_runtime(parameters(device="cpu", threads=3), Distributed(rank=1, world_size=2))
    assert not caplog.records


def test_zero_threads_leave_the_choice_to_pytorch():
    torch.set_num_threads(2)
    assert start_runtime(parameters(**LARGE, device="cpu")).threads == torch.get_num_threads() == 2


def test_a_small_step_gets_one_thread():
    torch.set_num_threads(2)
    assert parameters().flops_per_micro_batch() == 6 * (12 * 4 * 64 * 64) * (4 * 32) < 1e9
    assert start_runtime(parameters(device="cpu", batch_size=28)).threads == 2
    assert start_runtime(parameters(device="cpu", batch_size=24)).threads == torch.get_num_threads() == 1


def test_micro_batches_are_computed_as_those_of_as_many_processes():
    """Only so W processes of A micro-batches are one process of W A."""
    for size in (SMALL, MIDDLE, LARGE):
        one, many = (parameters(**size, device="cpu", grad_accum_steps=n) for n in (1, 1000))
        assert start_runtime(one) == start_runtime(many)


ZEN5 = Processor("AuthenticAMD", 26, "Zen 5", frozenset({"avx2", "avx512_bf16"}))
ZEN4 = Processor("AuthenticAMD", 25, "Zen 4", frozenset({"avx2", "avx512_bf16"}))
ZEN3 = Processor("AuthenticAMD", 25, "Zen 3", frozenset({"avx2"}))
SAPPHIRE_RAPIDS = Processor("GenuineIntel", 6, "Xeon", frozenset({"avx512_bf16", "amx_bf16"}))
SKYLAKE = Processor("GenuineIntel", 6, "Xeon", frozenset({"avx512f"}))
UNKNOWN = Processor()


@pytest.mark.parametrize(
    "processor, size, dtype, expected",
    [
        (ZEN5, MIDDLE, "auto", ("bfloat16", "onednn")),
        (ZEN5, LARGE, "auto", ("bfloat16", "onednn")),
        (ZEN5, SMALL, "auto", ("float32", "pytorch")),
        (ZEN5, NARROW, "auto", ("float32", "onednn")),
        (ZEN5, LARGE, "float32", ("float32", "onednn")),
        (ZEN5, SMALL, "bfloat16", ("bfloat16", "onednn")),
        (ZEN5, MIDDLE, "float32", ("float32", "onednn")),
        (ZEN4, MIDDLE, "auto", ("bfloat16", "onednn")),
        (ZEN4, MIDDLE, "float32", ("float32", "pytorch")),
        (ZEN4, LARGE, "float32", ("float32", "onednn")),
        (ZEN3, LARGE, "auto", ("float32", "onednn")),
        (ZEN3, MIDDLE, "auto", ("float32", "pytorch")),
        (ZEN3, SMALL, "auto", ("float32", "pytorch")),
        (SAPPHIRE_RAPIDS, LARGE, "auto", ("bfloat16", "onednn")),
        (SAPPHIRE_RAPIDS, LARGE, "float32", ("float32", "pytorch")),
        (SAPPHIRE_RAPIDS, NARROW, "auto", ("float32", "pytorch")),
        (SKYLAKE, LARGE, "auto", ("float32", "pytorch")),
        (SKYLAKE, LARGE, "bfloat16", ("bfloat16", "onednn")),
        (UNKNOWN, LARGE, "auto", ("float32", "pytorch")),
        (UNKNOWN, LARGE, "bfloat16", ("bfloat16", "onednn")),
    ],
)
def test_the_arithmetic_of_a_processor(processor, size, dtype, expected, monkeypatch):
    monkeypatch.setattr(Processor, "read", lambda: processor)
    monkeypatch.setattr(arithmetic_module, "onednn_works", lambda _: True)
    params = parameters(**size, device="cpu", dtype=dtype)
    arithmetic = start_runtime(params).arithmetic
    assert (arithmetic.dtype, arithmetic.products) == expected
    assert (arithmetic.device, arithmetic.gradient, arithmetic.compiled) == ("cpu", "manual", False)
    monkeypatch.setattr(arithmetic_module, "onednn_works", lambda _: False)
    assert start_runtime(params).arithmetic == dataclasses.replace(arithmetic, products="pytorch")


def test_the_processor_is_read(tmp_path):
    file = tmp_path / "cpuinfo"
    assert Processor.read(file) == Processor.read(tmp_path) == UNKNOWN
    core = "processor\t: {}\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel name\t: Zen 5\n"
    core += "flags\t\t: avx2 avx512_bf16\n\n"
    file.write_text(core.format(0) + core.format(1))
    assert Processor.read(file) == ZEN5
    file.write_text("processor : 0\nFeatures : asimd bf16\n")  # on ARM
    assert Processor.read(file) == UNKNOWN


@pytest.mark.parametrize(
    "device, dtype, bf16, expected",
    [
        ("cpu", "auto", True, torch.float32),
        ("cpu", "float32", True, torch.float32),
        ("cpu", "bfloat16", True, torch.bfloat16),
        ("cuda", "auto", True, torch.bfloat16),
        ("cuda", "auto", False, torch.float16),
        ("cuda", "float32", True, torch.float32),
        ("cuda", "float16", True, torch.float16),
    ],
)
def test_the_dtype_of_a_device(device, dtype, bf16, expected, machine):
    machine(cuda=1, bf16=bf16)
    runtime = start_runtime(parameters(device=device, dtype=dtype))
    assert runtime.dtype is expected
    assert runtime.arithmetic.gradient == ("manual" if device == "cpu" else "autograd")


def test_the_chosen_gpu_is_asked_whether_it_has_bfloat16(machine):
    """And not whether it can emulate it, as a T4 does, nor the GPU that happens to be the current one."""
    for bf16, dtype in ((True, "bfloat16"), (False, "float16")):
        asked = machine(cuda=2, bf16=bf16)
        assert start_runtime(parameters(device="cuda:1")).arithmetic.dtype == dtype
        assert asked == [torch.device("cuda:1")]
        muon = start_runtime(parameters(device="cuda:1", dtype="bfloat16", optimizer="muon")).arithmetic.muon
        assert muon == ("bfloat16" if bf16 else "float32")


def test_float16_without_cuda_is_refused():
    with pytest.raises(Alg1Error, match="--dtype float16 needs CUDA, and the device is cpu") as caught:
        start_runtime(parameters(device="cpu", dtype="float16"))
    assert caught.value.hint == "use --dtype float32 or --dtype bfloat16"


@pytest.mark.parametrize(
    "mode, before, wanted",
    [
        ("on", None, True),
        ("on", False, True),
        ("off", True, False),
        ("auto", None, False),
        ("auto", True, True),
        ("auto", False, False),
    ],
)
def test_when_to_compile(mode, before, wanted):
    params = parameters(device="cpu", compile=mode, threads=1)
    assert start_runtime(params, recorded={"compiled": before}).arithmetic.compiled is wanted


def test_a_long_run_on_a_gpu_is_worth_compiling(machine):
    machine(cuda=1)
    sizes = {"n_embd": 384, "n_head": 6, "n_layer": 6, "block_size": 256, "batch_size": 64, "threads": 1}
    flops = parameters(**sizes).flops_per_micro_batch()
    for device, steps, pays in (
        ("cuda", int(1e15 // flops), False),
        ("cuda", int(1e15 // flops) + 1, True),
        ("cpu", 10**9, False),
    ):
        params = parameters(**sizes, device=device, max_iters=steps)
        assert start_runtime(params).arithmetic.compiled is pays
    micro_batches = {"grad_accum_steps": 10, "max_iters": int(1e14 // flops) + 1}
    assert start_runtime(parameters(**sizes, device="cuda", **micro_batches)).arithmetic.compiled
    reference = parameters()
    assert reference.flops_per_micro_batch() * reference.train.max_iters < 1e15


# --- the arithmetic of a resumed run ------------------------------------------------------------------


def here(arithmetic: Arithmetic) -> Arithmetic:
    """Return the same with what is not chosen: the threads and the platform of a CPU."""
    return dataclasses.replace(arithmetic, **environment(torch.device(arithmetic.device), Processor.read()))


@pytest.mark.parametrize("processor", [ZEN5, SKYLAKE, UNKNOWN])
@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, Arithmetic()),
        ({"dtype": "float32"}, Arithmetic()),
        ({"dropout": 0.1}, Arithmetic(gradient="autograd")),
        ({"dtype": "bfloat16"}, Arithmetic(dtype="bfloat16", gradient="autograd")),
        ({"device": "cuda"}, Arithmetic("cuda", "bfloat16", gradient="autograd")),
    ],
)
def test_a_checkpoint_that_records_nothing_goes_on_as_it_was(
    values, expected, processor, monkeypatch, machine, caplog
):
    machine(cuda=1)
    monkeypatch.setattr(Processor, "read", lambda: processor)
    params = parameters(**LARGE | {"device": "cpu", "threads": 1} | values)
    torch.set_num_threads(1)
    expected = dataclasses.replace(here(expected), joined=False)
    for compiled in (None, False):
        assert start_runtime(params, recorded={"compiled": compiled}).arithmetic == expected
    two = start_runtime(params, Distributed(world_size=2), recorded={"compiled": None}).arithmetic
    assert two == dataclasses.replace(expected, gradient="autograd")
    assert not caplog.records


@pytest.mark.parametrize("processor", [ZEN5, SKYLAKE, UNKNOWN])
@pytest.mark.parametrize(
    "before",
    [
        Arithmetic(),
        Arithmetic(products="onednn"),
        Arithmetic(dtype="bfloat16", products="onednn"),
        Arithmetic(dtype="bfloat16"),
        Arithmetic(gradient="autograd"),
        Arithmetic(dtype="bfloat16", gradient="autograd", compiled=True),
        Arithmetic(dtype="bfloat16", muon="bfloat16"),
        Arithmetic(joined=False),
    ],
)
def test_a_resumed_run_keeps_its_arithmetic_on_any_processor(before, processor, monkeypatch, caplog):
    monkeypatch.setattr(Processor, "read", lambda: processor)
    monkeypatch.setattr(arithmetic_module, "onednn_works", lambda _: True)
    params = parameters(**LARGE, device="cpu", threads=1)
    torch.set_num_threads(1)
    for recorded in (before, here(before)):  # an older checkpoint does not tell threads and platform
        arithmetic = start_runtime(params, recorded=dataclasses.asdict(recorded)).arithmetic
        assert arithmetic == here(before)
    assert not caplog.records


@pytest.mark.parametrize(
    "values, processor, expected",
    [
        ({"dtype": "bfloat16", "optimizer": "muon"}, ZEN5, "bfloat16"),
        ({"dtype": "bfloat16"}, ZEN5, "float32"),
        ({"dtype": "float32", "optimizer": "muon"}, ZEN5, "float32"),
        ({"dtype": "bfloat16", "optimizer": "muon"}, SKYLAKE, "float32"),  # it would be slower there
    ],
)
def test_muon_computes_in_bfloat16_where_the_steps_do_and_it_is_fast(values, processor, expected):
    chosen = choose_arithmetic(parameters(**values), torch.device("cpu"), processor)
    assert chosen.muon == expected
    old = recorded_arithmetic({"compiled": False}, parameters(**values), torch.device("cpu"), SINGLE_PROCESS)
    assert (old.muon, old.joined) == ("float32", False)


@pytest.mark.parametrize(
    "before, flags, after",
    [
        (Arithmetic(products="onednn"), {}, Arithmetic()),
        (
            Arithmetic(dtype="bfloat16"),
            {"device": "cuda"},
            Arithmetic("cuda", "bfloat16", gradient="autograd"),
        ),
        (Arithmetic(), {"device": "cuda"}, Arithmetic("cuda", gradient="autograd")),
        (Arithmetic("cuda", "float16", gradient="autograd"), {}, Arithmetic(gradient="autograd")),
        (Arithmetic(products="onednn", compiled=True), {}, Arithmetic(compiled=True)),
        (Arithmetic(compiled=True), {"compile": "off"}, Arithmetic()),
        (Arithmetic(), {"compile": "on"}, Arithmetic(compiled=True)),
        (Arithmetic(threads=2), {}, Arithmetic()),
        (Arithmetic(platform="PyTorch 1.0 on a Z80"), {}, Arithmetic()),
        (
            Arithmetic("cuda", "float16", gradient="autograd"),
            {"dtype": "float16"},
            Arithmetic(gradient="autograd"),
        ),
    ],
)
def test_another_arithmetic_than_the_checkpoints_is_told_in_one_line(
    before, flags, after, monkeypatch, machine, caplog
):
    machine(cuda=1)
    monkeypatch.setattr(arithmetic_module, "onednn_works", lambda _: False)
    params, recorded = parameters(**{"device": "cpu", "threads": 1} | flags), dataclasses.asdict(before)
    torch.set_num_threads(1)
    after = here(after)
    assert start_runtime(params, recorded=recorded).arithmetic == after
    assert [record.getMessage() for record in caplog.records] == [
        f"warning: the run was computed with {before.differences(after)}, and continues with"
        f" {after.differences(before)}: it may not end with the same bytes"
    ]
    caplog.clear()
    start_runtime(params, Distributed(rank=1, world_size=2), recorded)
    assert not caplog.records  # the main process has said it


def test_the_differences_of_two_arithmetics():
    one = Arithmetic(threads=1, platform="PyTorch 1.0 on a Z80")
    assert one.differences(one) == one.differences(Arithmetic()) == Arithmetic().differences(one) == ""
    other = Arithmetic(
        "cuda", "bfloat16", "onednn", "autograd", True, False, "bfloat16", 2, "PyTorch 2.0 on ARM"
    )
    assert other.differences(one) == (
        "cuda, bfloat16, products by oneDNN, autograd gradient, compiled, separate parameters,"
        " Muon in bfloat16, 2 threads, PyTorch 2.0 on ARM"
    )
    assert one.differences(other) == (
        "cpu, float32, products by PyTorch, manual gradient, not compiled, joined parameters,"
        " Muon in float32, 1 thread, PyTorch 1.0 on a Z80"
    )


def test_the_platform_tells_pytorch_and_the_processor(monkeypatch):
    monkeypatch.setattr(Processor, "read", lambda: ZEN5)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    platform = start_runtime(parameters(device="cpu")).arithmetic.platform
    assert platform == f"PyTorch {torch.__version__} on Zen 5 AVX512"


def test_the_threads_of_a_checkpoint_are_kept_where_there_are_so_many_cores(monkeypatch, caplog):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    torch.set_num_threads(2)
    params = parameters(device="cpu")
    for before, after in ((3, 3), (4, 1)):  # a small step gets one
        recorded = dataclasses.asdict(Arithmetic(threads=before))
        assert start_runtime(params, recorded=recorded).threads == after
        assert len(caplog.records) == (before != after)
    assert start_runtime(parameters(device="cpu", threads=2), recorded=recorded).threads == 2


def test_a_run_that_could_not_be_compiled_goes_on_so(caplog):
    params = Parameters.from_values({"compile": "on", "device": "cpu"}, {"compile": RESUMED})
    before = dataclasses.asdict(Arithmetic(compiled=False))
    assert start_runtime(params, recorded=before).arithmetic.compiled is False
    assert not caplog.records
    asked = Parameters.from_values({"compile": "on", "device": "cpu"}, {"compile": "--compile"})
    assert start_runtime(asked, recorded=before).arithmetic.compiled is True
    assert len(caplog.records) == 1


def test_autocast_is_the_chosen_arithmetic_and_nothing_in_float32():
    x = torch.ones(2, 2)
    for dtype in ("float32", "bfloat16"):
        with Runtime(arithmetic=Arithmetic(dtype=dtype)).autocast():
            assert (x @ x).dtype is getattr(torch, dtype)


def test_only_float16_scales_the_loss():
    enabled = {
        dtype: Runtime(arithmetic=Arithmetic(dtype=dtype)).loss_scaler().is_enabled()
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert enabled == {"float32": False, "bfloat16": False, "float16": True}


# --- seeds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, seed",
    [
        ((1337, "init"), 4634873138853617305),
        ((1337, "batch", 0, 0), 8079315375014721145),
        ((1337, "batch", 1, 0), 743437556134573280),
        ((1337, "batch", 0, 1), 8117903891587572641),
        ((1337, "dropout", 0, 0), 806702472666263462),
        ((1337, "eval-val", 0), 6934021691951275298),
        ((0, "batch", 0, 0), 8288332835341990934),
        ((2**63 - 1, "samples"), 3323687792398827075),
    ],
)
def test_derived_seeds_never_change(key, seed):
    assert derive_seed(*key) == seed


def test_derived_seeds_are_distinct():
    purposes = "init", "batch", "dropout", "eval-train", "eval-val", "samples"
    keys = list(itertools.product((0, 1, 11, 1337), purposes, range(20), range(12)))
    assert len({derive_seed(*key) for key in keys}) == len(keys)


@given(seed=SEEDS, step=st.integers(0, 2**31), micro_batch=st.integers(0, 10_000))
def test_derived_seeds_are_what_torch_takes(seed, step, micro_batch):
    derived = derive_seed(seed, "batch", step, micro_batch)
    assert 0 <= derived < 2**63
    assert generator(seed, "batch", step, micro_batch).initial_seed() == derived


def test_seeding_decides_what_torch_draws():
    drawn = []
    for seed in (1, 1, 2):
        seed_initial_weights(seed)
        drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


# --- memory -------------------------------------------------------------------------------------------


SMALLER = "try --batch-size 2 --grad-accum-steps 2, which sees about as much text in a step"
OF_THE_GPU = "if other programs hold the memory of the GPU, end them or use --device cpu"
ON_THE_CPU = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried 8 bytes"),  # Windows
    RuntimeError("std::bad_alloc"),
]
ON_A_GPU = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), ""),
    (torch.OutOfMemoryError("XPU out of memory. Tried to allocate 20 GiB"), ""),
    (torch.OutOfMemoryError("Tried to allocate 20 GiB"), ""),
    (getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory\nCompile with ..."), ""),
    (RuntimeError("HIP out of memory. Tried to allocate 20 GiB"), ""),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB, other allocations: 40 GB)"), ""),
    (RuntimeError("Invalid buffer size: 24.00 GB"), ""),
    (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        " (CUBLAS_STATUS_ALLOC_FAILED)",
    ),
    (
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        " (CUBLAS_STATUS_NOT_INITIALIZED)",
    ),
    (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), " (CUDNN_STATUS_NOT_INITIALIZED)"),
    (
        RuntimeError("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        " (OUT_OF_DEVICE_MEMORY)",
    ),
    (
        torch.distributed.DistBackendError("NCCL error: Cuda failure 2 'out of memory'"),
        "",
    ),
]
ALL_THAT_TELL = [(error, "", None) for error in ON_THE_CPU] + [(*of_gpu, OF_THE_GPU) for of_gpu in ON_A_GPU]


@pytest.mark.parametrize("error, status, of_gpu", ALL_THAT_TELL)
def test_running_out_of_memory_is_an_error_with_smaller_settings(error, status, of_gpu):
    model, train = parameters().model, parameters().train
    with pytest.raises(Alg1Error) as caught, memory_guard("here", model, train):
        raise error
    assert caught.value.message == f"out of memory here{status}"
    assert caught.value.exit_code == CANNOT_TRAIN
    assert caught.value.hint == SMALLER + (f"; or {of_gpu}" if of_gpu else "")
    assert not isinstance(error, RuntimeError) or not is_lost_connection(error)


@pytest.mark.parametrize("error, status, of_gpu", ALL_THAT_TELL)
def test_running_out_of_memory_anywhere_in_a_script_is_one_line(error, status, of_gpu, capsys):
    def script() -> int:
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(script)
    message, hint = capsys.readouterr().err.splitlines()
    assert (end.value.code, message) == (CANNOT_TRAIN, f"error: out of memory{status}")
    way_out = of_gpu or OTHER_PROGRAMS
    assert hint == f"hint: {way_out}"


def test_weights_larger_than_the_memory_are_told_as_such(train, sample, text_file, monkeypatch):
    assert train(*TINY, *QUIET_TRACKERS, "--data", text_file).code == 0
    (run,) = list_runs("runs")
    files = sorted(run.rglob("*.safetensors"))
    for error in (MemoryError("Unable to allocate 20 GiB"), OSError(errno.ENOMEM, "Cannot allocate memory")):
        monkeypatch.setattr(np, "fromfile", Mock(side_effect=error))
        for result, file in (
            (sample(), RunFolder(run).export_path),
            (sample("--score", text_file), RunFolder(run).export_path),
            (train("--init-from", RunFolder(run).export_path), RunFolder(run).export_path),
            (train("--resume", "latest"), checkpoint_paths(RunFolder(run).checkpoint_dir)[-1]),
        ):
            assert result.code == CANNOT_TRAIN
            # No word of damage, and no older checkpoint in place of the newest.
            assert result.err == (f"error: out of memory while reading {file}\nhint: {OTHER_PROGRAMS}\n")
    assert sorted(run.rglob("*.safetensors*")) == files


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: all CUDA-capable devices are busy or unavailable",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might be ...",
    ],
)
def test_a_gpu_that_another_program_does_not_share_is_told_as_such(text):
    with pytest.raises(Alg1Error) as caught, memory_guard("here", ModelConfig()):
        raise RuntimeError(text)
    assert caught.value.message == "another program uses the GPU, and does not share it"
    assert (caught.value.hint, caught.value.exit_code) == ("use --device cpu, or end that program", 3)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("memory"), KeyboardInterrupt()])
def test_other_errors_pass_through_the_memory_guard(error):
    with pytest.raises(type(error)) as caught, memory_guard("here", ModelConfig()):
        raise error
    assert caught.value is error


def test_pytorch_says_what_the_guard_listens_for():
    with pytest.raises(Alg1Error, match="out of memory"), memory_guard("here", ModelConfig()):
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    "settings, flags",
    [
        ({"batch_size": 64}, "--batch-size 32 --grad-accum-steps 2"),
        ({"batch_size": 5, "grad_accum_steps": 3}, "--batch-size 2 --grad-accum-steps 6"),
        ({"batch_size": 1, "n_embd": 64, "n_head": 4}, "--n-embd 32"),
        ({"batch_size": 1, "n_embd": 60, "n_head": 20}, "--n-embd 20"),
        ({"batch_size": 1, "n_embd": 120, "n_head": 20, "positions": "rotary"}, "--n-embd 40"),
    ],
)
def test_smaller_settings_are_named_as_flags(settings, flags):
    params = parameters(**settings)
    assert smaller_settings(params.model, params.train).startswith(f"try {flags},")
    assert smaller_settings(params.model).startswith("try --n-embd")  # where a batch has no part in it


@given(head_size=st.integers(1, 64), n_head=st.integers(1, 16))
def test_a_smaller_width_is_a_valid_one(head_size, n_head):
    n_embd = head_size * n_head
    hint = smaller_settings(ModelConfig(n_embd=n_embd, n_head=n_head))
    if head_size == 1:
        assert hint == "try a --block-size below 32"
        return
    width = int(re.search(r"--n-embd (\d+)", hint)[1])
    ModelConfig(n_embd=width, n_head=n_head, vocab_size=2).validate()
    assert width < n_embd


# --- signals ------------------------------------------------------------------------------------------

STOPPING = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
if hasattr(signal, "SIGHUP"):  # not on Windows
    STOPPING += [(signal.SIGHUP, 129), (signal.SIGUSR1, 128 + signal.SIGUSR1)]


def test_a_closed_terminal_is_no_signal_under_nohup(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("more, fits", [(0, True), (1, False)])
def test_a_model_that_cannot_fit_is_refused(more, fits, monkeypatch):
    params = Parameters.from_values({"n_embd": 8, "n_head": 2, "n_layer": 1, "block_size": 4}, {})
    n_parameters = 5 * 8 + 4 * 8 + (12 * 64 + 10 * 8) + 2 * 8 + 5 * 8 + 5
    monkeypatch.setattr(runtime_module, "memory_of", lambda _: 12 * n_parameters - more)
    if fits:
        return runtime_module.check_memory(params, 5, torch.device("cpu"))
    with pytest.raises(Alg1Error) as caught:
        runtime_module.check_memory(params, 5, torch.device("cpu"))
    assert caught.value.message.startswith(
        f"a model of {n_parameters} parameters takes 0 GiB or more to train"
    )
    assert (caught.value.hint, caught.value.exit_code) == ("try a smaller --n-embd or --n-layer", 3)


def test_this_machine_has_some_memory():
    assert memory_of(torch.device("cpu")) > 2**27


@pytest.mark.parametrize("number, code", STOPPING)
def test_the_first_signal_asks_to_stop(number, code, capfd):
    with StopSignals() as signals:
        assert signals.received is None
        signal.raise_signal(number)
        assert (signals.received, 128 + signals.received) == (number, code)
    again = "press Ctrl-C again to exit" if number == signal.SIGINT else "a second signal exits"
    assert capfd.readouterr().err == f"\nstopping after this step; {again} at once\n"


class Left(Exception):
    """Raised in place of os._exit."""


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The time that signals come at; os._exit raises `Left`."""

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    now = SimpleNamespace(time=1000.0)
    monkeypatch.setattr(signals_module, "time", SimpleNamespace(monotonic=lambda: now.time))
    return now


@pytest.mark.parametrize("second, code", STOPPING)
@pytest.mark.parametrize("first, _", STOPPING)
def test_the_second_signal_leaves_at_once(first, _, second, code, clock):
    with StopSignals() as signals:
        signal.raise_signal(first)
        if first != second:
            clock.time += 1.9
            signal.raise_signal(second)  # of another kind: the same request
            assert signals.received == first
            clock.time += 0.2
        with pytest.raises(Left) as caught:
            signal.raise_signal(second)
    assert caught.value.args == (code,)


def test_a_signal_of_the_same_kind_leaves_also_after_one_of_another(clock):
    with StopSignals():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        with pytest.raises(Left):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("while_training", [False, True])
def test_a_logout_breaks_off_nothing_that_its_first_signal_lets_run(while_training, clock):
    """SIGTERM and SIGHUP come together, and the second one may come while the script closes."""
    done = []

    def script() -> int:
        try:
            with StopSignals() if while_training else contextlib.nullcontext():
                signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGHUP)
            done.append("closed")
            clock.time += 3
        signal.raise_signal(signal.SIGHUP)  # that is another request
        return 0

    with pytest.raises(SystemExit) as end:
        run_script(script)
    assert (done, end.value.code) == (["closed"], 129 if while_training else 143)


ENDS_SLOWLY = """
import atexit, os, signal
from utils_alg1.console.script import run_script
from utils_alg1.console.signals import StopSignals

def train():
    with StopSignals() as signals:
        os.kill(os.getpid(), FIRST)
        return 128 + signals.received

class Last:
    def __del__(self):  # when Python has taken its modules apart
        os.kill(os.getpid(), SECOND)

last = Last()
atexit.register(os.kill, os.getpid(), SECOND)
run_script(train)
"""


@pytest.mark.parametrize("first, code", STOPPING)
def test_the_first_signal_has_the_exit_code_until_the_process_has_ended(first, code):
    for second, _ in STOPPING:
        program = ENDS_SLOWLY.replace("FIRST", f"{int(first)}").replace("SECOND", f"{int(second)}")
        done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, stderr=subprocess.DEVNULL)
        if second != first:
            assert done.returncode == code
        else:  # to Python, which a second Ctrl-C may still break off; a shell reads 128 + first of both
            assert done.returncode in (code, -first)


def test_signals_wait_for_the_end_of_a_block(clock, capfd):
    with StopSignals() as signals:
        with pytest.raises(Left) as caught, signals.delayed():
            with signals.delayed():  # of another thread
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            assert (signals.received, capfd.readouterr().err) == (None, "")
        assert caught.value.args == (130,)
        assert "press Ctrl-C again" in capfd.readouterr().err


def test_what_a_signal_is_answered_with_can_change(capfd):
    notices = iter(["stopping after this step", "finishing the results"])
    signals = StopSignals(lambda: next(notices))
    for expected in ("stopping after this step", "finishing the results"):
        signals.received = None
        with signals:
            signal.raise_signal(signal.SIGTERM)
        assert capfd.readouterr().err == f"\n{expected}; a second signal exits at once\n"


def test_handlers_are_restored_also_after_an_error():
    before = [signal.getsignal(number) for number, _ in STOPPING]
    with pytest.raises(ZeroDivisionError), StopSignals() as signals:
        assert [signal.getsignal(number) for number, _ in STOPPING] == [signals._handle] * len(STOPPING)
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number, _ in STOPPING] == before


def test_a_compiler_that_fails_is_told_in_one_short_line(monkeypatch, caplog):
    said = []

    def fail(function, **_):
        raise RuntimeError("x" * 500 + "\nmore")

    monkeypatch.setattr(torch, "compile", fail)
    call = Compiled(lambda: 7, said.append)
    assert [call(), call()] == [7, 7]
    (record,) = caplog.records
    assert call.failed and len(said) == 1 and record.levelname == "WARNING"
    assert "\n" not in record.getMessage() and len(record.getMessage()) < 250
