"""Draw docs/learning_rates.png: every schedule over a run of 1,000 steps.

python docs/draw_learning_rates.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from parameters import TrainConfig, specs  # noqa: E402
from utils_alg1.training.schedule import learning_rate  # noqa: E402

STEPS = 1000
WARMUP = 200
PEAK, FLOOR = 1e-3, 5e-5


def main() -> None:
    figure = Figure(figsize=(10, 2.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    schedules = specs()["lr_schedule"].choices
    for axes, schedule in zip(figure.subplots(1, len(schedules), sharey=True), schedules, strict=True):
        config = TrainConfig(
            max_iters=STEPS, warmup_iters=WARMUP, learning_rate=PEAK, min_lr=FLOOR, lr_schedule=schedule
        )
        axes.plot([learning_rate(config, step) for step in range(STEPS)])
        axes.axhline(FLOOR, color="0.7", linewidth=0.8, linestyle="--")
        axes.set(title=schedule, xlabel="step", ylim=(0, PEAK * 1.08), xticks=[0, WARMUP, STEPS])
        axes.set_yticks([0, FLOOR, PEAK], ["0", "min_lr", "learning_rate"])
    figure.savefig(FOLDER / "learning_rates.png")


if __name__ == "__main__":
    main()
