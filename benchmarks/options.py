"""What each model option gains in the same number of steps: configs/fast with only some of its options.

    python benchmarks/options.py --data TEXT            some minutes; TEXT is tiny Shakespeare in the README

All runs have the steps, the learning rate and the seed of configs/fast. They take turns of a few steps; the
seconds are those of training alone, without evaluations and trackers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import PROJECT, machine, parser, table, text_or_docs, train_in_turns

RUNS: list[dict[str, Any]] = [
    {},
    {"zero_init": True},
    {"qk_norm": True},
    {"positions": "rotary"},
    {"positions": "rotary", "zero_init": True},
    {"positions": "rotary", "qk_norm": True},
    {"positions": "rotary", "qk_norm": True, "zero_init": True},
]
QUICK = {"n_embd": 16, "block_size": 8, "max_iters": 4, "warmup_iters": 1, "eval_iters": 1}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", metavar="PATH", help="a text (Python's documentation)")
    options.add_argument("--threads", type=int, default=1, metavar="N", help="of all runs (1)")
    arguments = options.parse_args()
    print(machine(), flush=True)
    from parameters import MODEL_OPTIONS
    from utils_alg1.utils_config_loader import ConfigLoader

    fast = ConfigLoader.load_configs(PROJECT / "configs" / "fast")
    size = {name: value for name, value in fast.items() if name not in MODEL_OPTIONS and name != "_comment"}
    size |= {"eval_iters": 480, "threads": arguments.threads, **(QUICK if arguments.quick else {})}
    with tempfile.TemporaryDirectory() as folder:
        text = text_or_docs(arguments.data, Path(folder))
        trained = train_in_turns(text, [size | chosen for chosen in RUNS])
    rows = []
    for chosen, reached in zip(RUNS, trained, strict=True):
        values = MODEL_OPTIONS | chosen
        shown = {name: {True: "yes", False: "-"}.get(value, value) for name, value in values.items()}
        rows.append({**shown, **reached})
    table(rows)


if __name__ == "__main__":
    main()
