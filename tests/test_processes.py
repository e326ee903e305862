"""One run by several processes: the same weights as by one, one run on disk, and nothing hangs."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import faults
import pytest
import torch
from conftest import PROJECT, TEXT, run_process, with_changes

from model import BigramLanguageModel
from parameters import ModelConfig
from utils_alg1.base.errors import Alg1Error
from utils_alg1.data.corpus import open_corpus
from utils_alg1.network.tensor_file import read_tensors
from utils_alg1.run.run import Run
from utils_alg1.training import arithmetic as arithmetic_module
from utils_alg1.training import distributed as distributed_module
from utils_alg1.training import launcher
from utils_alg1.training.arithmetic import Processor
from utils_alg1.training.devices import device_of_process
from utils_alg1.training.distributed import (
    SINGLE_PROCESS,
    Distributed,
    init_distributed,
    is_lost_connection,
    launch_command,
)
from utils_alg1.training.evaluation import measure
from utils_alg1.training.runtime import Runtime

RUN = (
    "--data text.txt --n-embd 16 --n-head 2 --n-layer 2 --block-size 8 --batch-size 2 --dropout 0.1"
    " --max-iters 12 --eval-interval 4 --eval-iters 3 --checkpoint-interval 3 --keep-checkpoints 9"
    " --threads 1 --no-aim --no-tensorboard"
).split()
AT_ONCE = 30  # seconds in which a job must end when one of its processes is gone


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(world_size: int, arguments: Sequence[str], prepare: Callable[[int], object] | None = None) -> list:
    """Start so many forked processes as torchrun would; `prepare(rank)` is called in each first."""
    port = str(free_port())

    def place(rank: int) -> Callable[[], None]:
        def work() -> None:
            os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            if prepare is not None:
                prepare(rank)

        return work

    return [faults.start_train(arguments, place(rank)) for rank in range(world_size)]


def run_together(world_size: int, *arguments: str) -> list[int]:
    """Run train.py in so many processes: their exit codes."""
    return [faults.wait(pid) for pid in start(world_size, arguments)]


@pytest.fixture(scope="module", autouse=True)
def everything_loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A run in this process loads what its children would else load one by one."""
    import torch.distributed.distributed_c10d
    import torch.nn.parallel

    with new_folder(tmp_path_factory.mktemp("warm"), "up"):
        assert faults.train_here(RUN) == 0
        torch.nn.parallel.DistributedDataParallel  # noqa: B018


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = faults.new_folder(tmp_path, "run")
    monkeypatch.chdir(path)
    return path


def new_folder(parent: Path, name: str) -> contextlib.AbstractContextManager:
    """A folder with a text in it, and the working folder while the block lasts."""
    return contextlib.chdir(faults.new_folder(parent, name))


def output() -> str:
    return Path("output.txt").read_text()


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return read_tensors(run_dir / "artifacts" / "checkpoints" / "step_000000012.safetensors")[0]


# --- the same work, shared out ------------------------------------------------------------------------


def test_one_two_and_four_processes_take_the_same_steps(tmp_path):
    runs = {}
    for world_size, steps in ((1, 4), (2, 2), (4, 1)):
        with new_folder(tmp_path, f"{world_size}x{steps}"):
            codes = run_together(world_size, *RUN, "--grad-accum-steps", str(steps))
            assert codes == [0] * world_size, output()
            runs[world_size] = faults.only_run(Path()).absolute()
    alone = weights(runs[1])
    for world_size in (2, 4):
        shared = weights(runs[world_size])
        assert shared.keys() == alone.keys()
        for name, tensor in alone.items():
            assert (tensor - shared[name]).abs().max() < 1e-6, (world_size, name)
    losses = [[row for row in faults.metrics(run) if "loss/val" in row] for run in runs.values()]
    for rows in zip(*losses, strict=True):
        assert rows[1] == pytest.approx(rows[0], abs=1e-6)
        assert rows[2] == pytest.approx(rows[0], abs=1e-6)
    losses = [json.loads((run / "eval/final.json").read_text())["export_val_loss"] for run in runs.values()]
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-6)


