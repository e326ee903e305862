"""The legacy configuration in a single file: a flat JSON object, such as `{"batch_size": 8, "n_embd": 128}`.

`config.json` in the working folder is read for what configs/* do not name; `--config` takes such a file too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parameters import Parameters, coerce_all
from utils_alg1.base.files import read_json_object
from utils_alg1.base.problems import raise_problems


def load_config(path: str | Path = "config.json") -> dict[str, Any]:
    """Read a legacy file without checking its values. Raises Alg1Error if it is no JSON object."""
    return read_json_object(path)


def validate_config(config: dict[str, Any]) -> None:
    """Raise Alg1Error that lists every problem: unknown names, wrong types, values out of range."""
    values, problems = coerce_all(config)
    raise_problems([*problems, *Parameters.from_values(values, {}).problems()])
