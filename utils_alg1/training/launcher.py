"""The place of this process among those of a run, from the variables that torchrun, mpirun or srun set."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping
from typing import NamedTuple

from utils_alg1.base.errors import Alg1Error


class Place(NamedTuple):
    """The place of a process: that of one which is started alone, unless told otherwise."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


class Variables(NamedTuple):
    """The names of the variables that tell a process its place; "" where none does."""

    rank: str
    local_rank: str
    world_size: str


# Those of torchrun may also be set by hand, all or some of them; those of the others count where their world
# size is set. SLURM sets SLURM_PROCID outside of srun too. MPICH comes before srun, through which its mpirun
# starts one task for each machine; `srun --mpi=pmi2` sets PMI_RANK and PMI_SIZE, but no MPI_LOCALRANKID.
TORCHRUN = Variables("RANK", "LOCAL_RANK", "WORLD_SIZE")
OPEN_MPI = Variables("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE")
MPICH = Variables("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE")  # also Intel MPI
SRUN = Variables("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
LAUNCHERS = (TORCHRUN, OPEN_MPI, MPICH, SRUN)
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")  # where process 0 listens
PARENT = "ALG1_PARENT"  # the process id of a search, in the environment of its trials
SEVERAL_HINT = (
    "for one run, on the machine of process 0: export MASTER_ADDR=$(hostname) MASTER_PORT=29500;"
    " for a run in each process: export WORLD_SIZE=1"
)


def read_place() -> Place:
    """Return the place of this process.

    Raises:
        Alg1Error: the variables are incomplete or wrong, or the address of process 0 is unknown.
    """
    names = _variables()
    if not names.world_size:
        if not names.rank:
            return Place()
        raise Alg1Error("RANK is set, but WORLD_SIZE is not", "unset RANK, or start with torchrun")
    world_size = _whole_number(names.world_size, 1)
    if world_size == 1:
        return Place()
    if not names.rank or not names.local_rank:
        missing = TORCHRUN.local_rank if names.rank else TORCHRUN.rank
        raise Alg1Error(
            f"{names.world_size} is {world_size}, but {missing} is not set",
            f"for one process: unset {names.world_size};"
            f" for several: torchrun --standalone --nproc_per_node={world_size} train.py",
        )
    rank = _whole_number(names.rank, 0, world_size - 1)
    local_rank = _whole_number(names.local_rank, 0, world_size - 1)
    _check_address(f"{names.world_size} is {world_size}")
    return Place(rank, local_rank, world_size)


def launcher_name() -> str:
    """Return the name of the program that has started the processes."""
    if not os.environ.get("LOCAL_WORLD_SIZE"):  # which torchrun sets, maybe in a step of srun
        if _is_set(OPEN_MPI.world_size) or _is_set(MPICH.local_rank):
            return "mpirun"
        if _is_set(SRUN.world_size):
            return "srun"
    return "torchrun"


def refuse_torchrun(script: str, hint: str) -> None:
    """Raise Alg1Error if torchrun has started several processes of a script that is one."""
    n = os.environ.get(TORCHRUN.world_size)
    if _is_set(TORCHRUN.rank) and n not in (None, "", "1"):
        raise Alg1Error(f"{script} is one process, and WORLD_SIZE and RANK are those of {n}", hint)


def environment_of_child(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a process that trains alone, and that ends when this process is gone."""
    names = {"LOCAL_WORLD_SIZE", *ADDRESS}.union(*LAUNCHERS)
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


def _is_set(name: str) -> bool:
    """Return whether a variable has a value; an empty one counts as unset."""
    return bool(os.environ.get(name))


def _variables() -> Variables:
    """Return the variables that tell the place of this process: each that of the first launcher to set it."""
    launchers = [names for names in LAUNCHERS if names is TORCHRUN or _is_set(names.world_size)]
    return Variables(*(next(filter(_is_set, names), "") for names in zip(*launchers, strict=True)))


def _whole_number(name: str, minimum: int, maximum: float = math.inf) -> int:
    """Return the value of a variable that is set; raises Alg1Error if it is no number within the limits."""
    text = os.environ[name]
    if text.isdecimal() and minimum <= int(text) <= maximum:
        return int(text)
    limits = f"above {minimum - 1}" if maximum == math.inf else f"from {minimum} to {maximum}"
    raise Alg1Error(f"{name} is {text!r}: must be a whole number {limits}", f"correct or unset {name}")


def _check_address(reason: str) -> None:
    """Raise Alg1Error if the address of process 0 is incomplete or unknown, for which PyTorch would wait."""
    for name in ADDRESS:
        if not _is_set(name):
            raise Alg1Error(f"{reason}, but {name} is not set", SEVERAL_HINT)
    port = _whole_number("MASTER_PORT", 1, 65535)
    address = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(address, port)
    except (OSError, UnicodeError) as error:
        message = f"MASTER_ADDR is {address!r}: {getattr(error, 'strerror', None) or error}"
        raise Alg1Error(message, "name the machine of process 0 as this one knows it") from None