def test_two_processes_start_from_a_model_with_new_characters_as_one_does(tmp_path):
    known = sorted({*TEXT, "ß"} - {"é", "日"})
    base = BigramLanguageModel(
        ModelConfig(n_embd=16, n_head=2, n_layer=2, block_size=8, vocab_size=len(known))
    )
    base.vocabulary = known
    base.save_safetensors(tmp_path / "base.safetensors")
    flags = [*RUN, "--init-from", str(tmp_path / "base.safetensors"), "--new-characters", "add"]
    runs = {}
    for world_size, steps in ((1, 2), (2, 1)):
        with new_folder(tmp_path, f"{world_size}x{steps}"):
            codes = run_together(world_size, *flags, "--grad-accum-steps", str(steps))
            assert codes == [0] * world_size, output()
            runs[world_size] = faults.only_run(Path()).absolute()
    alone, shared = weights(runs[1]), weights(runs[2])
    assert len(alone["model.lm_head.bias"]) == len({*TEXT, "ß"})
    for name, tensor in alone.items():
        assert (tensor - shared[name]).abs().max() < 1e-6, name


def test_each_process_draws_micro_batches_of_its_own(folder, monkeypatch):
    """Two processes on the same data would still agree with each other, and learn from half of it."""

    def note(rank: int) -> None:
        from utils_alg1.training import trainer as trainer_module

        real = trainer_module.Trainer._micro_batch_loss

        def backward(self, micro_batch, **flags):
            with Path(f"drawn-{rank}").open("a") as file:
                file.write(f"{self.step}/{micro_batch}\n")
            return real(self, micro_batch, **flags)

        trainer_module.Trainer._micro_batch_loss = backward

    arguments = [*RUN, "--grad-accum-steps", "2", "--max-iters", "2"]
    assert [faults.wait(pid) for pid in start(2, arguments, note)] == [0, 0], output()
    drawn = [Path(f"drawn-{rank}").read_text().split() for rank in (0, 1)]
    assert drawn[0] == ["0/0", "0/2", "1/0", "1/2"]
    assert drawn[1] == ["0/1", "0/3", "1/1", "1/3"]


@pytest.mark.parametrize(("world_size", "gradient"), [(2, "manual"), (3, "manual"), (3, "autograd")])
def test_a_resumed_run_of_several_processes_ends_with_the_same_bytes(
    folder, world_size, gradient, monkeypatch
):
    flags = [*RUN, "--qk-norm"]
    if gradient == "autograd":  # and so DistributedDataParallel, as on GPUs
        monkeypatch.setattr(arithmetic_module, "OPTIONS", {"positions", "zero_init"})
    assert run_together(world_size, *flags) == [0] * world_size, output()
    run_dir = faults.only_run(folder)
    assert json.loads((run_dir / "meta/full_config.json").read_text())["runtime"]["gradient"] == gradient
    last = faults.tensors(faults.checkpoints(folder)[-1])
    rows = faults.metrics(run_dir)
    for step in (3, 8):
        path = run_dir / "artifacts" / "checkpoints" / f"step_{step:09d}.safetensors"
        assert run_together(world_size, "--resume", str(path)) == [0] * world_size, output()
        assert faults.tensors(faults.checkpoints(folder)[-1]) == last, f"from step {step}"
        assert faults.metrics(run_dir) == rows


def test_another_kind_of_machine_computes_as_the_main_process_does(tmp_path):
    def on_another_machine(rank: int) -> None:
        from utils_alg1.training import seeds

        if rank == 1:
            arithmetic_module.SMALL_STEP_FLOPS = arithmetic_module.BFLOAT16_N_EMBD = 0
            arithmetic_module.Processor.read = lambda: Processor("", flags=frozenset({"amx_bf16"}))
            real = seeds.seed_initial_weights
            seeds.seed_initial_weights = lambda seed: real(seed + 1)

    found = {}
    for name, prepare in (("alike", None), ("different", on_another_machine)):
        with new_folder(tmp_path, name):
            assert [faults.wait(pid) for pid in start(2, RUN, prepare)] == [0, 0], output()
            found[name] = faults.tensors(faults.checkpoints(Path())[-1])
    assert found["alike"] == found["different"]


