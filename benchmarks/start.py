"""Start-up time: of --help, until a text begins, and until the first step of a run, beside importing torch.

    python benchmarks/start.py

Every turn starts a new process. The first step is that of a run with the default settings, trackers included,
on a text whose tokens are cached; before it the loop evaluates once and saves a checkpoint. After each turn
the tracker processes may finish, which is not timed. The text is drawn from a run with the default model, on
the CPU, in a folder with the project's configs/.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import PROJECT, finish, interleave, machine, parser, ratio, start, table, text_or_docs

# Exits as soon as the first step is taken.
UNTIL_FIRST_STEP = """
import os
import train

def train_one_step(trainer, run):
    optimizer_step = trainer.optimizer_step
    def step_and_exit():
        optimizer_step()
        os._exit(0)
    trainer.optimizer_step = step_and_exit
    train_all(trainer, run)

train_all, train.train = train.train, train_one_step
train.run_script(train.main)
"""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", help="a text (default: Python's documentation)")
    options.add_argument("--rounds", type=int, default=9)
    args = options.parse_args()
    if args.quick:
        args.rounds = 1
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = str(text_or_docs(args.data, folder))
        sampled = folder_to_sample(folder / "sampled")
        first_step = [sys.executable, "-c", UNTIL_FIRST_STEP, "--data", text]
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "python -c 'import torch'": [sys.executable, "-c", "import torch"],
            "train.py --help": [sys.executable, str(PROJECT / "train.py"), "--help"],
            "inference.py --help": [sys.executable, str(PROJECT / "inference.py"), "--help"],
            "first step": first_step,
            "first step, no trackers": [*first_step, "--no-aim", "--no-tensorboard"],
            "first step, no trackers, one batch to evaluate": [
                *first_step,
                *["--no-aim", "--no-tensorboard", "--eval-iters", "1"],
            ],
        }

        if args.quick:
            commands = dict(list(commands.items())[1::2])

        turns = {name: Turn(command, folder) for name, command in commands.items()}
        first_character = [sys.executable, str(PROJECT / "inference.py"), "--device", "cpu"]
        turns["first character of inference.py"] = Turn(
            [*first_character, "--max-new-tokens", "1"], sampled, until_output=True
        )
        if not args.quick:
            for turn in turns.values():
                turn()  # warm the file cache and the token cache
                turn.seconds.clear()
        interleave(turns, args.rounds)
        seconds = {name: turn.seconds for name, turn in turns.items()}
    torch_alone = seconds["python -c 'import torch'"]
    table(
        [
            {
                "until": name,
                "seconds, median": statistics.median(times),
                "lowest": min(times),
                "x importing torch": ratio(times, torch_alone),
            }
            for name, times in seconds.items()
        ]
    )


def folder_to_sample(folder: Path) -> Path:
    """Create a folder with the project's configs/ and a run of the default model."""
    from model import BigramLanguageModel
    from parameters import ModelConfig
    from utils_alg1.run_directory import RunFolder

    shutil.copytree(PROJECT / "configs", folder / "configs")
    model = BigramLanguageModel(ModelConfig(vocab_size=65))
    model.vocabulary = [chr(ord(" ") + token) for token in range(65)]
    export = RunFolder(folder / "runs" / "2026-01-31_001").export_path
    export.parent.mkdir(parents=True)
    model.save_safetensors(export)
    return folder


class Turn:
    """Runs a program; `seconds` are the times until it exits, though processes it started may still run.

    Args:
        until_output: the times end at the first character of its output, and its runs are kept.
    """

    def __init__(self, command: list[str], folder: Path, until_output: bool = False):
        self.command, self.folder, self.until_output = command, folder, until_output
        self.seconds: list[float] = []

    def __call__(self) -> None:
        began = time.perf_counter()
        with start(self.command, self.folder) as program:
            if self.until_output:
                assert program.stdout is not None
                program.stdout.read(1)
            else:
                program.wait()
            self.seconds.append(time.perf_counter() - began)
            finish(program)  # the processes that it started keep its output open
        if not self.until_output:
            shutil.rmtree(self.folder / "runs", ignore_errors=True)


if __name__ == "__main__":
    main()
