"""The results of a search: tables, plots, and the best parameters as a preset."""

from __future__ import annotations

import io
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameters import CONFIG_FILES, format_settings, specs
from utils_alg1.base.errors import CANNOT_TRAIN, Alg1Error, first_line
from utils_alg1.base.files import make_folder, read_json_object, write_atomically
from utils_alg1.console.table import format_table, to_csv
from utils_alg1.run_directory import RunFolder
from utils_alg1.search.space import RESERVED_PARAMETERS
from utils_alg1.search.study import (
    Study,
    best_of,
    format_loss_of,
    format_value,
    lowest_loss,
    parameters_of,
    state_of,
)
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    import optuna

N_PRINTED_TRIALS = 10  # trials in the table on the console


def write_results(study: Study, console: Console) -> None:
    """Write the tables, the preset and the plots to the folder of the study.

    Raises:
        Alg1Error: a file could not be written (exit code 4).
    """
    write_csv(study)
    write_markdown(study)
    write_preset(study)
    draw_pictures(study, console)


# --- tables -------------------------------------------------------------------------------------------


def ranked(study: Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that have ended: the complete ones sorted by loss, then the others."""
    order = {"complete": 0, "pruned": 1, "refused": 2, "failed": 3}

    def key(trial: optuna.trial.FrozenTrial) -> tuple[int, float, int]:
        loss = lowest_loss(trial)
        return order[state_of(trial)], float("inf") if loss is None else loss, trial.number

    return sorted(study.finished(), key=key)


def table_row(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Return the row of a trial in results.csv."""
    return {
        "trial": trial.number,
        "state": state_of(trial),
        "best_val_loss": lowest_loss(trial),
        "last_step": trial.last_step,
        "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
        **parameters_of(trial),
        "run": trial.user_attrs.get("run"),
        "reason": trial.user_attrs.get("reason"),
    }


def write_csv(study: Study) -> None:
    """Write results.csv: all finished trials, sorted by number."""
    rows = [table_row(trial) for trial in sorted(study.finished(), key=lambda trial: trial.number)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_atomically(study.folder / "results.csv", to_csv(names, rows).encode("utf-8", "surrogatepass"))


def table(study: Study, trials: list[optuna.trial.FrozenTrial]) -> list[list[str]]:
    """Return a table of trials as rows of cells; the first row contains the headings."""
    names = list(study.plan.space)
    cells = [["trial", "state", "val loss", *names, "run, or what went wrong"]]
    for trial in trials:
        values = parameters_of(trial)
        run = trial.user_attrs.get("run")
        remark = trial.user_attrs.get("reason") or (Path(run).name if run else "")
        if trial.user_attrs.get("defaults"):
            remark = f"{remark} (the defaults)"
        parameters = [format_value(values[name]) if name in values else "" for name in names]
        cells.append([str(trial.number), state_of(trial), format_loss_of(trial), *parameters, remark])
    return cells


def write_markdown(study: Study) -> None:
    """Write results.md: a summary, and all finished trials, the best first."""
    head, *rows = table(study, ranked(study))
    lines = [f"# Search {study.settings.name}", ""]
    lines += [f"- {name}: {value}" for name, value in describe_search(study).items()]
    lines += ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    text = "\n".join(lines) + "\n"
    write_atomically(study.folder / "results.md", text.encode("utf-8", "surrogatepass"))


def show_table(study: Study, console: Console) -> None:
    """Print a table of the best trials."""
    headings, *rows = table(study, ranked(study)[:N_PRINTED_TRIALS])
    lines = format_table(headings, rows)
    for line in ("", *lines, ""):
        console.say(line)


def describe_search(study: Study) -> dict[str, str]:
    """Return the number of trials in each state, the best loss and its improvement over the defaults."""
    finished = study.finished()
    states = [state_of(trial) for trial in finished]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states))]
    lines = {"trials": f"{len(finished)} ({', '.join(counts)})"}
    best = best_of(finished)
    if best is None:
        return lines
    lines["best"] = f"trial {best.number}, val loss {best.value:.4f}"
    defaults = next((trial for trial in finished if trial.user_attrs.get("defaults")), None)
    if defaults and defaults.state.name == "COMPLETE":
        assert defaults.value is not None and best.value is not None  # both are complete
        lines["defaults"] = f"trial {defaults.number}, val loss {defaults.value:.4f}"
        lines["gained"] = f"{defaults.value - best.value:.4f}"
    elif defaults:
        lines["defaults"] = f"trial {defaults.number}, {state_of(defaults)}"
    return lines