def test_resuming_with_another_number_of_processes(folder):
    assert run_together(2, *RUN) == [0, 0], output()
    assert run_together(1, "--resume", "latest", "--max-iters", "14") == [2]
    expected = "micro-batches of a step: 1 x 2 processes -> 1 x 1 (--grad-accum-steps 2 keeps them)"
    assert expected in output()
    arguments = ["--resume", "latest", "--max-iters", "14", "--grad-accum-steps", "2"]
    assert run_together(1, *arguments) == [0], output()
    assert faults.metrics(faults.only_run(folder))[-1]["step"] == 14


def test_patience_ends_all_processes_at_the_same_step(folder):
    arguments = [*RUN, "--max-iters", "50", "--eval-interval", "1", "--patience", "2"]
    assert run_together(2, *arguments, "--learning-rate", "3") == [0, 0], output()
    run = faults.only_run(folder)
    final = json.loads((run / "eval" / "final.json").read_text())
    assert final["steps"] == final["best_step"] + 2 < 50
    # All have measured the best weights, which the main process alone has read.
    model = BigramLanguageModel().load_safetensors(run / "artifacts/export/model.safetensors")
    measured = measure(model, open_corpus(folder / "text.txt").split()[1], Runtime())
    assert final["export_val_loss"] == pytest.approx(measured.loss, rel=1e-6)


