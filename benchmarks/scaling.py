"""How cost grows: tokens a second and peak memory over width, block size, batch and corpus.

    python benchmarks/scaling.py            a table, and the picture benchmarks/scaling.png

One of them changes, the others stay at 128/4/4 T64 B12, float32 and a text of 1 MB; the width changes in
bfloat16 too, where the processor has it. Each point is measured in its own process, with the number of
threads that train.py chooses and the steps of its Trainer. The first step on a text includes writing its
token cache. The speed is that of the fastest step, which other load disturbs least.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from common import FOLDER, SIZES, child, machine, parser, table
from tokens import write_text

BASE = SIZES["128/4/4 T64 B12"]
MEGABYTES = 1
AXES = {
    "n_embd": [32, 64, 128, 256, 512, 768],
    "block_size": [16, 32, 64, 128, 256, 512],
    "batch_size": [1, 3, 12, 48, 96],
    "corpus, MB": [1, 10, 100, 1000],
}
QUICK = {"n_embd": [32, 64], "corpus, MB": [1]}
MEASURE = """
import json, pathlib
from common import Steps, build_trainer
text, values, seconds = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3])
began = time.perf_counter()
trainer = build_trainer(text, **values)
ready = time.perf_counter() - began
steps = Steps(trainer, 3)
steps()
times, end = [], time.perf_counter() + seconds
while not times or time.perf_counter() < end:
    began = time.perf_counter()
    steps.take()
    times.append(time.perf_counter() - began)
report(ready=ready, step=min(times), tokens=trainer.tokens_per_step,
       threads=trainer.runtime.threads)
"""


def main() -> None:
    import json

    from utils_alg1.training.arithmetic import BFLOAT16_FLAGS, Processor

    options = parser(__doc__)
    options.add_argument("--threads", type=int, default=0)
    options.add_argument("--seconds", type=float, default=3.0, help="of steps, per point and round")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument(
        "--bfloat16", action="store_true", help="measure it too where the processor is slow at it"
    )
    options.add_argument("--picture", type=Path, default=FOLDER / "scaling.png")
    args = options.parse_args()
    axes = QUICK if args.quick else AXES
    if args.quick:
        args.seconds, args.rounds, args.threads = 0.0, 1, 1
    print(machine(), flush=True)
    points = [(axis, "float32", value) for axis, values in axes.items() for value in values]
    if args.bfloat16 or Processor.read().flags & BFLOAT16_FLAGS:
        points += [("n_embd", "bfloat16", value) for value in axes["n_embd"]]
    else:
        print("no fast bfloat16 on this processor: left out (--bfloat16 measures it)", file=sys.stderr)
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {point: [] for point in points}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(args.rounds):  # not point by point: a slow minute would dent the curve
            for axis, dtype, value in points:
                megabytes = value if axis == "corpus, MB" else MEGABYTES
                text = folder / f"{megabytes}.txt"
                if not text.exists():
                    write_text(text, "ASCII", megabytes)
                changed = {} if axis == "corpus, MB" else {axis: value}
                values = json.dumps({**BASE, **changed, "dtype": dtype, "threads": args.threads})
                found[axis, dtype, value].append(child(MEASURE, text, values, args.seconds, folder=folder))
    rows = []
    for (axis, dtype, value), done in found.items():
        step = min(one["step"] for one in done)  # other load can only make it longer
        rows.append(
            {
                "what changes": axis,
                "dtype": dtype,
                "to": value,
                "threads": done[0]["threads"],
                "ms/step": 1e3 * step,
                "tok/s": done[0]["tokens"] / step,
                "peak memory, MB": max(one["peak"] for one in done) / 1e6,
                "seconds to the first step": done[0]["ready"],
            }
        )
    table(rows)
    draw(rows, args.picture)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw speed and memory over each axis, and save the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    axes = list(dict.fromkeys(row["what changes"] for row in rows))
    figure = Figure(figsize=(3 * len(axes), 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(axes), sharey="row", squeeze=False)
    for column, axis in enumerate(axes):
        curves: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["what changes"] == axis:
                curves.setdefault(row["dtype"], []).append(row)
        for line, name in enumerate(["tok/s", "peak memory, MB"]):
            panel = panels[line, column]
            for i, (dtype, own) in enumerate(curves.items()):
                x = [row["to"] for row in own]
                panel.plot(x, [row[name] for row in own], marker="o", color=f"C{line + 2 * i}", label=dtype)
            if len(curves) > 1:
                panel.legend()
            panel.set(xscale="log", yscale="log" if line == 0 else "linear", xlabel=axis)
            panel.set_xticks(x, [f"{value:,}" for value in x])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            if line == 0:
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter("{x:,.0f}")
            if column == 0:
                panel.set_ylabel(name)
    panels[1, 0].set_ylim(bottom=0)  # of the whole row, once all curves are there
    figure.savefig(path)


if __name__ == "__main__":
    main()
