"""Reads TensorBoard's part of the configuration by itself."""

from __future__ import annotations

from pathlib import Path

from parameters import CONFIG_DIR, CONFIG_FILES, TensorBoardConfig, coerce_all
from utils_alg1.base.files import read_json_object
from utils_alg1.base.problems import raise_problems
from utils_alg1.base.settings import field_names

CONFIG_FILE = Path(CONFIG_DIR, CONFIG_FILES["tensorboard"])


def load_tensorboard_config(path: str | Path = CONFIG_FILE) -> TensorBoardConfig:
    """Reads and validates a file like configs/tensorboard.json; returns the defaults if it does not exist.

    Raises:
        Alg1Error: listing every problem in the file.
    """
    path = Path(path)
    values, problems = coerce_all(read_json_object(path) if path.exists() else {}, str(path))
    own = {name: v for name, v in values.items() if name in field_names(TensorBoardConfig)}
    config = TensorBoardConfig(**own)
    raise_problems([*problems, *config.problems()])
    return config
