"""TensorBoard's part of the configuration, for use on its own."""

from __future__ import annotations

from pathlib import Path

from parameters import CONFIG_DIR, CONFIG_FILES, Parameters, TensorBoardConfig, coerce_all
from utils_alg1.base.files import read_json_object
from utils_alg1.base.problems import raise_problems

CONFIG_FILE = Path(CONFIG_DIR, CONFIG_FILES["tensorboard"])


def load_tensorboard_config(path: str | Path = CONFIG_FILE) -> TensorBoardConfig:
    """Read a file like configs/tensorboard.json; return the defaults if it does not exist.

    Raises:
        Alg1Error: listing every problem in the file.
    """
    values, problems = coerce_all(read_json_object(path) if Path(path).exists() else {}, str(path))
    config = Parameters.from_values(values, {}).tensorboard
    raise_problems([*problems, *config.problems()])
    return config
