"""The results of a search: table, pictures, and the best parameters as a file for train.py --config."""

from __future__ import annotations

import math
import shutil
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameters import format_settings, specs
from utils_alg1.base.errors import CANNOT_TRAIN, Alg1Error
from utils_alg1.base.files import write_atomically, write_or_warn
from utils_alg1.base.plotting import import_matplotlib
from utils_alg1.base.scripts import command
from utils_alg1.base.text import EVALUATION_NOTE, format_count, format_number, shell_join
from utils_alg1.console.command_line import Options
from utils_alg1.console.table import format_table, to_csv
from utils_alg1.search.space import Plan, shapes_training
from utils_alg1.utils_config_loader import ConfigLoader
from utils_alg1.utils_output import Console, ShellCommand

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes
    from optuna.trial import FrozenTrial

N_PRINTED_TRIALS = 10  # trials in the table on the console
PICTURES = ("history", "importance", "slice")
GONE = " (gone)"
GONE_NOTE = "(gone): this run was deleted, moved or renamed; the study has its loss"
MAX_TICKS = 5  # numbers at an axis that is as wide as those of slice.png


def finished_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that count, by number: not those that were queued again."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def best_of(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """Return the complete trial with the lowest loss; None if there is no complete trial."""
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    return min(complete, key=lambda trial: trial.values[0], default=None)


def rounded(parameters: dict[str, Any]) -> dict[str, Any]:
    """Round floats to 12 significant digits: 0.3, not 0.30000000000000004."""
    return {n: float(f"{v:.12g}") if isinstance(v, float) else v for n, v in parameters.items()}


def as_row(trial: FrozenTrial) -> dict[str, Any]:
    """Return the row of a trial in results.csv; the loss of a pruned trial is that of its best evaluation."""
    losses = trial.values or ()
    if trial.state.name != "COMPLETE":
        losses = (*losses, *trial.intermediate_values.values())
    return {
        "trial": trial.number,
        "state": trial.user_attrs.get("state", trial.state.name.lower()),
        "val_loss": min(losses, default=None),
        "last_step": trial.last_step,
        "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
        **rounded(trial.params),
        "run": trial.user_attrs.get("run"),
        "reason": trial.user_attrs.get("reason"),
    }


def show(value: Any) -> str:
    """Format a value for a line or a table on the console."""
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def show_loss(row: dict[str, Any]) -> str:
    """Format the loss of a row: marked "~" where it is that of an evaluation instead of the export."""
    is_evaluation = row["state"] != "complete" and row["val_loss"] is not None
    return "~ " * is_evaluation + format_number(row["val_loss"])


def show_run(row: dict[str, Any]) -> str | None:
    """Format the run of a row: marked where it is not there any more."""
    run: str | None = row["run"]
    return f"{run}{GONE}" if run and not Path(run).is_dir() else run


def describe_trial(study: optuna.Study, trial: FrozenTrial) -> str:
    """Return the line about a trial that has ended."""
    row, best = as_row(trial), best_of(finished_trials(study))
    line = f"trial {trial.number:3d}  {row['state']:8}  {show_loss(row):>8}  "
    line += "  ".join(f"{name}={show(row[name])}" for name in trial.params)
    line += f"  ({row['reason']})" if row["reason"] else ""
    return line + "  best" * (best is not None and best.number == trial.number)


def write_results(study: optuna.Study, plan: Plan, folder: Path, console: Console) -> None:
    """Print the results, and write them to the folder of the study.

    Raises:
        Alg1Error: no trial was completed (exit code 3), or a file could not be written (exit code 4).
    """
    trials = finished_trials(study)
    rows = [as_row(trial) for trial in trials]
    write_atomically(folder / "results.csv", to_csv(rows[0], rows).encode("utf-8", "surrogatepass"))
    best = best_of(trials)
    if best is None:
        hint = f"{folder / 'results.csv'} has every reason, {folder / 'trials'} what each trial printed"
        raise Alg1Error(f"no trial was completed; the last one: {rows[-1]['reason']}", hint, CANNOT_TRAIN)
    write_preset(folder / "best.yaml", study.study_name, plan, best)
    draw_pictures(study, plan, folder, console)

    headings = ["trial", "state", "val_loss", *plan.space, "run"]
    headings += ["reason"] if any(row["reason"] for row in rows) else []
    # The loss of an export does not compare with that of an evaluation, which may be low by luck.
    rows.sort(key=lambda row: (row["state"] != "complete", row["val_loss"] or math.inf))
    printed = [row | {"val_loss": show_loss(row), "run": show_run(row)} for row in rows[:N_PRINTED_TRIALS]]
    table = [[show(row[heading]) for heading in headings] for row in printed]
    notes = [EVALUATION_NOTE] if any(row["val_loss"].startswith("~") for row in printed) else []
    notes += [GONE_NOTE] if any(str(row["run"]).endswith(GONE) for row in printed) else []
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in ("", *format_table(headings, table, width), *notes, ""):
        console.say(line)
    counts = [f"{n} {state}" for state, n in sorted(Counter(row["state"] for row in rows).items())]
    lines = {
        "trials": f"{len(trials)} ({', '.join(counts)})",
        "best": f"trial {best.number}, val loss {best.values[0]:.4f}",
    }
    for trial in trials:
        if "defaults" in trial.user_attrs and trial.state == best.state:
            lines["defaults"] = f"trial {trial.number}, val loss {trial.values[0]:.4f}"
            lines["gained"] = f"{trial.values[0] - best.values[0]:.4f}"
    files = ["results.csv", *(f"{name}.png" for name in PICTURES)]
    lines["results"] = f"{folder}: {', '.join(name for name in files if (folder / name).exists())}"
    lines["runs"] = f"{plan.fixed['runs_dir']}/*_{study.study_name}-*"
    lines["next"] = next_command(folder / "best.yaml", plan)
    console.block(lines)


def next_command(preset: Path, plan: Plan) -> ShellCommand:
    """Return the command that trains with the best parameters, for as long as without a search.

    That is what the files say, whatever --max-iters the trials had; a preset's length has to be named, as
    the best parameters take the place of its folder.
    """
    words = ["--config", str(preset)]
    steps = ConfigLoader(Options(config=str(preset))).merge()[0].train.max_iters
    of_files = ConfigLoader(replace(plan.options, values={})).merge()[0].train.max_iters
    if "max_iters" not in plan.space and steps != of_files:
        words.append(f"--max-iters={of_files}")
        steps = of_files
    return ShellCommand(f"{command('train.py')} {shell_join(words)}", f"for {format_count(steps, 'step')}")


def write_preset(path: Path, study: str, plan: Plan, best: FrozenTrial) -> None:
    """Write the parameters of the best trial that shape the training.

    Its length, its evaluations and its trackers are not among them: they were those of a short trial.
    """
    about = f"The best of the study {study}: trial {best.number}, val loss {best.values[0]:.4f}"
    values = plan.fixed | rounded(best.params)
    names = [name for name in specs() if shapes_training(name) or name in plan.space]
    text = format_settings(path, about, {name: values[name] for name in names})
    write_atomically(path, text.encode("utf-8", "surrogatepass"))


def set_ticks(axes: Axes) -> None:
    """Label a logarithmic axis with plain numbers, at least two and so few that they do not overlap.

    A colour bar, which tells the numbers of the trials, has whole numbers.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    if axes.get_label() == "<colorbar>":
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_xscale() != "log":
        return
    low, high = axes.get_xlim()
    for steps in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        ticks = [step * 10.0**n for n in decades for step in steps]
        if len(ticks := [tick for tick in ticks if low <= tick <= high]) >= 2:
            break
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / MAX_TICKS) or 1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def draw_pictures(study: optuna.Study, plan: Plan, folder: Path, console: Console) -> None:
    """Draw the losses of the trials, how much each parameter matters, and the loss over each of them."""
    import_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    names = list(plan.space)
    pictures = {
        "history": lambda: plots.plot_optimization_history(study, target_name="val loss"),
        "importance": lambda: plots.plot_param_importances(study, params=names),
        "slice": lambda: plots.plot_slice(study, params=names, target_name="val loss"),
    }

    def draw(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as that all trials share a value
            pictures[path.stem]()
        if path.stem == "slice":
            pyplot.gcf().set_figwidth(3.8 * (len(names) + 1))  # wide enough for its labels
            for axes in pyplot.gcf().axes:
                set_ticks(axes)
        pyplot.savefig(path, bbox_inches="tight")

    complete = [trial for trial in finished_trials(study) if trial.state.name == "COMPLETE"]
    losses = {trial.values[0] for trial in complete}
    if len(losses) <= len(names):  # any parameter could explain them
        del pictures["importance"]
        (folder / "importance.png").unlink(missing_ok=True)
        found = f"{len(losses)} for {format_count(len(names), 'parameter')}"
        console.say(f"importance.png is left out: too few trials with different losses, {found}")
    for name in pictures:
        write_or_warn(folder / f"{name}.png", draw, console.warn)
        pyplot.close("all")
