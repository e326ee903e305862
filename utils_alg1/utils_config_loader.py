"""Files and command line -> parameters, each with where its value came from.

Priority, highest first: command line, the file or folder named by --config (or, when a run is resumed, the
run's own parameters), configs/*, config.json, the defaults of `parameters.py`.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

from config import load_config
from errors import Alg1Error
from parameters import (
    Parameters,
    Problem,
    coerce_all,
    read_json_object,
    read_text,
    refuse_repeats,
    specs,
)
from utils_alg1.utils_command_line import Options

LOGGER = logging.getLogger("alg1")
CONFIG_DIR = "configs"
RESUMED = "resumed run"  # the origin of its values
LEGACY_FILE = "config.json"
PATH_HINT = "name a JSON or YAML file, or a folder like configs/"
YAML_HINT = "write one `name: value` a line, with a space behind the colon and no tab"
CONFIG_FILES = ("model.json", "train.yaml", "data.yaml", "tensorboard.json")  # in merging order


class ConfigLoader:
    """Reads configuration files and merges them with the command line."""

    @staticmethod
    def load_model_config(path: str | Path) -> dict[str, Any]:
        """Read model.json. Raises Alg1Error naming file and fault."""
        return _load_file(Path(path))

    @staticmethod
    def load_train_config(path: str | Path) -> dict[str, Any]:
        """Read train.yaml. Raises Alg1Error naming file and fault."""
        return _load_file(Path(path))

    @staticmethod
    def load_data_config(path: str | Path) -> dict[str, Any]:
        """Read data.yaml. Raises Alg1Error naming file and fault."""
        return _load_file(Path(path))

    @staticmethod
    def load_tensorboard_config(path: str | Path) -> dict[str, Any]:
        """Read tensorboard.json. Raises Alg1Error naming file and fault."""
        return _load_file(Path(path))

    @staticmethod
    def load_search_space(path: str | Path) -> dict[str, Any]:
        """Read the YAML or JSON file of a search space. Raises Alg1Error naming file and fault."""
        return _load_file(Path(path))

    @staticmethod
    def load_configs(config_dir: str | Path = CONFIG_DIR) -> dict[str, Any]:
        """Merge the files of a folder that are there, later ones over earlier: see CONFIG_FILES.

        Raises:
            Alg1Error: no such folder, or a file in it cannot be read.
        """
        merged: dict[str, Any] = {}
        for _, values in _folder_sources(Path(config_dir)):
            merged.update(values)
        return merged

    @staticmethod
    def resolve(
        options: Options,
        resumed: dict[str, Any] | None = None,
        initial: dict[str, Any] | None = None,
    ) -> Parameters:
        """Merge every source into validated parameters.

        Args:
            options: the command line.
            resumed: the parameters of the run that goes on; they take the place of the files.
            initial: the sizes of the model that --init-from names; they stand above the files.

        Raises:
            Alg1Error: every problem of every source in one message.
        """
        return Parameters.from_values(*ConfigLoader.merge(options, resumed, initial))

    @staticmethod
    def merge(
        options: Options,
        resumed: dict[str, Any] | None = None,
        initial: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
        """What `resolve` builds parameters from: values of the right types, their origins, the problems."""
        if resumed is not None:
            sources = [(RESUMED, resumed), *_named_sources(options)]
        else:
            sources = _file_sources(options)
        if initial is not None:
            sources.append(("--init-from", initial))

        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        problems = list(options.problems)
        for origin, source in sources:
            LOGGER.debug("%s: %s", origin, ", ".join(map(str, source)) or "no settings")
            good, faults = coerce_all(source, origin)
            values.update(good)
            origins.update(dict.fromkeys(good, origin))
            problems += faults
        for name, value in options.values.items():
            flag = specs()[name].flag
            good, faults = coerce_all({name: value})
            values.update(good)
            origins.update(dict.fromkeys(good, flag))
            problems += [fault._replace(text=f"{fault.text} (from {flag})") for fault in faults]
        if options.serve_tensorboard and values.get("tensorboard") is False:
            text = f"--serve-tensorboard has nothing to show: tensorboard is off ({origins['tensorboard']})"
            problems.append(Problem(text, ()))
        return values, origins, problems

    @staticmethod
    def runs_dir(options: Options) -> str:
        """The folder in which --resume finds its run: it is needed before the run's parameters are."""
        sources = [*_file_sources(options), ("", options.values)]
        named = [source["runs_dir"] for _, source in sources if "runs_dir" in source]
        return str(named[-1]) if named else specs()["runs_dir"].default

    @staticmethod
    def files_used(options: Options) -> list[Path]:
        """The configuration files that `resolve` reads, for the run's records."""
        return [Path(origin) for origin, _ in _file_sources(options)]


