"""The devices of this machine: the CPU, GPUs through CUDA, Apple's (mps) and Intel's (xpu).

CUDA is that of AMD's GPUs too. Of Apple's and Intel's no real one was ever tried: tests/test_devices.py has a
stand-in.
"""

from __future__ import annotations

import math
import os

import torch

from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.text import format_count
from utils_alg1.training.distributed import Distributed

UNTRIED = {"mps": "an Apple GPU", "xpu": "an Intel GPU"}  # `auto` leaves these alone
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK"}  # variables that hide and renumber GPUs


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
        raise Alg1Error(
            f"--device {name}: not one of auto, cpu, cuda, cuda:N, mps, xpu, xpu:N",
            "use cuda for a GPU of NVIDIA or AMD, mps of Apple, xpu of Intel; or cpu, or leave it out",
        ) from None
    if (device.index or 0) >= count:
        raise no_such_device(name, device.type, count)
    return device


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


def no_such_device(name: str, kind: str, count: int) -> Alg1Error:
    """Return the error for a device that is not there, but `count` others of its kind."""
    variable = VISIBLE.get(kind, "")
    value = f"{variable}={os.environ[variable]}" if variable in os.environ else ""
    if kind == "cpu" or not count:
        hint = "use --device auto or --device cpu"
        if value:
            hint = f"{value} may hide it: unset that, or use --device cpu"
        return Alg1Error(f"--device {name}: this machine has no such device", hint)
    names = f"it is {kind}:0" if count == 1 else f"they are {kind}:0 to {kind}:{count - 1}"
    renumbered = f"{value} numbers the GPUs that it names from 0: " if value else ""
    return Alg1Error(
        f"--device {name}: {describe_visible(count)}; {names}", f"{renumbered}use --device {kind}:0"
    )


def describe_visible(n_gpus: int) -> str:
    """Return the start of a message, such as "2 GPUs are visible"."""
    return f"{format_count(n_gpus, 'GPU')} {'is' if n_gpus == 1 else 'are'} visible"


def visible_gpus() -> list[str]:
    """Return the CUDA devices that this process sees, as CUDA_VISIBLE_DEVICES would name them."""
    n_gpus = count_devices("cuda")
    named = os.environ.get(VISIBLE["cuda"])
    names = [str(i) for i in range(n_gpus)] if named is None else named.split(",")
    return [name.strip() for name in names[:n_gpus]]


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
            f"{describe_visible(n_gpus)}, too few for process {dist.local_rank + 1} of this machine",
            "start as many processes as there are GPUs: --nproc_per_node",
        )
    torch.cuda.set_device(dist.local_rank)
    return torch.device("cuda", dist.local_rank)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "mps":  # torch.accelerator does not wait for it in every version of PyTorch
        torch.mps.synchronize()
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def memory_of(device: torch.device) -> float:
    """Return the bytes of memory of a device; infinity where the system does not tell."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).get_device_properties(device).total_memory
    if device.type == "mps":  # shares the memory of the machine, but not all of it
        return torch.mps.recommended_max_memory()
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return math.inf