def test_the_trackers_show_one_run(folder):
    arguments = [word for word in RUN if word not in ("--no-aim", "--no-tensorboard")]
    assert run_together(2, *arguments) == [0, 0], output()
    run_dir = faults.only_run(folder)  # one, or this fails
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list(run_dir.glob("logs/tensorboard/events*"))) == 1
    events = EventAccumulator(str(run_dir / "logs" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [point.step for point in events.Scalars("Loss/train_step")] == list(range(12))
    assert [point.step for point in events.Scalars("Loss/val")] == [0, 4, 8, 12]
    aim = pytest.importorskip("aim")
    (run,) = aim.Repo(str(folder)).iter_runs()
    assert run.name == run_dir.name


# --- one line for a mistake, and no process left ------------------------------------------------------


MISTAKES = {
    "an unknown flag": (["--max-iterss", "3"], 2, "error: unknown flag --max-iterss; did you mean"),
    "a wrong value": (["--batch-size", "0"], 2, "error: batch_size = 0 must be above 0"),
    "no such text": (["--data", "nothing.txt"], 2, "error: nothing.txt: no such text file"),
    "no such run": (["--resume", "latest"], 2, "error: there is no run in runs: no such folder"),
    "a loss that explodes": ([*RUN, "--learning-rate", "1e30"], 3, "error: the loss is not finite at step"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_once_by_the_first_process(folder, mistake):
    arguments, code, message = MISTAKES[mistake]
    pids = start(2, arguments)
    assert faults.wait(pids[0]) == code
    os.kill(pids[1], signal.SIGTERM)  # as torchrun does when one has failed
    assert faults.wait(pids[1]) != 0
    assert output().count("error:") == 1
    assert message in output()
    assert "Traceback" not in output()


@pytest.mark.parametrize("flag", ["--help", "--print-config"])
def test_what_trains_nothing_ends_all_processes(folder, flag):
    assert run_together(2, flag) == [0, 0]
    assert len(re.findall(r"^(n_embd:| +--n-embd) ", output(), re.M)) == 1
    assert not Path("runs").exists()


def test_two_processes_share_a_held_out_text(folder):
    Path("held.txt").write_text(TEXT[:300], encoding="utf-8")
    assert run_together(2, *RUN, "--val-data", "held.txt") == [0, 0], output()
    assert "\nval      held.txt: 300 characters; all of the text is for training\n" in output()


def test_a_process_with_another_text_says_so(folder):
    def change_text(rank: int) -> None:
        if rank == 1:
            from utils_alg1.data import corpus as corpus_module
            from utils_alg1.data.text_files import TextFiles

            real = corpus_module.open_corpus

            def other(files):
                Path("other.txt").write_text("other " + files.paths[0].read_text())
                return real(TextFiles("text.txt", (Path("other.txt"),)))

            corpus_module.open_corpus = other

    codes = [faults.wait(pid) for pid in start(2, RUN, change_text)]
    assert codes == [4, 2], output()
    assert "error: process 1 of 0 to 1: text.txt: not the text of the main process" in output()
    assert "error: another process of this run has ended" in output()


# --- processes that die, and signals ------------------------------------------------------------------


def at_step(step: int, action: Callable[[], object]) -> None:
    """In this process: do something when a training step begins."""
    from utils_alg1.training.trainer import Trainer

    real = Trainer.forward_backward

    def forward_backward(self):
        if self.step == step:
            action()
        return real(self)

    Trainer.forward_backward = forward_backward


def wait_for_all(pids: list[int]) -> None:
    """Wait for children; none of them may take longer than AT_ONCE seconds."""
    end = time.monotonic() + AT_ONCE
    running = set(pids)
    while running:
        running -= {pid for pid in running if os.waitpid(pid, os.WNOHANG)[0]}
        assert time.monotonic() < end, "a process still waits for one that is gone"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that interrupted ones must end like."""
    with new_folder(tmp_path_factory.mktemp("two"), "run"):
        assert run_together(2, *RUN) == [0, 0], output()
        return Path().absolute()


def check_resumed(folder: Path, uninterrupted: Path) -> None:
    """Resume in two processes, and compare."""
    assert run_together(2, "--resume", "latest") == [0, 0], output()
    check_same_end(folder, uninterrupted)


def check_same_end(folder: Path, uninterrupted: Path) -> None:
    """Compare the last checkpoints and the metrics of two runs."""
    checkpoint = faults.checkpoints(folder)[-1]
    assert faults.tensors(checkpoint) == faults.tensors(faults.checkpoints(uninterrupted)[-1])
    assert faults.metrics(faults.only_run(folder)) == faults.metrics(faults.only_run(uninterrupted))


def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path, uninterrupted, campaign):
    draw = random.Random(1)
    cases = 20 if campaign.whole else 3
    for case in range(cases):
        rank, step = draw.randrange(2), draw.randrange(1, 12)
        with new_folder(tmp_path, f"case-{case}"):
            pids = start(2, RUN, lambda r, rank=rank, step=step: r == rank and at_step(step, faults.kill_me))
            wait_for_all(pids)
            if rank == 1:
                assert "error: another process of this run has ended" in output()
                assert re.search(
                    r"continue: torchrun --standalone --nproc_per_node=2 train.py --resume", output()
                )
            check_resumed(Path(), uninterrupted)
    campaign.count("one of two processes killed at a random step", cases)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_process_stops_all(folder, uninterrupted, rank, number):
    def signal_me() -> None:
        os.kill(os.getpid(), number)

    pids = start(2, RUN, lambda r: r == rank and at_step(5, signal_me))
    assert [faults.wait(pid) for pid in pids] == [128 + number] * 2, output()
    (newest,) = (path for path in faults.checkpoints(folder) if "06" in path.name)
    assert newest == faults.checkpoints(folder)[-1]
    assert "stopped at step 6; continue with: torchrun --standalone --nproc_per_node=2 train.py" in output()
    check_resumed(folder, uninterrupted)


def stopped_at_step(step: int, prepare: Callable[[], object]) -> list[int]:
    """Start two processes; the second one is stopped at a step, and the first one waits for it."""

    def place(rank: int) -> None:
        prepare()
        if rank == 1:
            at_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP))

    pids = start(2, RUN, place)
    assert os.WIFSTOPPED(os.waitpid(pids[1], os.WUNTRACED)[1])
    return pids


def test_processes_that_are_stopped_for_long_go_on(folder, uninterrupted):
    """Here for longer than they wait for each other at the start."""

    def shorten() -> None:
        distributed_module.CONNECT_TIMEOUT = datetime.timedelta(seconds=2)

    pids = stopped_at_step(5, shorten)
    os.kill(pids[0], signal.SIGSTOP)
    time.sleep(3)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert [faults.wait(pid) for pid in pids] == [0, 0], output()
    check_same_end(folder, uninterrupted)


def test_a_process_that_does_not_answer_is_not_said_to_have_ended(folder):
    def shorten() -> None:
        distributed_module.TIMEOUT = datetime.timedelta(seconds=2)

    pids = stopped_at_step(5, shorten)
    assert faults.wait(pids[0]) == 4, output()
    os.kill(pids[1], signal.SIGKILL)
    faults.wait(pids[1])
    assert "error: another process of this run has not answered for 0:00:02\n" in output()
    assert "hint: end it if it is still there; then continue: torchrun" in output()


# --- torchrun itself ----------------------------------------------------------------------------------


@contextlib.contextmanager
def torchrun(*arguments: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, str(PROJECT / "train.py"), *with_changes(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def process_of(rank: int, parent: int) -> int:
    """The process id of a rank among the children of torchrun."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            own_parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if own_parent == parent and f"\0RANK={rank}\0".encode() in (path / "environ").read_bytes():
                return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


def wait_for_step(step: int) -> None:
    """Until the run in this folder has got so far."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for path in Path("runs").glob("*/logs/metrics.jsonl"):
            if any(row["step"] >= step for row in faults.metrics(path.parent.parent)):
                return
        time.sleep(0.02)
    raise AssertionError("the run does not get on")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc, as on Linux")
def test_torchrun_saves_at_a_signal_resumes_and_ends_when_a_process_is_killed(folder):
    with torchrun(*RUN, "--max-iters", "100000") as job:
        wait_for_step(4)
        job.send_signal(signal.SIGINT)
        text = job.communicate(timeout=AT_ONCE)[0]
    stopped = re.search(r"stopped at step (\d+); continue with: (torchrun .*)", text)
    assert stopped, text
    step = int(stopped[1])
    assert faults.checkpoints(folder)[-1].stem == f"step_{step:09d}"
    assert re.match(r"torchrun --standalone --nproc_per_node=2 \S*train.py --resume runs/20", stopped[2])
    with torchrun("--resume", "latest") as job:
        wait_for_step(step + 4)
        began = time.monotonic()
        os.kill(process_of(1, job.pid), signal.SIGKILL)
        text = job.communicate(timeout=AT_ONCE)[0]
        assert job.returncode == 1
        assert time.monotonic() - began < AT_ONCE
    assert "error: another process of this run has ended" in text, text


# --- the parts ----------------------------------------------------------------------------------------


def test_one_process_alone_has_nobody_to_wait_for(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert init_distributed() is SINGLE_PROCESS
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert init_distributed() is SINGLE_PROCESS
    model = torch.nn.Linear(2, 2)
    assert SINGLE_PROCESS.is_main and SINGLE_PROCESS.world_size == 1
    assert SINGLE_PROCESS.wrap(model, torch.device("cpu")) is model
    assert SINGLE_PROCESS.broadcast("x") == "x"
    assert (SINGLE_PROCESS.all_reduce_sum([1.5]), SINGLE_PROCESS.all_reduce_max(3)) == ([1.5], 3)
    assert launch_command(SINGLE_PROCESS) == "python train.py"


def test_the_place_that_torchrun_gives(monkeypatch):
    set_variables(monkeypatch, WORLD_SIZE=4, RANK=3, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, **ADDRESS)
    dist = init_distributed()
    assert (dist.rank, dist.local_rank, dist.world_size) == (3, 1, 4)
    assert not dist.is_main
    assert launch_command(dist) == "torchrun (as before) train.py"


ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": 3, "OMPI_COMM_WORLD_LOCAL_RANK": 1, "OMPI_COMM_WORLD_SIZE": 4}
MPICH = {"PMI_RANK": 3, "MPI_LOCALRANKID": 1, "PMI_SIZE": 4}
SRUN = {"SLURM_PROCID": 3, "SLURM_LOCALID": 1, "SLURM_STEP_NUM_TASKS": 4}
MPIRUN_AGAIN = "mpirun (as before) python train.py"
BY_HAND = {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4}


def set_variables(monkeypatch, **values) -> None:
    """The variables of a launcher, and no others."""
    for name in os.environ.keys() - launcher.environment_of_child({**os.environ}).keys():
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    "variables, command",
    [
        (MPIRUN, MPIRUN_AGAIN),
        (MPICH, MPIRUN_AGAIN),
        (MPICH | {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_STEP_NUM_TASKS": 2}, MPIRUN_AGAIN),
        (SRUN, "srun (as before) python train.py"),
        (SRUN | {"PMI_RANK": 3, "PMI_SIZE": 4}, "srun (as before) python train.py"),  # --mpi=pmi2
        (SRUN | {"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": ""}, "srun (as before) python train.py"),
        (SRUN | BY_HAND, "srun (as before) python train.py"),  # set in a wrapper
        (SRUN | {"WORLD_SIZE": 4}, "srun (as before) python train.py"),
        (BY_HAND, "torchrun (as before) train.py"),
        (dict.fromkeys(SRUN, 7) | BY_HAND | {"LOCAL_WORLD_SIZE": 2}, "torchrun (as before) train.py"),
    ],
)
def test_the_place_that_other_launchers_give(variables, command, monkeypatch):
    set_variables(monkeypatch, **variables, **ADDRESS)
    dist = init_distributed()
    assert (dist.rank, dist.local_rank, dist.world_size) == (3, 1, 4)
    assert launch_command(dist) == command


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0},
        SRUN | {"WORLD_SIZE": 1},  # a run in each process
        {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NTASKS": 4},  # in a script of sbatch, without srun
        {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_STEP_NUM_TASKS": 1},
        {"LOCAL_RANK": 1},
        {"PMI_RANK": 0, "MPI_LOCALRANKID": 0, "PMI_SIZE": 1},
        MPICH | {"WORLD_SIZE": 1},
        {"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": ""},
        {"WORLD_SIZE": "", "SLURM_STEP_NUM_TASKS": "", "PMI_SIZE": ""},
    ],
)
def test_a_process_alone_in_a_cluster(variables, monkeypatch):
    set_variables(monkeypatch, **variables)
    assert init_distributed() is SINGLE_PROCESS


ONE = "for one process: unset WORLD_SIZE; for several: torchrun --standalone --nproc_per_node=2 train.py"
TWO = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0} | ADDRESS


@pytest.mark.parametrize(
    "variables, message, hint",
    [
        ({"WORLD_SIZE": 2}, "WORLD_SIZE is 2, but RANK is not set", ONE),
        # in a script of sbatch, without srun
        ({"WORLD_SIZE": 2, "SLURM_PROCID": 0}, "WORLD_SIZE is 2, but RANK is not set", ONE),
        ({"WORLD_SIZE": 2, "RANK": 1}, "WORLD_SIZE is 2, but LOCAL_RANK is not set", ONE),
        ({"RANK": 1}, "RANK is set, but WORLD_SIZE is not", "unset RANK, or start with torchrun"),
        (
            {"WORLD_SIZE": "two"},
            "WORLD_SIZE is 'two': must be a whole number above 0",
            "correct or unset WORLD_SIZE",
        ),
        (
            {"WORLD_SIZE": 0},
            "WORLD_SIZE is '0': must be a whole number above 0",
            "correct or unset WORLD_SIZE",
        ),
        (TWO | {"RANK": 2}, "RANK is '2': must be a whole number from 0 to 1", "correct or unset RANK"),
        (
            TWO | {"LOCAL_RANK": -1},
            "LOCAL_RANK is '-1': must be a whole number from 0 to 1",
            "correct or unset LOCAL_RANK",
        ),
        (SRUN, "SLURM_STEP_NUM_TASKS is 4, but MASTER_ADDR is not set", launcher.SEVERAL_HINT),
        (MPICH, "PMI_SIZE is 4, but MASTER_ADDR is not set", launcher.SEVERAL_HINT),
        (
            {"PMI_RANK": 1, "PMI_SIZE": 2},  # of another program
            "PMI_SIZE is 2, but LOCAL_RANK is not set",
            ONE.replace("WORLD_SIZE", "PMI_SIZE"),
        ),
        (
            TWO | {"MASTER_PORT": ""},
            "WORLD_SIZE is 2, but MASTER_PORT is not set",
            launcher.SEVERAL_HINT,
        ),
        (
            TWO | {"MASTER_PORT": 70000},
            "MASTER_PORT is '70000': must be a whole number from 1 to 65535",
            "correct or unset MASTER_PORT",
        ),
    ],
)
def test_variables_that_are_wrong_or_incomplete(variables, message, hint, train, monkeypatch):
    set_variables(monkeypatch, **variables)
    result = train("--quiet")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"error: {message}\nhint: {hint}\n"


@pytest.mark.parametrize("address", ["no-such-machine.invalid", "a" * 64 + ".invalid"])
def test_an_address_that_does_not_resolve_is_said_at_once(address, train, monkeypatch):
    set_variables(monkeypatch, **TWO | {"MASTER_ADDR": address})
    result = train("--quiet")
    assert result.code == 2
    assert result.err.startswith(f"error: MASTER_ADDR is {address!r}: ")
    assert result.err.endswith("\nhint: name the machine of process 0 as this one knows it\n")


@pytest.mark.parametrize("name", ["inference.py", "compare.py", "search.py", "train.py"])
def test_help_ignores_the_variables(name, folder, monkeypatch):
    set_variables(monkeypatch, WORLD_SIZE="two", RANK="one")
    assert run_process(name, "--help").code == 0


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": 2}, {"RANK": 1}, SRUN])
def test_what_only_prints_the_parameters_ignores_incomplete_variables(variables, train, monkeypatch):
    set_variables(monkeypatch, **variables)
    result = train("--print-config")
    assert (result.code, result.err) == (0, "")
    assert "max_iters: 5000" in result.out


def as_srun(rank: int) -> None:
    """Set the variables of srun in the place of torchrun's."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2"}
    os.environ |= {"SLURM_STEP_NUM_TASKS": "2"}


def test_processes_of_srun_train_to_the_end(folder):
    assert [faults.wait(pid) for pid in start(2, RUN, as_srun)] == [0, 0], output()
    assert f"continue  srun (as before) python train.py --resume {faults.only_run(Path())}" in output()


@pytest.mark.parametrize("ranks", [(0, 1), (1,)])  # SLURM signals every process, or some
def test_a_job_of_srun_that_gets_sigusr1_saves_and_resumes_to_the_same_bytes(folder, uninterrupted, ranks):
    def prepare(rank: int) -> None:
        as_srun(rank)
        if rank in ranks:
            at_step(5, lambda: os.kill(os.getpid(), signal.SIGUSR1))

    assert [faults.wait(pid) for pid in start(2, RUN, prepare)] == [128 + signal.SIGUSR1] * 2, output()
    assert faults.checkpoints(folder)[-1].stem == "step_000000006"
    command = f"srun (as before) python train.py --resume runs/{faults.only_run(folder).name}"
    assert f"stopped at step 6; continue with: {command}\n" in output()
    resumed = start(2, command.split()[-2:], as_srun)
    assert [faults.wait(pid) for pid in resumed] == [0, 0], output()
    check_same_end(folder, uninterrupted)


def test_a_port_that_is_in_use_is_said(folder):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        pids = start(1, RUN, lambda _: os.environ.update(WORLD_SIZE="2", MASTER_PORT=port))
        wait_for_all(pids)
    assert output() == (
        f"error: port {port} is in use\n"
        "hint: choose another MASTER_PORT (torchrun: --master_port), the same for all processes\n"
    )


@pytest.mark.parametrize(
    "device, message",
    [
        ("cuda:1", "--device cuda:1 is for one process, and there are 2"),
        ("mps", "--device mps is for one process, and there are 2"),
        ("xpu", "--device xpu is for one process, and there are 2"),
        ("cuda", "1 GPU is visible, too few for process 2 of this machine"),
    ],
)
def test_devices_that_processes_cannot_share(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Alg1Error, match=re.escape(message)):
        device_of_process(torch.device(device), Distributed(1, 1, 2))


def test_processes_share_the_cpu():
    assert device_of_process(torch.device("cpu"), Distributed(1, 1, 2)) == torch.device("cpu")


def test_an_error_of_the_program_is_no_lost_connection():
    for text in (
        "shape mismatch",
        "Connection of two layers: shapes differ",
        "NCCL is not built in",
        "Timed out",
        "[enforce fail at /x/gloo/gloo/transport/tcp/pair.cc:463] op.preamble.length <= op.nbytes. 8 vs 4",
    ):
        assert not is_lost_connection(RuntimeError(text))
    gloo = "/pytorch/third_party/gloo/gloo/transport/tcp"
    for text in (
        "[gloo/transport/tcp/pair.cc:553] Connection closed by peer",
        f"[{gloo}/pair.cc:525] Read error [127.0.0.1]:1: Connection reset by peer",
        f"[{gloo}/unbound_buffer.cc:81] Timed out waiting 1000ms for recv operation to complete",
        f"Gloo connectFullMesh failed with [{gloo}/pair.cc:144] no error",
    ):
        assert is_lost_connection(RuntimeError(text))
    assert is_lost_connection(torch.distributed.DistBackendError("NCCL error"))


def run_of(dist: Distributed) -> Run:
    """The run of a process that keeps nothing."""
    run = Run(None, dist)
    run.trainer = SimpleNamespace(out_of_time=False)
    return run


def test_a_signal_stops_every_process():
    class Other(Distributed):
        def all_reduce_max(self, value: int) -> int:
            return max(value, signal.SIGTERM)

    run = run_of(Other(0, 0, 2))
    assert run.stop_signal == 0
    assert run.stop_requested() and run.stop_signal == signal.SIGTERM
    assert not run_of(SINGLE_PROCESS).stop_requested()


def test_a_signal_that_comes_while_processes_agree_stops_them_next_time():
    class Slow(Distributed):
        def all_reduce_max(self, value: int) -> int:
            if not value:
                os.kill(os.getpid(), signal.SIGTERM)  # the others have not received one yet
            return value

    run = run_of(Slow(0, 0, 2))
    with run._signals:
        assert not run.stop_requested()
        assert run.stop_signal == 0
        assert run.stop_requested() and run.stop_signal == signal.SIGTERM


def test_a_single_process_has_a_parent_to_lose_only_where_a_search_says_so(monkeypatch):
    monkeypatch.delenv(launcher.PARENT, raising=False)
    monkeypatch.setattr(os, "getppid", lambda: 41)
    assert not Distributed().parent_died
    monkeypatch.setenv(launcher.PARENT, "41")
    trial = Distributed()
    assert not trial.parent_died
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert trial.parent_died and not Distributed(0, 0, 2).parent_died
    assert Distributed().parent_died  # the search was gone before this process looked
    assert run_of(Distributed()).stop_requested()


def test_a_job_that_lost_its_torchrun_stops():
    class Lost(Distributed):
        parent_died = True

        def all_reduce_max(self, value: int) -> int:
            return value

    run = run_of(Lost(0, 0, 2))
    assert run.stop_requested() and run.stop_signal == signal.SIGTERM
    assert not Distributed(0, 0, 2).parent_died


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_waits_for_another_can_be_ended(folder, rank):
    """Here the other one never comes: torchrun ends what is left with a signal."""
    port = str(free_port())

    def wait_for_ever() -> int:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2"}
        from utils_alg1.console.script import run_script

        def share() -> int:
            with Distributed(rank, rank, 2) as dist:
                dist.broadcast(None)
            return 0

        run_script(share)  # its handlers for signals would not be called while the wait lasts
        return 99

    pid = faults.start_child(wait_for_ever)
    time.sleep(1.5)
    os.kill(pid, signal.SIGTERM)
    wait_for_all([pid])


def test_gpus_share_the_work(folder):
    """The same run on two GPUs over NCCL; the losses are those of one process to rounding."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with torchrun(*RUN, "--device", "cuda", "--dtype", "float32", "--compile", "off") as job:
        text = job.communicate(timeout=120)[0]
        assert job.returncode == 0, text
    shared = faults.metrics(faults.only_run(folder))
    shutil.rmtree("runs")
    cpu = [*RUN, "--grad-accum-steps", "2"]
    assert faults.train_in_child(cpu) == 0, output()
    alone = faults.metrics(faults.only_run(folder))
    assert shared[-1]["loss/val"] == pytest.approx(alone[-1]["loss/val"], abs=0.05)
