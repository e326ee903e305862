"""The cost of a checkpoint to the training loop, in steps.

    python benchmarks/checkpoint.py

Turns of steps with a checkpoint before the first alternate with turns without. The difference is the time for
which the loop waits, and what the writing thread takes from the steps that run meanwhile. "The call" is the
time of the call of `save` alone.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import SIZES, Steps, build_trainer, interleave, machine, parser, table, text_or_docs


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", help="a text (default: Python's documentation)")
    options.add_argument("--steps", type=int, default=8, help="in a turn")
    options.add_argument("--rounds", type=int, default=40)
    options.add_argument("--threads", type=int, default=0, help="0: train.py's choice")
    args = options.parse_args()
    if args.quick:
        args.steps, args.rounds = 2, 2
    print(machine(), flush=True)
    rows = []
    for name in list(SIZES)[: 1 if args.quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, args, Path(folder)))
    table(rows)


def measure(name: str, args: Any, folder: Path) -> dict[str, Any]:
    """Return the row of one size."""
    from utils_alg1.training.checkpoint import CheckpointMetadata, CheckpointStore

    count = args.steps
    rounds = args.rounds if SIZES[name]["n_embd"] < 200 else max(2, args.rounds // 8)  # seconds a step
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    trainer = build_trainer(text_or_docs(args.data, folder), **SIZES[name], threads=args.threads)
    steps = Steps(trainer, count)
    store = CheckpointStore(checkpoints, keep=2)
    about: CheckpointMetadata = {
        "run_id": "benchmark",
        "parameters": {},
        "origins": {},
        "corpus_sha256": "",
        "trackers": {},
    }
    calls = []

    def save() -> None:
        began = time.perf_counter()
        store.save(trainer, about)
        calls.append(time.perf_counter() - began)

    def with_checkpoint() -> None:
        save()
        steps()

    for warm_up in (steps, with_checkpoint):
        warm_up()
    calls.clear()
    with store:
        seconds = interleave({"without": steps, "with": with_checkpoint}, rounds)
    step = statistics.median(seconds["without"]) / count
    waits = [a - b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    (newest, *_) = sorted(checkpoints.glob("*.safetensors"), reverse=True)
    return {
        "size": name,
        "threads": trainer.runtime.threads,
        "file, MB": newest.stat().st_size / 1e6,
        "ms/step": 1e3 * step,
        "the call, ms": 1e3 * statistics.median(calls),
        "the loop waits, ms": 1e3 * statistics.median(waits),
        "in steps": statistics.median(waits) / step,
        "the call, in steps": statistics.median(calls) / step,
    }


if __name__ == "__main__":
    main()
