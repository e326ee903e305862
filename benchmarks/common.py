"""What the benchmarks share: fair turns, tables, peers from a checkout, children that tell what they took."""

from __future__ import annotations

import argparse
import contextlib
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
    """Call all in turn, `rounds` times, every second time backwards: the seconds of each call.

    On a shared machine only what ran side by side can be compared, so that a slow minute hits all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds):
        for name in list(functions)[:: -1 if i % 2 else 1]:
            began = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """The median over the rounds of how many times longer the first took."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows that name their columns, as Markdown; None is what was not measured."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print(f"| {' | '.join(cells)} |", flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def load(path: Path | str, name: str) -> ModuleType:
    """A module of a peer's checkout, by its file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# --- command lines ------------------------------------------------------------------------------------


def parser(documentation: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark; its docstring is its manual."""
    made = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="a few seconds: whether it works, no figures")
    return made


def machine() -> str:
    """One line on where and when figures were measured."""
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
    """A copy of the named text, or Python's documentation, in `folder`, where its cache is made too."""
    from utils_alg1.data.sources import find_corpus

    if path is not None:
        return Path(shutil.copyfile(path, folder / "text.txt")).resolve()
    with contextlib.chdir(folder):
        return find_corpus("python-docs", say=lambda _: None).resolve()


# --- ALG1 in this process -----------------------------------------------------------------------------


def build_trainer(text: Path, **values: Any) -> Any:
    """The Trainer that `train.py` would make, with flags by their parameter's name."""
    import train
    from utils_alg1.data.corpus import open_corpus
    from utils_alg1.run.job import Job
    from utils_alg1.run.start import Start
    from utils_alg1.training.distributed import SINGLE_PROCESS
    from utils_alg1.training.runtime import start_runtime
    from utils_alg1.utils_output import Console

    params = parameters(text, **values)
    runtime = start_runtime(params.train, params.flops_per_step())
    corpus = open_corpus(text)
    job = Job(params, Start(), {}, False, text, corpus.sha256, corpus, runtime)
    return train.build_trainer(job, SINGLE_PROCESS, Console(quiet=True))


def parameters(text: Path, **values: Any) -> Any:
    """The parameters of a run on a text; the working folder's configuration files are left aside."""
    from parameters import Parameters

    return Parameters.from_values({"data_path": str(text), **values}, {}, [])


class Steps:
    """Takes training steps; every call takes as many, and reads the loss of each as the loop does."""

    def __init__(self, trainer: Any, count: int):
        self.trainer = trainer
        self.count = count

    @property
    def step(self) -> int:
        return self.trainer.step

    def __call__(self) -> None:
        for _ in range(self.count):
            self.take()

    def take(self) -> float:
        loss = self.trainer.forward_backward()
        self.trainer.optimizer_step()
        return loss


TURN = 25  # steps


def train_in_turns(text: Path, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Train runs of these settings to their ends, in turns: what each reached, as the end of a table's row.

    Seconds count training only: no evaluations, no trackers.
    """
    steps = [Steps(build_trainer(text, **settings), 1) for settings in runs]
    seconds = [0.0] * len(runs)
    while any(run.step < settings["max_iters"] for run, settings in zip(steps, runs, strict=True)):
        for i, (run, settings) in enumerate(zip(steps, runs, strict=True)):
            began = time.perf_counter()
            for _ in range(min(TURN, settings["max_iters"] - run.step)):
                run.take()
            seconds[i] += time.perf_counter() - began
    return [
        {
            "steps": run.step,
            "val loss": f"{run.trainer.evaluate().val_loss:.3f}",
            "seconds": taken,
            "ms/step": 1000 * taken / run.step,
        }
        for run, taken in zip(steps, seconds, strict=True)
    ]


# --- children -----------------------------------------------------------------------------------------


def peak_memory() -> int:
    """The most bytes that this process has held at once."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):  # not ru_maxrss, in which a child begins with its parent's
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def child(code: str, *arguments: object, folder: Path) -> dict[str, Any]:
    """Run Python code in a process of its own: what it gave to `report`, and its peak memory.

    Args:
        arguments: its sys.argv[1:].
        folder: where it works.
    """
    preamble = "import sys, time; from common import report\n"
    done = run([sys.executable, "-c", preamble + code, *map(str, arguments)], folder)
    return json.loads(done.splitlines()[-1])


def report(**values: Any) -> None:
    """What a child tells its parent: the last line that it prints."""
    print(json.dumps({"peak": peak_memory(), **values}), flush=True)


def run(command: Sequence[str], folder: Path) -> str:
    """Run a program to its end, and to that of all that it has started: what it printed.

    Raises:
        SystemExit: it failed, with what it said.
    """
    with start(command, folder) as program:
        return finish(program)


def start(command: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """Start a program that finds the project's modules; `finish` ends it."""
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
    """Wait for a program and all that it has started; as `run`."""
    out, err = program.communicate()
    if program.returncode:
        raise SystemExit(f"{shlex.join(program.args)[:300]}\n{out[-2000:]}{err[-4000:]}")  # type: ignore[arg-type]
    return out


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Peers print while they build."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
