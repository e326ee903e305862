"""Shared by the benchmarks: interleaved timing, tables, peers from a checkout, measured child processes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent
sys.path.insert(0, str(PROJECT))

# Sizes as in the README: n_embd/n_head/n_layer, T = block_size, B = batch_size.
SIZES = {
    "64/4/4 T32 B4": {"n_embd": 64, "n_head": 4, "n_layer": 4, "block_size": 32, "batch_size": 4},
    "128/4/4 T64 B12": {"n_embd": 128, "n_head": 4, "n_layer": 4, "block_size": 64, "batch_size": 12},
    "384/6/6 T256 B8": {"n_embd": 384, "n_head": 6, "n_layer": 6, "block_size": 256, "batch_size": 8},
}


def interleave(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Call each function once a round, in reverse order every second round; returns the seconds of each call.

    Only timings taken side by side are comparable: a slow minute of the machine then hits all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds):
        for name in list(functions)[:: -1 if i % 2 else 1]:
            began = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def seconds_per_step(
    functions: Mapping[str, Callable[[int], Any]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Time functions that take so many steps, in turns of about `seconds`; returns a step's in each turn.

    Each function is warmed up: its first steps are slower.
    """
    counts = {}
    for name, take in functions.items():
        take(3)
        began = time.perf_counter()
        take(1)
        counts[name] = max(1, round(seconds / (time.perf_counter() - began)))
    turns = {name: functools.partial(take, counts[name]) for name, take in functions.items()}
    return {
        name: [turn / counts[name] for turn in times] for name, times in interleave(turns, rounds).items()
    }


def repeat(step: Callable[[], Any]) -> Callable[[int], None]:
    """Return a function that takes so many steps."""

    def take(count: int) -> None:
        for _ in range(count):
            step()

    return take


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Return how many times longer `slower` took than `faster`: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows (column name -> value) as a Markdown table; None or a missing value is shown as "-"."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print(f"| {' | '.join(cells)} |", flush=True)


def cell(value: Any) -> str:
    """Format a value for a table."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def load(path: Path | str, name: str) -> ModuleType:
    """Import a module of a peer's checkout by its file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


# --- command lines ------------------------------------------------------------------------------------


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark; the benchmark's docstring is its help."""
    made = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--quick", action="store_true", help="a run of a few seconds that only shows that the benchmark works"
    )
    return made


def machine() -> str:
    """Return one line on when and where the figures are measured: processor, load, versions."""
    import numpy
    import torch

    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":")[1].strip()
    load_now = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}"
    return f"{time.strftime('%Y-%m-%d %H:%M')}, {model}, {os.cpu_count()} cores{load_now}; {versions}"


def text_or_docs(path: str | None, folder: Path) -> Path:
    """Copy a text, or Python's documentation if None, to `folder`, where its token cache is written."""
    from utils_alg1.data.sources import find_text

    if path is not None:
        return Path(shutil.copyfile(path, folder / "text.txt")).resolve()
    with contextlib.chdir(folder):
        return find_text("python-docs", say=lambda _: None).paths[0].resolve()


# --- ALG1 in this process -----------------------------------------------------------------------------


def build_trainer(text: Path, **values: Any) -> Any:
    """Return the Trainer that train.py would build for these parameters; compiled, if they ask for it.

    Args:
        values: parameters, and fields of Arithmetic that are no parameters.
    """
    import train
    from utils_alg1.data.corpus import open_corpus
    from utils_alg1.run.job import Job
    from utils_alg1.training.runtime import start_runtime
    from utils_alg1.utils_output import Console

    names = ("gradient", "products", "joined", "muon")
    changes = {name: values.pop(name) for name in names if name in values}
    params = parameters(text, **values)
    corpus = open_corpus(text)
    runtime = start_runtime(params)
    runtime = dataclasses.replace(runtime, arithmetic=dataclasses.replace(runtime.arithmetic, **changes))
    job = Job(params, corpus, runtime)
    trainer = train.build_trainer(job, Console(quiet=True))
    if runtime.arithmetic.compiled:
        Steps(trainer, 1)()
        if not trainer.backward.arithmetic.compiled:  # a run goes on without it, a figure would be wrong
            raise SystemExit("torch.compile does not work here")
    return trainer


def parameters(text: Path, **values: Any) -> Any:
    """Return the parameters of a run on a text, without the configuration files of the working folder."""
    from parameters import Parameters

    return Parameters.from_values({"data_path": str(text), **values}, {})


class Steps:
    """Takes `count` training steps per call, and reads the loss of each as the training loop does."""

    def __init__(self, trainer: Any, count: int):
        self.trainer = trainer
        self.count = count

    def __call__(self) -> None:
        for _ in range(self.count):
            self.take()

    def take(self) -> float:
        loss = self.trainer.forward_backward()
        self.trainer.optimizer_step()
        return loss


TURN = 25  # steps of a run before the next one's turn


def train_in_turns(text: Path, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Train runs with these settings to their ends, in turns; returns the results of each as table cells.

    The seconds are those of training alone, without evaluations and trackers.
    """
    trainers = [build_trainer(text, **settings) for settings in runs]
    seconds = [0.0] * len(runs)
    while not all(trainer.finished for trainer in trainers):
        for i, trainer in enumerate(trainers):
            count = min(TURN, trainer.config.max_iters - trainer.step)
            began = time.perf_counter()
            Steps(trainer, count)()
            seconds[i] += time.perf_counter() - began
    return [
        {
            "steps": trainer.step,
            "val loss": f"{trainer.evaluate().val_loss:.3f}",
            "seconds": taken,
            "ms/step": 1000 * taken / trainer.step,
        }
        for trainer, taken in zip(trainers, seconds, strict=True)
    ]


# --- children -----------------------------------------------------------------------------------------


def peak_memory() -> int:
    """Return this process's peak resident memory in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):  # not ru_maxrss, which a child inherits from its parent
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def child(code: str, *arguments: object, folder: Path) -> dict[str, Any]:
    """Run Python code in a child process; returns the values it gave to `report`, and "peak", its memory.

    Args:
        arguments: the child's sys.argv[1:].
        folder: the child's working directory.
    """
    preamble = "import sys, time; from common import report\n"
    done = run([sys.executable, "-c", preamble + code, *map(str, arguments)], folder)
    return json.loads(done.splitlines()[-1])


def report(**values: Any) -> None:
    """Print values for the parent, as the last line of a child's output."""
    print(json.dumps({"peak": peak_memory(), **values}), flush=True)


def run(command: Sequence[str], folder: Path) -> str:
    """Run a program, wait for it and for all processes that it started; returns its standard output.

    Raises:
        SystemExit: it failed; the message holds its output.
    """
    with start(command, folder) as program:
        return finish(program)


def start(command: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """Start a program that can import the project's modules; wait for it with `finish`."""
    paths = os.pathsep.join([str(FOLDER), str(PROJECT)])
    return subprocess.Popen(
        list(command),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def finish(program: subprocess.Popen[str]) -> str:
    """Wait for a started program and all processes that it started; see `run`."""
    out, err = program.communicate()
    if program.returncode:
        raise SystemExit(f"{shlex.join(program.args)[:300]}\n{out[-2000:]}{err[-4000:]}")  # type: ignore[arg-type]
    return out


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppress standard output: the peers print while they build their models."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
