"""Validation loss and training time of AdamW and Muon on 128/4/4 T64 B12.

    python benchmarks/optimizers.py --data TEXT         some minutes; TEXT is tiny Shakespeare in the README

The learning rates are the best of those tried, on the same text and seed. The runs take turns of a few steps;
the seconds are those of training alone, without evaluations and trackers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import SIZES, machine, parser, table, text_or_docs, train_in_turns

RUNS: list[dict[str, Any]] = [
    {"optimizer": "adamw", "learning_rate": 4e-3, "max_iters": 500, "warmup_iters": 100},
    {"optimizer": "adamw", "learning_rate": 4e-3, "max_iters": 1200, "warmup_iters": 100},
    {"optimizer": "muon", "learning_rate": 1e-2, "max_iters": 500, "warmup_iters": 50},
]
COMMON = {"lr_schedule": "linear", "beta2": 0.99, "weight_decay": 0.1, "eval_iters": 240}


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
        short = {"max_iters": 4, "warmup_iters": 1, "eval_iters": 1} if arguments.quick else {}
        runs = [{**size, **COMMON, **values, **short, "threads": arguments.threads} for values in RUNS]
        rows = [
            {
                "optimizer": settings["optimizer"],
                "learning rate": f"{settings['learning_rate']:g}",
                **trained,
            }
            for settings, trained in zip(runs, train_in_turns(text, runs), strict=True)
        ]
    table(rows)


if __name__ == "__main__":
    main()
