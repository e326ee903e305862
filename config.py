"""The legacy single-file configuration: one flat JSON object, such as `{"batch_size": 8, "n_embd": 128}`.

It still serves, as the lowest source of all, in the working folder's `config.json`, or named by `--config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parameters import Parameters, coerce_all
from utils_alg1.base.files import read_json_object


def load_config(path: str | Path = "config.json") -> dict[str, Any]:
    """Read a legacy file as it stands, unchecked.

    Raises:
        Alg1Error: it is not there or not one JSON object.
    """
    return read_json_object(path)


def validate_config(config: dict[str, Any]) -> None:
    """Check every value; names that are left out take their defaults.

    Raises:
        Alg1Error: listing every problem: unknown names, wrong types, values out of range.
    """
    values, problems = coerce_all(config)
    Parameters.from_values(values, {}, problems)
