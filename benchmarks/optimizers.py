"""What each optimizer reaches in a run, and in what time: AdamW and Muon on 128/4/4 T64 B12.

    python benchmarks/optimizers.py --data TEXT         some minutes; TEXT is tiny Shakespeare in the README

The learning rates are the best of those tried, on the same text and seed. The runs take turns of some steps,
and seconds count training only: no evaluations, no trackers.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from common import SIZES, Steps, build_trainer, machine, parser, table, text_or_docs

RUNS: list[dict[str, Any]] = [
    {"optimizer": "adamw", "learning_rate": 4e-3, "max_iters": 500, "warmup_iters": 100},
    {"optimizer": "adamw", "learning_rate": 4e-3, "max_iters": 1200, "warmup_iters": 100},
    {"optimizer": "muon", "learning_rate": 1e-2, "max_iters": 500, "warmup_iters": 50},
]
COMMON = {"lr_schedule": "linear", "beta2": 0.99, "weight_decay": 0.1, "eval_iters": 80}
TURN = 25  # steps


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", metavar="PATH", help="a text (Python's documentation)")
    options.add_argument("--threads", type=int, default=1, metavar="N", help="of all runs (1)")
    arguments = options.parse_args()
    size = SIZES["128/4/4 T64 B12"]
    if arguments.quick:
        size = size | {"n_embd": 16, "block_size": 8}
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        text = text_or_docs(arguments.data, Path(folder))
        runs: list[tuple[dict[str, Any], Steps]] = []
        for values in RUNS:
            short = {"max_iters": 4, "warmup_iters": 1, "eval_iters": 1} if arguments.quick else {}
            settings = {**size, **COMMON, **values, **short, "threads": arguments.threads}
            runs.append((settings, Steps(build_trainer(text, **settings), 1)))
        seconds = [0.0] * len(runs)
        while any(steps.step < settings["max_iters"] for settings, steps in runs):
            for i, (settings, steps) in enumerate(runs):
                began = time.perf_counter()
                for _ in range(min(TURN, settings["max_iters"] - steps.step)):
                    steps.take()
                seconds[i] += time.perf_counter() - began
        rows = []
        for (settings, steps), taken in zip(runs, seconds, strict=True):
            evaluation = steps.trainer.evaluate(steps.step)
            rows.append(
                {
                    "optimizer": settings["optimizer"],
                    "learning rate": f"{settings['learning_rate']:g}",
                    "steps": steps.step,
                    "val loss": f"{evaluation.val_loss:.3f}",
                    "seconds": taken,
                    "ms/step": 1000 * taken / steps.step,
                }
            )
        table(rows)


if __name__ == "__main__":
    main()
