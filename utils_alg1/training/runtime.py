"""The device of a run and how it computes there: arithmetic, threads, compilation, memory."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from parameters import ModelConfig, Parameters, TrainConfig
from utils_alg1.base import errors
from utils_alg1.base.errors import CANNOT_TRAIN, Alg1Error, first_line
from utils_alg1.base.text import format_count
from utils_alg1.training.arithmetic import (
    SMALL_STEP_FLOPS,
    Arithmetic,
    Processor,
    choose_arithmetic,
    keep_arithmetic,
    recorded_arithmetic,
)
from utils_alg1.training.distributed import SINGLE_PROCESS, Distributed

LOGGER = logging.getLogger("alg1")
NO_DEVICE_HINT = "use --device auto or --device cpu"
UNTRIED = {"mps": "an Apple GPU", "xpu": "an Intel GPU"}  # `auto` leaves these alone
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}  # variables that hide and renumber GPUs
BYTES_PER_PARAMETER = 12  # at least: float32 weight, gradient and one optimizer moment


@dataclass(frozen=True)
class Runtime:
    """The device of a run and how it computes there. The same bytes come out only with the same runtime.

    Attributes:
        device: the device of the model.
        arithmetic: how training steps are computed; weights and optimizer state are float32.
        threads: the number of CPU threads.
        dist: this process among those of the run.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    threads: int = 1
    dist: Distributed = SINGLE_PROCESS

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the forward pass."""
        return getattr(torch, self.arithmetic.dtype)

    def describe(self) -> dict[str, Any]:
        """Return what the records of a run keep of it."""
        return {**dataclasses.asdict(self.arithmetic), "device": str(self.device), "threads": self.threads}

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast context of a forward pass; a null context in float32."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def loss_scaler(self) -> Any:
        """Return a torch.amp.GradScaler; it is enabled for float16, whose gradients would underflow."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def synchronize(self) -> None:
        """Wait for the device, so that the time read next is true."""
        if self.device.type == "mps":  # torch.accelerator does not wait for it in every version of PyTorch
            torch.mps.synchronize()
        elif self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)


def start_runtime(
    params: Parameters, dist: Distributed = SINGLE_PROCESS, recorded: dict[str, Any] | None = None
) -> Runtime:
    """Choose the device, the number of threads and the arithmetic; set the threads.

    Args:
        dist: this process among those of the run.
        recorded: an arithmetic to keep as far as flags and machine allow, that of the checkpoint of a
            resumed run; a difference costs a warning. None for a new run.

    Raises:
        Alg1Error: there is no such device, or it does not support the dtype.
    """
    device = find_device(params.train.device)
    if params.train.device == "auto" and dist.is_main and (kind := untried_accelerator()):
        LOGGER.info("%s is here, which auto leaves alone: --device %s trains on it", UNTRIED[kind], kind)
    if dist.world_size > 1:
        device = device_of_process(device, dist)
    processor = Processor.read()
    before = None if recorded is None else recorded_arithmetic(recorded, params, device, dist)
    set_threads(params, device, before.threads if before else None)
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if dist.is_main and params.train.threads > cores:
        text = "warning: %s share %s, where fewer would be faster"
        LOGGER.warning(text, format_count(threads, "thread"), format_count(cores, "core"))
    if before is None:
        arithmetic = choose_arithmetic(params, device, processor)
    else:
        arithmetic = keep_arithmetic(before, params, device, processor)
        if dist.is_main and (now := arithmetic.differences(before)):
            LOGGER.warning(
                "warning: the run was computed with %s, and goes on with %s:"
                " it may not end with the same bytes",
                before.differences(arithmetic),
                now,
            )
    return Runtime(device, arithmetic, threads, dist)


def set_threads(params: Parameters, device: torch.device, before: int | None) -> None:
    """Set the number of threads: that of --threads, or of the checkpoint if there are so many cores."""
    if params.train.threads:
        torch.set_num_threads(params.train.threads)
    elif before is not None and before <= (os.cpu_count() or 1):
        torch.set_num_threads(before)
    elif device.type == "cpu" and params.flops_per_micro_batch() < SMALL_STEP_FLOPS:
        torch.set_num_threads(1)  # a second one gains little there, and takes a core from the trackers


def device_of_process(device: torch.device, dist: Distributed) -> torch.device:
    """Return the device of one of several processes: the CPU, which they share, or a GPU of its own.

    Raises:
        Alg1Error: there are more processes than GPUs, or they cannot share that kind of device.
    """
    if device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise Alg1Error(
            f"--device {device} is for one process, and there are {dist.world_size}",
            "use --device cuda, which gives each process a GPU of its own, or --device cpu",
        )
    n_gpus = torch.cuda.device_count()
    if dist.local_rank >= n_gpus:
        raise Alg1Error(
            f"{visible(n_gpus)}, too few for process {dist.local_rank + 1} of this machine",
            "start as many processes as there are GPUs: --nproc_per_node",
        )
    torch.cuda.set_device(dist.local_rank)
    return torch.device("cuda", dist.local_rank)


