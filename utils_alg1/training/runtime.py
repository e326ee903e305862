"""What a run stands on: device, threads, arithmetic, compilation, seeds and signals."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from parameters import Parameters, TrainConfig
from utils_alg1.base.errors import CANNOT_TRAIN, Alg1Error
from utils_alg1.training.distributed import ALONE, Processes

BYTES_PER_PARAMETER = 12  # at least: the weight, its gradient and one moment
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """The device and the arithmetic of a run.

    Attributes:
        device: where the model lies.
        dtype: of the forward pass; weights and optimizer stay float32.
        threads: of the CPU. Sums come out bitwise the same only with the same number.
        processes: those that share the work; the same goes for their number.
        compile: whether the training step is to be compiled; the same goes for that.
    """

    device: torch.device
    dtype: torch.dtype
    threads: int
    processes: Processes = ALONE
    compile: bool = False

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass; nothing at all in float32."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def loss_scaler(self) -> Any:
        """A torch.amp.GradScaler, which does something for float16 only: its gradients would underflow."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next is true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


SMALL_STEP = 1e9  # floating-point operations
# Operations of a whole run. nanoGPT's README gives its 6-layer character model, 5e15 in all, about 3 minutes
# on an A100, and compiling takes about one. Where the two are even has not been measured: this is a guess.
COMPILING_PAYS = 1e15


def start_runtime(
    config: TrainConfig,
    flops_per_step: float = math.inf,
    processes: Processes = ALONE,
    compiled_before: bool | None = None,
) -> Runtime:
    """Choose device, threads and arithmetic, and set them.

    A step of fewer than SMALL_STEP operations gets one thread: a second one gains little there, waits for the
    first at every operator, and is missing to the trackers, which have processes of their own.

    Args:
        flops_per_step: see Parameters.flops_per_step.
        processes: those of the run.
        compiled_before: whether the steps were compiled that a resumed run has taken; `auto` keeps to it.

    Raises:
        Alg1Error: the device is not there, or cannot compute in that dtype.
    """
    device = find_device(config.device)
    if processes.world_size > 1:
        device = own_device(device, processes)
    if config.threads:
        torch.set_num_threads(config.threads)
    elif device.type == "cpu" and flops_per_step < SMALL_STEP:
        torch.set_num_threads(1)
    dtype_name = config.dtype
    if dtype_name == "auto":
        dtype_name = "float32"
        if device.type == "cuda":
            dtype_name = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if dtype_name == "float16" and device.type != "cuda":
        raise Alg1Error(
            f"--dtype float16 needs CUDA, and the device is {device}",
            "use --dtype float32 or --dtype bfloat16",
        )
    compile_it = config.compile == "on"
    if config.compile == "auto" and compiled_before is not None:
        compile_it = compiled_before
    elif config.compile == "auto":
        compile_it = compiling_pays(device, flops_per_step * config.max_iters)
    return Runtime(device, DTYPES[dtype_name], torch.get_num_threads(), processes, compile_it)


def compiling_pays(device: torch.device, flops: float) -> bool:
    """Whether a run of so many floating-point operations ends sooner when it is compiled first.

    On a CPU it would for a run of some ten thousand steps, and needs a C++ compiler that may be missing, so
    there one asks for it. A decision by figures, not by the clock: the same run decides the same.
    """
    return device.type == "cuda" and flops >= COMPILING_PAYS


def own_device(device: torch.device, processes: Processes) -> torch.device:
    """The device of one process of many: the CPU, which they share, or a GPU for each.

    Raises:
        Alg1Error: there are more processes than GPUs, or they cannot share that kind of device.
    """
    if device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise Alg1Error(
            f"--device {device} is for one process, and there are {processes.world_size}",
            "use --device cuda, which gives each process a GPU of its own, or --device cpu",
        )
    n_gpus = torch.cuda.device_count()
    if processes.local_rank >= n_gpus:
        raise Alg1Error(
            f"there are {n_gpus} GPUs, too few for process {processes.local_rank + 1} of this machine",
            "start as many processes as there are GPUs: --nproc_per_node",
        )
    torch.cuda.set_device(processes.local_rank)
    return torch.device("cuda", processes.local_rank)


def find_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda`, `cuda:N` or `mps` means on this machine.

    Raises:
        Alg1Error: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        hint = "use --device cuda for an NVIDIA GPU, --device cpu, or leave it out"
        raise Alg1Error(f"--device {name}: not one of auto, cpu, cuda, cuda:N, mps", hint)
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }[device.type]
    if (device.index or 0) >= count:
        raise Alg1Error(
            f"--device {name}: this machine has no such device", "use --device auto or --device cpu"
        )
    return device


class Compiled:
    """A function through torch.compile; where that fails, one line and the function itself.

    Attributes:
        failed: whether it did, as far as one knows: before the first call nobody does.
    """

    def __init__(
        self, function: Callable, say: Callable[[str], None], options: dict[str, Any] | None = None
    ) -> None:
        """`options` are torch.compile's."""
        self._function, self._say, self._options = function, say, options
        self._chosen: Callable | None = None  # known after the first call
        self.failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._chosen is not None:
            return self._chosen(*args, **kwargs)
        self._say("compiling the training step, which can take a minute")
        try:
            fast = torch.compile(self._function, options=self._options)
            result = fast(*args, **kwargs)
        except Exception as error:  # a compiler fails in many ways, and none of them may cost the run
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self._say(f"torch.compile does not work here ({reason[:120]}); going on without it")
            self.failed, self._chosen = True, self._function
            return self._function(*args, **kwargs)
        self._chosen = fast
        return result


# --- seeds --------------------------------------------------------------------------------------------


# --- failures and signals -----------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or Python ran out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextlib.contextmanager
def memory_guard(params: Parameters) -> Iterator[None]:
    """Turn running out of memory into one line (exit code 3) with settings that take less."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise Alg1Error("out of memory", smaller_settings(params), CANNOT_TRAIN) from error


def check_memory(params: Parameters, vocab_size: int, device: torch.device) -> None:
    """Check that a model's weights, gradients and optimizer state alone fit into the machine.

    Raises:
        Alg1Error: they do not (exit code 3).
    """
    n_parameters = dataclasses.replace(params.model, vocab_size=vocab_size).n_parameters
    needed, there = n_parameters * BYTES_PER_PARAMETER, memory_of(device)
    if needed > there:
        raise Alg1Error(
            f"a model of {n_parameters:,} parameters takes {needed / 2**30:,.0f} GiB or more to train,"
            f" and {device} has {there / 2**30:,.0f}",
            "try a smaller --n-embd or --n-layer",
            CANNOT_TRAIN,
        )


def memory_of(device: torch.device) -> float:
    """Bytes of memory that a device has; infinite where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return math.inf


def smaller_settings(params: Parameters) -> str:
    """A hint: flags that take about half the memory."""
    batch_size, micro_batches = params.train.batch_size, params.train.grad_accum_steps
    if batch_size > 1:
        halved = f"--batch-size {batch_size // 2} --grad-accum-steps {micro_batches * 2}"
        return f"try {halved}, which sees about as much text in a step"
    model = params.model
    multiple = model.n_head * (2 if model.positions == "rotary" else 1)
    width = max(model.n_embd // 2 // multiple, 1) * multiple
    if width < model.n_embd:
        return f"try --n-embd {width}, or a smaller --block-size"
    return f"try a --block-size below {model.block_size}"