Source = tuple[str, dict[str, Any]]  # where values came from, and the values


def _file_sources(options: Options) -> list[Source]:
    """Every file that counts, the weakest first."""
    sources: list[Source] = []
    if Path(LEGACY_FILE).exists():
        sources.append((LEGACY_FILE, load_config(LEGACY_FILE)))
    if Path(CONFIG_DIR).is_dir():
        sources += _folder_sources(Path(CONFIG_DIR))
    return sources + _named_sources(options)


def _named_sources(options: Options) -> list[Source]:
    """The files behind --config PATH."""
    if not options.config:  # an empty one is among the problems
        return []
    path = Path(options.config)
    if path.is_dir():
        sources = _folder_sources(path)
        if not sources:
            from utils_alg1.utils_run_manager import RunFolder  # which needs this module

            record = RunFolder(path).record_path
            raise Alg1Error(
                f"--config {path}: none of {', '.join(CONFIG_FILES)} is in this folder",
                f"for the parameters of this run: --config {record}" if record.is_file() else PATH_HINT,
            )
        return sources
    if not path.exists():
        presets = [folder.name for folder in Path(CONFIG_DIR).glob("*") if folder.is_dir()]
        close = difflib.get_close_matches(path.name, presets, n=1)
        suggestion = f"; did you mean {Path(CONFIG_DIR, close[0])}?" if close else ""
        raise Alg1Error(
            f"--config {path}: no such file or folder{suggestion}",
            PATH_HINT,
        )
    return [(str(path), _load_named(path))]


def _load_named(path: Path) -> dict[str, Any]:
    """The file behind --config; of a run's meta/full_config.json the parameters.

    Raises:
        Alg1Error: naming file and fault.
    """
    if path.suffix == ".safetensors":
        raise Alg1Error(f"--config {path}: these are weights", f"to start from them: --init-from {path}")
    try:
        values = _load_file(path)
    except Alg1Error as error:
        other = path.suffix not in (".json", ".yaml", ".yml")
        raise Alg1Error(error.message, PATH_HINT if other else error.hint) from None
    recorded = values.get("parameters")
    return recorded if isinstance(recorded, dict) and "origins" in values else values


def _folder_sources(folder: Path) -> list[Source]:
    if not folder.is_dir():
        raise Alg1Error(f"{folder}: no such folder", "name one that holds " + ", ".join(CONFIG_FILES))
    paths = [folder / name for name in CONFIG_FILES]
    return [(str(path), _load_file(path)) for path in paths if path.exists()]


def _load_file(path: Path) -> dict[str, Any]:
    return _load_yaml(path) if path.suffix in (".yaml", ".yml") else read_json_object(path)


def _load_yaml(path: Path) -> dict[str, Any]:
    text = read_text(path)
    import yaml

    try:
        top = yaml.compose(text, yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise Alg1Error(f"{path}: {where}not YAML: {error.problem}", YAML_HINT) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise Alg1Error(f"{path}: not YAML: {reason}", YAML_HINT) from None
    if value is None:  # an empty file, or one of comments only
        return {}
    if not isinstance(value, dict):
        raise Alg1Error(f"{path}: must hold names and values", YAML_HINT)
    assert isinstance(top, yaml.MappingNode)  # since its value is a dictionary
    refuse_repeats(path, [key.value for key, _ in top.value])
    return value