def find_device(name: str) -> torch.device:
    """Return the device that `auto`, or a name such as `cpu`, `cuda`, `cuda:1`, `mps`, means on this machine.

    Raises:
        Alg1Error: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        count = count_devices(device.type)
    except (RuntimeError, KeyError):
        hint = "use cuda for a GPU of NVIDIA or AMD, mps of Apple, xpu of Intel; or cpu, or leave it out"
        raise Alg1Error(
            f"--device {name}: not one of auto, cpu, cuda, cuda:N, mps, xpu, xpu:N", hint
        ) from None
    if (device.index or 0) < count:
        return device
    variable = VISIBLE.get(device.type, "")
    hidden = f"{variable}={os.environ[variable]}" if variable in os.environ else ""
    if not count or device.type == "cpu":
        hint = f"{hidden} may hide it: unset that, or use --device cpu" if hidden else NO_DEVICE_HINT
        raise Alg1Error(f"--device {name}: this machine has no such device", hint)
    first = f"{device.type}:0"
    names = f"it is {first}" if count == 1 else f"they are {first} to {device.type}:{count - 1}"
    renumbered = f"{hidden} numbers the GPUs that it names from 0: " if hidden else ""
    raise Alg1Error(f"--device {name}: {visible(count)}; {names}", f"{renumbered}use --device {first}")


def visible(n_gpus: int) -> str:
    """Return "2 GPUs are visible"."""
    return f"{format_count(n_gpus, 'GPU')} {'is' if n_gpus == 1 else 'are'} visible"


def count_devices(kind: str) -> int:
    """Return how many devices of a kind there are; raises KeyError if it is none that ALG1 knows."""
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind in UNTRIED:
        return torch.accelerator.device_count() if untried_accelerator() == kind else 0
    return {"cpu": 1}[kind]


def untried_accelerator() -> str | None:
    """Return which of the UNTRIED kinds of accelerators this machine has, and this PyTorch supports."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found is not None and found.type in UNTRIED else None


def visible_gpus() -> list[str]:
    """Return the CUDA devices that this process sees, as CUDA_VISIBLE_DEVICES would name them."""
    n_gpus = count_devices("cuda")
    named = os.environ.get(VISIBLE["cuda"])
    names = [str(i) for i in range(n_gpus)] if named is None else named.split(",")
    return [name.strip() for name in names[:n_gpus]]


class Compiled:
    """A function that torch.compile compiles at its first call; if that fails, it logs a warning.

    Attributes:
        failed: whether compiling failed; False before the first call.
    """

    def __init__(self, function: Callable, say: Callable[[str], None], options: dict | None = None):
        self._function, self._say, self._options = function, say, options
        self._compiled: Callable | None = None  # set by the first call
        self.failed = False

    def __call__(self, *args: Any) -> Any:
        if self._compiled is not None:
            return self._compiled(*args)
        self._say("compiling the training step, which can take a minute")
        try:
            self._compiled = torch.compile(self._function, options=self._options)
            return self._compiled(*args)
        except Exception as error:  # a compiler fails in many ways, none of which may end the run
            text = "warning: torch.compile does not work here (%s); going on without it, with other rounding"
            LOGGER.warning(text, first_line(error)[:120])
            self.failed, self._compiled = True, self._function
            return self._function(*args)


def memory_guard(
    where: str, model: ModelConfig, train: TrainConfig | None = None
) -> contextlib.AbstractContextManager:
    """Turn running out of memory into an Alg1Error (exit code 3) that names settings with less.

    Args:
        where: in what, for the message.
        train: given where the memory depends on the size of a micro-batch.
    """
    return errors.memory_guard(where, partial(smaller_settings, model, train))


def check_memory(params: Parameters, vocab_size: int, device: torch.device) -> None:
    """Check that the weights, gradients and optimizer state of a model fit into the device's memory.

    Raises:
        Alg1Error: they do not (exit code 3).
    """
    n_parameters = dataclasses.replace(params.model, vocab_size=vocab_size).n_parameters
    needed, available = n_parameters * BYTES_PER_PARAMETER, memory_of(device)
    if needed > available:
        raise Alg1Error(
            f"a model of {n_parameters:,} parameters takes {needed / 2**30:,.0f} GiB or more to train,"
            f" and {device} has {available / 2**30:,.0f}",
            "try a smaller --n-embd or --n-layer",
            CANNOT_TRAIN,
        )


def memory_of(device: torch.device) -> float:
    """Return the bytes of memory of a device; infinity where the system does not tell."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).get_device_properties(device).total_memory
    if device.type == "mps":  # shares the memory of the machine, but not all of it
        return torch.mps.recommended_max_memory()
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return math.inf


def smaller_settings(model: ModelConfig, train: TrainConfig | None = None) -> str:
    """Return a hint that names flags with about half the memory; see `memory_guard`."""
    if train is not None and train.batch_size > 1:
        halved = f"--batch-size {train.batch_size // 2} --grad-accum-steps {train.grad_accum_steps * 2}"
        return f"try {halved}, which sees about as much text in a step"
    multiple = model.n_head * (2 if model.positions == "rotary" else 1)
    width = max(model.n_embd // 2 // multiple, 1) * multiple
    smaller = f"--n-embd {width}, or " if width < model.n_embd else ""
    return f"try {smaller}a --block-size below {model.block_size}"
