"""What is wrong with what a user gave: collected, worded alike, and raised as one message."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from utils_alg1.base.errors import Alg1Error

CONFIG_HINT = "python train.py --help explains every value"


class Problem(NamedTuple):
    """Something wrong with one parameter, or with several taken together."""

    text: str
    names: tuple[str, ...]  # of the parameters it is about
    hint: str | None = None  # its own way out, where there is one


def names_in(problems: list[Problem]) -> set[str]:
    """The parameters that problems are about."""
    return {name for problem in problems for name in problem.names}


def joint_problem(text: str, *names: str) -> list[Problem]:
    """A problem of several parameters together, as a list to add to others."""
    return [Problem(text, names)]


def shown(value: Any) -> str:
    """A value as a message shows it: on one line and not too long."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=repr)
    except (TypeError, ValueError, RecursionError):  # what only YAML can say, or a number without end
        text = f"({type(value).__name__})"
    return text if len(text) <= 60 else text[:57] + "..."


def named_origin(problem: Problem, origins: Mapping[str, str]) -> Problem:
    """The problem with where its values came from, for those that are not defaults."""
    given = [f"{name} from {origins[name]}" for name in problem.names if name in origins]
    return problem._replace(text=f"{problem.text} ({', '.join(given)})") if given else problem


def raise_problems(problems: list[Problem], hint: str = CONFIG_HINT) -> None:
    """Raise one Alg1Error that lists every problem; do nothing when there is none.

    A problem of several parameters is left out when one of them is wrong by itself: it may follow from it.
    `hint` is the way out of those that have none of their own.
    """
    wrong = {problem.names for problem in problems if len(problem.names) == 1}
    kept = [
        problem
        for problem in problems
        if len(problem.names) < 2 or not any((name,) in wrong for name in problem.names)
    ]
    if len(kept) == 1:
        raise Alg1Error(kept[0].text, kept[0].hint or hint)
    if kept:
        listed = "".join(f"\n  - {text}{f' ({own})' if own else ''}" for text, _, own in kept)
        raise Alg1Error(f"{len(kept)} problems:{listed}", hint)


# What other programs, nanoGPT above all, call what is here a parameter, a file key or a flag.
ELSEWHERE = {
    "learning_rate": ("lr",),
    "max_iters": ("epochs", "steps", "max_steps", "num_steps", "iterations", "lr_decay_iters"),
    "batch_size": ("bs",),
    "block_size": ("context", "context_length", "context_size", "seq_len"),
    "n_embd": ("d_model", "hidden_size"),
    "n_layer": ("layers", "num_layers", "depth"),
    "n_head": ("heads", "num_heads"),
    "grad_accum_steps": ("gradient_accumulation_steps", "accumulate"),
    "weight_decay": ("wd",),
    "lr_schedule": ("decay_lr", "scheduler"),
    "checkpoint_interval": ("always_save_checkpoint", "save_interval", "save_every"),
    "device": ("gpu",),
    "workers": ("jobs", "n_jobs"),
    "low": ("min", "lower"),
    "high": ("max", "upper"),
    "data_path": ("dataset", "input", "text", "corpus"),
    "data": ("dataset", "data_path", "input", "corpus"),
    "runs_dir": ("out_dir", "output_dir"),
    "run_tag": ("wandb_run_name", "run_name", "name"),
    "aim": ("wandb", "wandb_log"),
    "prompt": ("start", "text", "input"),
    "max_new_tokens": ("length", "max_length", "max_tokens", "tokens"),
    "num_samples": ("samples", "n_samples"),
    "model": ("checkpoint", "ckpt", "weights"),
}


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for the known word that `word` begins, or that resembles it most, or nothing."""
    by_name = {name.lstrip("-:").replace("-", "_"): name for name in known}
    bare = word.lstrip("-:").replace("-", "_").lower()
    begun = [name for name in by_name if bare and name.startswith(bare)]
    elsewhere = [name for name in by_name if bare in ELSEWHERE.get(name, ())]
    if bare in by_name:
        found = by_name[bare]
    elif elsewhere:
        found = by_name[elsewhere[0]]
    elif len(begun) == 1:
        found = by_name[begun[0]]
    else:
        close = difflib.get_close_matches(bare, list(by_name), n=1, cutoff=0.65)
        found = by_name[close[0]] if close else ""
    return f"; did you mean {found}?" if found else ""