def describe_start(study: Study, space_file: str, n_workers: int) -> dict[str, str]:
    """Return the lines printed at the start of a search."""
    n_finished = len(study.finished())
    return {
        "study": str(study.folder),
        "space": f"{space_file}: {', '.join(study.plan.space)}",
        "trials": f"{study.n_trials}" + (f", {n_finished} of them finished" if n_finished else ""),
        "how": f"{study.settings.sampler}, {n_workers} at a time",
    }


def describe_end(study: Study) -> dict[str, str]:
    """Return the lines printed at the end of a search: its results, its files and the next command.

    Raises:
        Alg1Error: there is no complete trial.
    """
    lines = describe_search(study)
    if "best" not in lines:
        table_path = study.folder / "results.csv"
        raise Alg1Error("no trial was completed", f"{table_path} says why", CANNOT_TRAIN)
    lines["results"] = f"{study.folder}: results.csv, results.md, history.png, importance.png, slice.png"
    lines["runs"] = f"{study.plan.fixed['runs_dir']}/*_{study.settings.name}-*"
    lines["next"] = f"python train.py --config {shlex.quote(str(study.folder / 'best'))}"
    return lines


# --- the preset ---------------------------------------------------------------------------------------


def write_preset(study: Study) -> None:
    """Write best/: a preset with every parameter of the best trial but its run_tag and output."""
    best = best_of(study.finished())
    if best is None:
        return
    values = study.plan.fixed | parameters_of(best) | recorded_threads(best)
    folder = study.folder / "best"
    make_folder(folder)
    about = f"Best of the search {study.settings.name}: trial {best.number}, val loss {best.value:.4f}"
    for part, file_name in CONFIG_FILES.items():
        names = [
            name for name, spec in specs().items() if spec.part == part and name not in RESERVED_PARAMETERS
        ]
        text = format_settings(file_name, about, {name: values[name] for name in names})
        write_atomically(folder / file_name, text.encode("utf-8", "surrogatepass"))


def recorded_threads(trial: optuna.trial.FrozenTrial) -> dict[str, int]:
    """Return the number of threads of the trial: another number would change the rounding of its loss."""
    record = RunFolder(Path(trial.user_attrs.get("run", ""))).record_path
    try:
        threads = read_json_object(record)["parameters"]["threads"]
    except (Alg1Error, KeyError, TypeError):  # the run was removed
        return {}
    return {"threads": threads} if threads else {}


# --- plots --------------------------------------------------------------------------------------------


def draw_pictures(study: Study, console: Console) -> None:
    """Write history.png, importance.png and slice.png; print a warning for each that fails.

    Without a complete trial there are no plots.
    """
    if best_of(study.finished()) is None:
        return
    try:
        import matplotlib

        matplotlib.use("Agg")
        from optuna.importance import PedAnovaImportanceEvaluator
        from optuna.visualization import matplotlib as plots
    except ImportError as error:
        console.warn(f"no pictures were drawn: {first_line(error)}")
        return
    names = list(study.plan.space)

    def importance() -> object:
        evaluator = PedAnovaImportanceEvaluator()  # the default needs scikit-learn
        return plots.plot_param_importances(study.optuna, evaluator=evaluator, params=names)

    plot_functions: dict[str, Callable[[], object]] = {
        "history": lambda: plots.plot_optimization_history(study.optuna, target_name="val loss"),
        "importance": importance,
        "slice": lambda: plots.plot_slice(study.optuna, params=names, target_name="val loss"),
    }
    for name, draw in plot_functions.items():
        try:
            width = 3.8 * (len(names) + 1) if name == "slice" else None  # wide enough for its labels
            draw_picture(study.folder / f"{name}.png", draw, width)
        except Exception as error:  # matplotlib and Optuna raise many types
            console.warn(f"{name}.png was not drawn: {first_line(error)}")


def draw_picture(path: Path, draw: Callable[[], object], width: float | None) -> None:
    """Write a PNG of what `draw` plots on matplotlib's current figure; `width` is in inches."""
    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna marks its matplotlib plots as experimental
        try:
            draw()
            buffer = io.BytesIO()
            if width:
                pyplot.gcf().set_figwidth(width)
            pyplot.gcf().savefig(buffer, format="png", dpi=100, bbox_inches="tight")
        finally:
            pyplot.close("all")
    write_atomically(path, buffer.getvalue())
