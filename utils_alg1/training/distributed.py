"""The processes of a run: one alone, or as many as torchrun has started.

    torchrun --standalone --nproc_per_node=2 train.py ...

Every process draws its own micro-batches, and their gradients are averaged (DistributedDataParallel). The
first (rank 0) reads the command line, keeps the run and speaks; the others hear from it what to train, and
write nothing. torchrun ends all of them when one is gone.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from utils_alg1.base.errors import DISK_FAILED, DONE, Alg1Error
from utils_alg1.console.script import world_size
from utils_alg1.console.signals import signal_handler

if TYPE_CHECKING:
    import torch
    from torch import nn

PATIENCE = datetime.timedelta(minutes=10)  # how long a process waits for another, which may be saving


class Processes:
    """One process alone: it is the first, and has nobody to wait for.

    Attributes:
        rank: 0 to world_size - 1, over all machines; the first process has 0.
        local_rank: the same within this machine; which GPU is this process's.
        world_size: how many processes there are.
    """

    rank = local_rank = 0
    world_size = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that keeps the run and speaks."""
        return self.rank == 0

    @property
    def orphaned(self) -> bool:
        """Whether what started the processes, and would end them together, is gone."""
        return False

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Leave, together with the others where all went well."""

    def share(self, value: Any) -> Any:
        """What the first process passes here, in every process."""
        return value

    def sum(self, values: list[float]) -> list[float]:
        """The sums over all processes, of each value."""
        return values

    def largest(self, value: int) -> int:
        """The largest of what the processes pass."""
        return value

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model, in a form whose backward pass averages the gradients of all processes."""
        return model

    def exchange(self, now: bool) -> contextlib.AbstractContextManager:
        """The context of a forward and backward pass; only where `now` are gradients averaged at its end."""
        return contextlib.nullcontext()

    def lost_connection(self) -> contextlib.AbstractContextManager:
        """The context of what fails when another process is gone, as an error that says so."""
        return contextlib.nullcontext()


class TorchrunProcesses(Processes):
    """The processes that torchrun started. They speak over gloo, GPUs among themselves over NCCL."""

    def __init__(self, rank: int, local_rank: int, world_size: int):
        self.rank, self.local_rank, self.world_size = rank, local_rank, world_size
        self._connected = False
        self._parent = os.getppid()
        self._wrapped: Any = None

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if kind is None or (isinstance(error, SystemExit) and error.code in (None, DONE)):
            with contextlib.suppress(RuntimeError):
                if not self._connected:  # --help, say: the others still wait for something to train
                    self.share(None)
                self._wait_for_all()
        if self._connected:
            import torch

            self._wrapped = None
            if torch.cuda.is_available():  # NCCL asks for it; gloo's connections end with the process
                torch.distributed.destroy_process_group()

    def _wait_for_all(self) -> None:
        """Leave together: to torchrun one who left early would be a failure, and it would end the others."""
        with self._mortal():
            self.largest(0)

    @property
    def orphaned(self) -> bool:
        return os.getppid() != self._parent

    def _connect(self) -> None:
        import torch

        if not self._connected:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(backend, timeout=PATIENCE)
            self._connected = True

    @contextlib.contextmanager
    def _mortal(self) -> Iterator[None]:
        """While a process only waits for others, before or after its work, a signal ends it at once.

        Python's own handlers would not be called before the wait is over.
        """
        with signal_handler(signal.SIG_DFL):
            yield

    def share(self, value: Any) -> Any:
        import torch

        with self._mortal(), self.lost_connection():
            self._connect()
            values = [value]
            torch.distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def _reduce(self, values: list, dtype: torch.dtype, operation: Any) -> list:
        import torch

        tensor = torch.tensor(values, dtype=dtype)
        torch.distributed.all_reduce(tensor, operation)
        return tensor.tolist()

    def sum(self, values: list[float]) -> list[float]:
        import torch

        return self._reduce(values, torch.float64, torch.distributed.ReduceOp.SUM)

    def largest(self, value: int) -> int:
        import torch

        return self._reduce([value], torch.int64, torch.distributed.ReduceOp.MAX)[0]

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        device_ids = [device] if device.type == "cuda" else None
        self._wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
        return self._wrapped

    def exchange(self, now: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if now else self._wrapped.no_sync()

    @contextlib.contextmanager
    def lost_connection(self) -> Iterator[None]:
        """Turn a broken connection into one line; the others than the first leave it to that one.

        Raises:
            Alg1Error: another process is gone (exit code 4).
        """
        try:
            yield
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            if not self.first:
                raise SystemExit(DISK_FAILED) from error
            raise Alg1Error(
                "another process of this run has ended", "its own last line says why", DISK_FAILED
            ) from error


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective operation failed, and not the program: PyTorch has no type for it."""
    import torch

    if isinstance(error, torch.distributed.DistError):
        return True
    return any(word in str(error) for word in ("gloo", "NCCL", "Connection", "Broken pipe"))


ALONE = Processes()


def start_processes() -> Processes:
    """This process's place among those that torchrun started; alone without torchrun."""
    if world_size() == 1:
        return ALONE
    return TorchrunProcesses(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), world_size())


def launch_command(processes: Processes) -> str:
    """What to type to train with as many processes again."""
    if processes.world_size == 1:
        return "python train.py"
    if int(os.environ["LOCAL_WORLD_SIZE"]) == processes.world_size:
        return f"torchrun --standalone --nproc_per_node={processes.world_size} train.py"
    return "torchrun (as before) train.py"
