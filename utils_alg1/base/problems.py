"""Problems with a user's input: collected, worded alike, and raised in one message."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from utils_alg1.base.errors import Alg1Error

CONFIG_HINT = "python train.py --help explains every value"


class Problem(NamedTuple):
    """A problem with one parameter, or with several taken together."""

    text: str
    names: tuple[str, ...] = ()  # of the parameters that are wrong


def shown(value: Any) -> str:
    """Format a value for a message: on one line and not too long."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=repr)
    except (TypeError, ValueError, RecursionError):  # a mapping only YAML can express, or a huge integer
        text = f"({type(value).__name__})"
    return text if len(text) <= 60 else text[:57] + "..."


def raise_problems(problems: list[Problem], hint: str = CONFIG_HINT) -> None:
    """Raise one Alg1Error that lists every problem; do nothing if there is none.

    A problem of several parameters is left out if one of them has a problem of its own: it may be the cause.
    """
    wrong = {names[0] for _, names in problems if len(names) == 1}
    kept = [text for text, names in problems if len(names) < 2 or wrong.isdisjoint(names)]
    if len(kept) == 1:
        raise Alg1Error(kept[0], hint)
    if kept:
        raise Alg1Error("\n  - ".join([f"{len(kept)} problems:", *kept]), hint)


# Names in other programs, above all nanoGPT, of what is a parameter, a key in a file or a flag here.
ALIASES = {
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
    """Return "; did you mean X?" with the name in `known` that `word` most likely means, or "".

    In this order: the same name, an alias, the only name that begins with `word`, the most similar name.
    """
    by_name = {_bare(name): name for name in known}
    bare = _bare(word).lower()
    same = [name for name in by_name if name == bare]
    aliased = [name for name in by_name if bare in ALIASES.get(name, ())]
    begun = [name for name in by_name if bare and name.startswith(bare)]
    close = difflib.get_close_matches(bare, list(by_name), n=1, cutoff=0.65)
    for found in (same, aliased[:1], begun, close):
        if len(found) == 1:
            return f"; did you mean {by_name[found[0]]}?"
    return ""


def _bare(name: str) -> str:
    return name.lstrip("-:").replace("-", "_")
