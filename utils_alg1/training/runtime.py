"""How a run computes on its device: arithmetic, threads, compilation; what to do where memory ends."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from parameters import ModelConfig, Parameters, TrainConfig
from utils_alg1.base import memory
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
from utils_alg1.training.devices import (
    UNTRIED,
    device_of_process,
    find_device,
    memory_of,
    synchronize,
    untried_accelerator,
)
from utils_alg1.training.distributed import SINGLE_PROCESS, Distributed

LOGGER = logging.getLogger("alg1")
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
        synchronize(self.device)


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
                "warning: the run was computed with %s, and continues with %s:"
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
    return memory.memory_guard(where, partial(smaller_settings, model, train))


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


def smaller_settings(model: ModelConfig, train: TrainConfig | None = None) -> str:
    """Return a hint that names flags with about half the memory; see `memory_guard`."""
    if train is not None and train.batch_size > 1:
        halved = f"--batch-size {train.batch_size // 2} --grad-accum-steps {train.grad_accum_steps * 2}"
        return f"try {halved}, which sees about as much text in a step"
    multiple = model.n_head * (2 if model.positions == "rotary" else 1)
    width = max(model.n_embd // 2 // multiple, 1) * multiple
    smaller = f"--n-embd {width}, or " if width < model.n_embd else ""
    return f"try {smaller}a --block-size below {model.block_size}"
