"""One process, or several that torchrun, srun or mpirun has started (launcher.py):

    torchrun --standalone --nproc_per_node=2 train.py ...

All run the same program. Each draws its own micro-batches, and their gradients are averaged: by
DistributedDataParallel, or those of network/gradient.py by `Distributed.average`.
The main process (rank 0) reads the command line, keeps the run and prints; the others receive from it what
to train, and write nothing. torchrun ends all of them when one is gone.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import signal
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from utils_alg1.base.errors import DISK_FAILED, DONE, Alg1Error, first_line
from utils_alg1.base.memory import out_of_memory
from utils_alg1.base.scripts import command, script
from utils_alg1.console.script import skip_finalization
from utils_alg1.console.signals import signal_handler
from utils_alg1.training.launcher import Place, launcher_name, read_place, watched_parent

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CONNECT_TIMEOUT = datetime.timedelta(minutes=10)  # for all processes to be there
# Of a collective operation. The processes may be stopped meanwhile (Ctrl-Z, a laptop that sleeps, a batch
# system); one that has ended is noticed by its connection.
TIMEOUT = datetime.timedelta(hours=24)
# As in "[.../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer". (An assertion of
# gloo, "[enforce fail at ...", is a fault of the program, such as tensors of different sizes.)
GLOO_FAILURE = re.compile(r"\[\S*gloo/\S+:\d+\] ")


class Distributed:
    """The processes of a run, as seen by one of them.

    They are connected at the first `broadcast`, by gloo and NCCL. The collective operations of a single
    process return at once.

    Attributes:
        rank: 0 to world_size - 1, over all machines; the main process has 0.
        local_rank: the same within this machine: the index of this process's GPU.
        world_size: the number of processes.
    """

    def __init__(self, rank: int = 0, local_rank: int = 0, world_size: int = 1):
        self.rank, self.local_rank, self.world_size = rank, local_rank, world_size
        self._connected = False
        self._parent = watched_parent(world_size)
        self._ddp: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that keeps the run and prints."""
        return self.rank == 0

    @property
    def parent_died(self) -> bool:
        """Whether torchrun or a search, which would have ended this process, is gone."""
        return self._parent is not None and os.getppid() != self._parent

    def __enter__(self) -> Distributed:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """Leave; after success together with the other processes."""
        if self.world_size == 1:
            return
        if kind is None or (isinstance(error, SystemExit) and error.code in (None, DONE)):
            # torchrun takes a process that ends early for a failure, and ends the others.
            with contextlib.suppress(RuntimeError), signal_handler(signal.SIG_DFL):
                if not self._connected:  # after --help, say: the others wait for a job
                    self.broadcast(None)
                self.all_reduce_max(0)
        if self._connected:
            import torch

            self._ddp = None
            if torch.cuda.is_available():  # NCCL asks for it; gloo's connections end with the process
                torch.distributed.destroy_process_group()
        if isinstance(error, Alg1Error) and not self.is_main:
            message = f"process {self.rank} of 0 to {self.world_size - 1}: {error.message}"
            raise Alg1Error(message, error.hint, error.exit_code) from error

    def broadcast(self, value: Any) -> Any:
        """Return the main process's `value` in every process."""
        if self.world_size == 1:
            return value
        import torch

        # While a process only waits, a signal ends it at once: Python's handlers would run after the wait.
        with signal_handler(signal.SIG_DFL), self.connection_guard():
            self._connect()
            values = [value]
            torch.distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def _connect(self) -> None:
        """Connect the processes. Raises Alg1Error if that fails."""
        if self._connected:
            return
        import torch

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        skip_finalization()
        try:
            meeting = torch.distributed.rendezvous(
                "env://", self.rank, self.world_size, timeout=CONNECT_TIMEOUT
            )
            store, rank, world_size = next(meeting)
            torch.distributed.init_process_group(
                backend, timeout=TIMEOUT, store=store, rank=rank, world_size=world_size
            )
        except torch.distributed.DistError as error:
            if "EADDRINUSE" in str(error):
                port = os.environ.get("MASTER_PORT")
                hint = "choose another MASTER_PORT (torchrun: --master_port), the same for all processes"
                raise Alg1Error(f"port {port} is in use", hint) from error
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise Alg1Error(
                f"the processes cannot connect at {address}: {first_line(error)[:120]}",
                "MASTER_ADDR must be the machine of process 0, and MASTER_PORT a port that is open there",
            ) from error
        self._connected = True

    def all_reduce_sum(self, values: list[float]) -> list[float]:
        """Return the sum over all processes of each value."""
        if self.world_size == 1:
            return values
        import torch

        tensor = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def all_reduce_max(self, value: int) -> int:
        """Return the maximum over all processes."""
        if self.world_size == 1:
            return value
        import torch

        tensor = torch.tensor(value)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return int(tensor)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all processes."""
        if self.world_size > 1:
            import torch

            for tensor in tensors:
                torch.distributed.all_reduce(tensor.div_(self.world_size))

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the main process's."""
        if self.world_size > 1:
            import torch

            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=0)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return the model in a form whose backward pass averages the gradients over all processes."""
        if self.world_size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        device_ids = [device] if device.type == "cuda" else None
        self._ddp = DistributedDataParallel(model, device_ids=device_ids)
        return self._ddp

    def no_sync(self, enabled: bool) -> contextlib.AbstractContextManager:
        """The context of a forward and backward pass; if `enabled`, its gradients are not averaged yet."""
        return self._ddp.no_sync() if enabled and self._ddp else contextlib.nullcontext()

    @contextlib.contextmanager
    def connection_guard(self) -> Iterator[None]:
        """Turn a broken connection into one line of the main process; the others end silently.

        Raises:
            Alg1Error: another process is gone, or has not answered within TIMEOUT (exit code 4).
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not is_lost_connection(error):
                raise
            if not self.is_main:
                raise SystemExit(DISK_FAILED) from error
            message, hint = "another process of this run has ended", "its own last line says why"
            if "Timed out" in str(error):
                message = f"another process of this run has not answered for {TIMEOUT}"
                hint = "end it if it is still there"
            raise Alg1Error(message, hint, DISK_FAILED) from error


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective operation failed because another process is gone or silent.

    NCCL and the store raise a type of PyTorch's; gloo a RuntimeError that begins with its source file.
    """
    import torch

    if out_of_memory(error):  # NCCL's of the GPU, say
        return False
    return isinstance(error, torch.distributed.DistError) or bool(GLOO_FAILURE.search(str(error)))


SINGLE_PROCESS = Distributed()


def init_distributed(prints_only: bool = False) -> Distributed:
    """Return the processes that were started together, not connected yet; or a single process.

    Args:
        prints_only: nothing will be trained, and variables that `read_place` refuses do not matter.

    Raises what `read_place` raises.
    """
    try:
        place = read_place()
    except Alg1Error:
        if not prints_only:
            raise
        place = Place()
    return SINGLE_PROCESS if place.world_size == 1 else Distributed(*place)


def launch_command(dist: Distributed) -> str:
    """Return the command that trains with as many processes again."""
    if dist.world_size == 1:
        return command("train.py")
    if launcher_name() != "torchrun":
        return f"{launcher_name()} (as before) {command('train.py')}"
    if os.environ.get("LOCAL_WORLD_SIZE") == str(dist.world_size):
        return f"torchrun --standalone --nproc_per_node={dist.world_size} {script('train.py')}"
    return f"torchrun (as before) {script('train.py')}"
