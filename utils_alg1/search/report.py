"""What a search leaves for people: the tables, the pictures, and the best parameters as a preset."""

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
from utils_alg1.console.table import Column, format_columns, to_csv
from utils_alg1.run_directory import RunFolder
from utils_alg1.search.space import WHERE
from utils_alg1.search.study import Study, best_of, loss_of, loss_reached, parameters_of, short, state_of
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    import optuna

SHOWN = 10  # trials in the table on the console


def write_results(study: Study, console: Console) -> None:
    """Write the tables, the preset and the pictures.

    Raises:
        Alg1Error: the file system refused (exit code 4).
    """
    write_table(study)
    write_summary(study)
    write_preset(study)
    draw_pictures(study, console)


# --- tables -------------------------------------------------------------------------------------------


def ranked(study: Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that have ended: the complete ones by their loss, then the others."""
    order = {"complete": 0, "pruned": 1, "refused": 2, "failed": 3}

    def key(trial: optuna.trial.FrozenTrial) -> tuple[int, float, int]:
        loss = loss_reached(trial)
        return order[state_of(trial)], float("inf") if loss is None else loss, trial.number

    return sorted(study.finished(), key=key)


def table_row(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """A trial as a row of results.csv."""
    return {
        "trial": trial.number,
        "state": state_of(trial),
        "best_val_loss": loss_reached(trial),
        "last_step": trial.last_step,
        "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
        **parameters_of(trial),
        "run": trial.user_attrs.get("run"),
        "reason": trial.user_attrs.get("reason"),
    }


def write_table(study: Study) -> None:
    """results.csv: every trial that counts, in the order of their numbers."""
    rows = [table_row(trial) for trial in sorted(study.finished(), key=lambda trial: trial.number)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_atomically(study.folder / "results.csv", to_csv(names, rows).encode("utf-8", "surrogatepass"))


def table(study: Study, trials: list[optuna.trial.FrozenTrial]) -> list[list[str]]:
    """Trials as cells of text, under a line of headings."""
    names = list(study.plan.space)
    cells = [["trial", "state", "val loss", *names, "run, or what went wrong"]]
    for trial in trials:
        values = parameters_of(trial)
        run = trial.user_attrs.get("run")
        remark = trial.user_attrs.get("reason") or (Path(run).name if run else "")
        if trial.user_attrs.get("defaults"):
            remark = f"{remark} (the defaults)"
        drawn = [short(values[name]) if name in values else "" for name in names]
        cells.append([str(trial.number), state_of(trial), loss_of(trial), *drawn, remark])
    return cells


def write_summary(study: Study) -> None:
    """results.md: what was gained, and every trial, the best first."""
    head, *rows = table(study, ranked(study))
    lines = [f"# Search {study.settings.name}", ""]
    lines += [f"- {name}: {value}" for name, value in describe_search(study).items()]
    lines += ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    text = "\n".join(lines) + "\n"
    write_atomically(study.folder / "results.md", text.encode("utf-8", "surrogatepass"))


def show_table(study: Study, console: Console) -> None:
    """The best trials, in columns."""
    columns = [
        Column(heading, list(cells))
        for heading, *cells in zip(*table(study, ranked(study)[:SHOWN]), strict=True)
    ]
    lines, _ = format_columns(columns)
    for line in ("", *lines, ""):
        console.say(line)


def describe_search(study: Study) -> dict[str, str]:
    """What was tried, and what was gained over the defaults."""
    finished = study.finished()
    states = [state_of(trial) for trial in finished]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states))]
    lines = {"trials": f"{len(finished)} ({', '.join(counts)})"}
    best = best_of(finished)
    if best is None:
        return lines
    lines["best"] = f"trial {best.number}, val loss {best.value:.4f}"
    by_default = [trial for trial in finished if trial.user_attrs.get("defaults")]
    if by_default and by_default[0].state.name == "COMPLETE":
        defaults, loss = by_default[0], by_default[0].value
        assert loss is not None and best.value is not None  # both are complete
        lines["defaults"] = f"trial {defaults.number}, val loss {loss:.4f}"
        lines["gained"] = f"{loss - best.value:.4f}"
    elif by_default:
        lines["defaults"] = f"trial {by_default[0].number}, {state_of(by_default[0])}"
    return lines


def describe_start(study: Study, space_file: str, n_workers: int) -> dict[str, str]:
    """The block of lines that a search begins with."""
    n_finished = len(study.finished())
    return {
        "study": str(study.folder),
        "space": f"{space_file}: {', '.join(study.plan.space)}",
        "trials": f"{study.wanted}" + (f", {n_finished} of them finished" if n_finished else ""),
        "how": f"{study.settings.sampler}, {n_workers} at a time",
    }


def describe_end(study: Study) -> dict[str, str]:
    """The block of lines that a search ends with: what was gained, where it lies, what to type next.

    Raises:
        Alg1Error: no trial was completed.
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
    """best/: every value of the best trial, except where its run and its export are kept."""
    best = best_of(study.finished())
    if best is None:
        return
    values = study.plan.fixed | parameters_of(best) | threads_of(best)
    folder = study.folder / "best"
    make_folder(folder)
    about = f"Best of the search {study.settings.name}: trial {best.number}, val loss {best.value:.4f}"
    for part, file_name in CONFIG_FILES.items():
        names = [name for name, spec in specs().items() if spec.part == part and name not in WHERE]
        text = format_settings(file_name, about, {name: values[name] for name in names})
        write_atomically(folder / file_name, text.encode("utf-8", "surrogatepass"))


def threads_of(trial: optuna.trial.FrozenTrial) -> dict[str, int]:
    """The threads that the search gave the trial: only with as many a run ends with the same digits."""
    record = RunFolder(Path(trial.user_attrs.get("run", ""))).record_path
    try:
        threads = read_json_object(record)["parameters"]["threads"]
    except (Alg1Error, KeyError, TypeError):  # the run has been removed
        return {}
    return {"threads": threads} if threads else {}


# --- pictures -----------------------------------------------------------------------------------------


def draw_pictures(study: Study, console: Console) -> None:
    """history.png, importance.png and slice.png; one that cannot be drawn costs one line.

    Without a complete trial there is nothing to draw.
    """
    if best_of(study.finished()) is None:
        return
    try:
        import matplotlib

        matplotlib.use("Agg")
        from optuna.importance import PedAnovaImportanceEvaluator
        from optuna.visualization import matplotlib as pictures
    except ImportError as error:
        console.warn(f"no pictures were drawn: {first_line(error)}")
        return
    names = list(study.plan.space)

    def importance() -> object:
        evaluator = PedAnovaImportanceEvaluator()  # the default one needs a further package
        return pictures.plot_param_importances(study.optuna, evaluator=evaluator, params=names)

    drawings: dict[str, Callable[[], object]] = {
        "history": lambda: pictures.plot_optimization_history(study.optuna, target_name="val loss"),
        "importance": importance,
        "slice": lambda: pictures.plot_slice(study.optuna, params=names, target_name="val loss"),
    }
    for name, draw in drawings.items():
        try:
            width = 3.8 * (len(names) + 1) if name == "slice" else None  # its labels overlap otherwise
            draw_picture(study.folder / f"{name}.png", draw, width)
        except Exception as error:  # matplotlib and Optuna fail in many ways, and the search is done
            console.warn(f"{name}.png was not drawn: {first_line(error)}")


def draw_picture(path: Path, draw: Callable[[], object], width: float | None) -> None:
    """Write what a function draws on matplotlib's current figure, `width` inches wide where given."""
    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls its matplotlib pictures experimental
        try:
            draw()
            buffer = io.BytesIO()
            if width:
                pyplot.gcf().set_figwidth(width)
            pyplot.gcf().savefig(buffer, format="png", dpi=100, bbox_inches="tight")
        finally:
            pyplot.close("all")
    write_atomically(path, buffer.getvalue())
