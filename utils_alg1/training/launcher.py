"""The place of this process among those of a run, from the variables that torchrun, mpirun or srun set."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from utils_alg1.base.errors import Alg1Error

# The variables of rank, local rank and world size. Those of torchrun may also be set by hand, all or some of
# them; those of the others count where the last one is set. (SLURM sets SLURM_PROCID outside of srun too.)
LAUNCHERS = {
    "torchrun": ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
}
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")  # where process 0 listens
PARENT = "ALG1_PARENT"  # the process id of a search, in the environment of its trials
SEVERAL_HINT = (
    "for one run, on the machine of process 0: export MASTER_ADDR=$(hostname) MASTER_PORT=29500;"
    " for a run in each process: export WORLD_SIZE=1"
)


def read_place() -> tuple[int, int, int]:
    """Return rank, local rank and world size: 0, 0 and 1 for a process that is started alone.

    Raises:
        Alg1Error: the variables are incomplete or wrong, or the address of process 0 is unknown.
    """
    size_name = _first_set(2)
    if size_name is None:
        if "RANK" not in os.environ:
            return 0, 0, 1
        raise Alg1Error("RANK is set, but WORLD_SIZE is not", "unset RANK, or start with torchrun")
    world_size = _whole_number(size_name, 1, None)
    if world_size == 1:
        return 0, 0, 1
    rank_name, local_rank_name = _first_set(0), _first_set(1)
    if rank_name is None or local_rank_name is None:
        missing = "LOCAL_RANK" if rank_name else "RANK"
        raise Alg1Error(
            f"{size_name} is {world_size}, but {missing} is not set",
            f"for one process: unset {size_name};"
            f" for several: torchrun --standalone --nproc_per_node={world_size} train.py",
        )
    rank = _whole_number(rank_name, 0, world_size - 1)
    local_rank = _whole_number(local_rank_name, 0, world_size - 1)
    _check_address(f"{size_name} is {world_size}")
    return rank, local_rank, world_size


def launcher() -> str:
    """Return the name of the program that has started the processes."""
    if "LOCAL_WORLD_SIZE" not in os.environ:  # which torchrun sets, maybe in a step of srun
        for name in ("mpirun", "srun"):
            if LAUNCHERS[name][-1] in os.environ:
                return name
    return "torchrun"


def refuse_torchrun(script: str, hint: str) -> None:
    """Raise Alg1Error if torchrun has started several processes of a script that is one."""
    n = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and n != "1":
        raise Alg1Error(f"{script} is one process, and WORLD_SIZE and RANK are those of {n}", hint)


def environment_of_child(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a process that trains alone, and that ends when this process is gone."""
    names = {"LOCAL_WORLD_SIZE", *ADDRESS}.union(*LAUNCHERS.values())
    kept = {name: value for name, value in environment.items() if name not in names}
    return kept | {PARENT: str(os.getpid())}


def watched_parent(world_size: int) -> int | None:
    """Return the process id of the parent without which this process is to end; None if it may outlive it.

    It is that of torchrun, srun or mpirun, or of the search that has started this process for a trial.
    """
    if world_size > 1:
        return os.getppid()
    parent = os.environ.get(PARENT, "")
    return int(parent) if parent.isdecimal() else None


def _first_set(index: int) -> str | None:
    """Return the variable that tells rank (0), local rank (1) or world size (2), if one does."""
    for launcher, names in LAUNCHERS.items():
        if names[index] in os.environ and (launcher == "torchrun" or names[-1] in os.environ):
            return names[index]
    return None


def _whole_number(name: str, minimum: int, maximum: int | None) -> int:
    """Return the value of a variable; raises Alg1Error if it is missing or out of range."""
    text = os.environ[name]
    if text.isdecimal() and minimum <= int(text) <= (int(text) if maximum is None else maximum):
        return int(text)
    limits = f"above {minimum - 1}" if maximum is None else f"from {minimum} to {maximum}"
    raise Alg1Error(f"{name} is {text!r}: must be a whole number {limits}", f"correct or unset {name}")


def _check_address(reason: str) -> None:
    """Raise Alg1Error if the address of process 0 is incomplete or unknown, for which PyTorch would wait."""
    for name in ADDRESS:
        if not os.environ.get(name):
            raise Alg1Error(f"{reason}, but {name} is not set", SEVERAL_HINT)
    port = _whole_number("MASTER_PORT", 1, 65535)
    address = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(address, port)
    except (OSError, UnicodeError) as error:
        message = f"MASTER_ADDR is {address!r}: {getattr(error, 'strerror', None) or error}"
        raise Alg1Error(message, "name the machine of process 0 as this one knows it") from None
