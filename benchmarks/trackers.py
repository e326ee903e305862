"""What tracking costs: steps with Aim and TensorBoard on, every step tracked, against both off.

    python benchmarks/trackers.py

Both take turns in one process, with train.py's own Trainer, Observer and trackers. Every step's loss and
gradient norm are tracked; what is drawn at intervals (histograms, attention, samples) is drawn as often as by
default. After each turn the trackers may catch up, outside of the time: how long that took is a column.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import SIZES, Steps, build_trainer, interleave, machine, parameters, parser, table, text_or_docs


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", help="a text; Python's documentation where left out")
    options.add_argument("--steps", type=int, default=25, help="in a turn")
    options.add_argument("--rounds", type=int, default=60)
    options.add_argument("--threads", type=int, default=0, help="0: train.py's choice")
    args = options.parse_args()
    if args.quick:
        args.steps, args.rounds = 4, 2
    args.data = args.data and Path(args.data).resolve()
    print(machine(), flush=True)
    rows = []
    for name in list(SIZES)[: 1 if args.quick else 2]:
        # Aim opens its repository in the working folder.
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            rows.append(measure(name, args, Path(folder)))
    table(rows)


def measure(name: str, args: Any, folder: Path) -> dict[str, Any]:
    text = text_or_docs(args.data, folder)
    with contextlib.ExitStack() as stack:
        off = Tracked(text, folder, name, args, stack, on=False)
        on = Tracked(text, folder, name, args, stack, on=True)
        for warm_up in (off, on):
            warm_up()
        on.late.clear()
        seconds = interleave({"off": off, "on": on}, args.rounds)
        # What the trackers had left to do came after the steps.
        steps_on = [all_ - late for all_, late in zip(seconds["on"], on.late, strict=True)]
        extra = [a / b - 1 for a, b in zip(steps_on, seconds["off"], strict=True)]
        return {
            "size": name,
            "threads": off.steps.trainer.runtime.threads,
            "off, ms/step": 1e3 * statistics.median(seconds["off"]) / args.steps,
            "on, ms/step": 1e3 * statistics.median(steps_on) / args.steps,
            "on costs, median": f"{statistics.median(extra):+.1%}",
            "in all": f"{sum(steps_on) / sum(seconds['off']) - 1:+.1%}",
            "middle half": "{0:+.1%} to {2:+.1%}".format(*statistics.quantiles(extra, n=4)),
            "then behind, ms/step": 1e3 * statistics.median(on.late) / args.steps,
            "still on": ", ".join(on.trackers.working_names) or "none",
        }


class Tracked:
    """Steps of a run of train.py, told to its trackers as its loop does it."""

    def __init__(self, text: Path, folder: Path, name: str, args: Any, stack: contextlib.ExitStack, on: bool):
        from utils_alg1.tracking.observer import Observer
        from utils_alg1.tracking.trackers import start_trackers
        from utils_alg1.utils_run_manager import create_run

        size = {**SIZES[name], "threads": args.threads}
        params = parameters(text, **size, aim=on, tensorboard=on, gradient_norm_interval=1)
        run = create_run(folder / "runs")
        self.trackers = stack.enter_context(start_trackers(run, params, params.flat(), {}, print))
        self.steps = Steps(build_trainer(text, **size), args.steps)
        self.observer = Observer(self.steps.trainer, self.trackers, params.tensorboard, print)
        self.count = args.steps
        self.late: list[float] = []

    def __call__(self) -> None:
        trainer = self.steps.trainer
        for _ in range(self.count):
            step = trainer.step
            self.observer.log_model(step)
            loss = trainer.forward_backward()
            self.observer.log_step(loss, step)
            trainer.optimizer_step()
        began = time.perf_counter()
        for tracker in self.trackers.background.values():
            tracker.ready.wait()
            tracker.start_flush(trainer.step)
        for tracker in self.trackers.background.values():
            tracker.ready.wait()
        self.late.append(time.perf_counter() - began)


if __name__ == "__main__":
    main()
