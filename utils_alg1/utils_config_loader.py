"""Configuration files and command line -> parameters, each with its origin.

Priority, highest first: the command line; the file named by --config; the folder named by --config, or else
configs/; config.json; the defaults in `parameters.py`. If a run is resumed, its own parameters take the place
of config.json and configs/.
"""

from __future__ import annotations

import difflib
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from parameters import CONFIG_DIR, CONFIG_FILES, Parameters, coerce_all, specs
from utils_alg1.base.errors import Alg1Error, first_line
from utils_alg1.base.files import decode, parse_json_object, read_bytes, refuse_repeats
from utils_alg1.base.problems import Problem, raise_problems
from utils_alg1.base.scripts import FOLDER, shipped
from utils_alg1.base.text import shell_quote
from utils_alg1.console.command_line import Options
from utils_alg1.run_directory import RunFolder

LOGGER = logging.getLogger("alg1")
RESUMED = "resumed run"  # the origin of its values
LEGACY_FILE = "config.json"
PATH_HINT = "name a JSON or YAML file, or a folder like configs/"
YAML_HINT = "write one `name: value` a line, with a space behind the colon and no tab"


class Source(NamedTuple):
    """Values and their origin; for a file also its content."""

    origin: str
    values: dict[str, Any]
    data: bytes = b""


class ConfigLoader:
    """Reads the configuration files that a command line uses, each once, and merges them with it.

    Without `options` it is a command line without flags. Raises Alg1Error if a file cannot be read.
    """

    def __init__(self, options: Options | None = None):
        self._options = options or Options()
        self._defaults = [_read(path) for path in _default_files(self._options.config)]
        self._named = [_read(path) for path in _named_files(self._options.config)]

    @staticmethod
    def load_file(path: str | Path) -> dict[str, Any]:
        """Read a YAML or JSON file without checking its values. Raises Alg1Error with file and fault."""
        return _read(Path(path)).values

    load_model_config = load_file
    load_train_config = load_file
    load_data_config = load_file
    load_tensorboard_config = load_file

    @staticmethod
    def load_configs(config_dir: str | Path = CONFIG_DIR) -> dict[str, Any]:
        """Merge the CONFIG_FILES of a folder that exist, later ones over earlier ones."""
        if not Path(config_dir).is_dir():
            names = ", ".join(CONFIG_FILES.values())
            raise Alg1Error(f"{config_dir}: no such folder", f"name one that holds {names}")
        return _merged([_read(path) for path in _files_in(Path(config_dir))])

    @property
    def files(self) -> dict[Path, bytes]:
        """The content of the files whose values are used, for the run's records."""
        used = self._named if self._options.resume is not None else [*self._defaults, *self._named]
        return {Path(source.origin): source.data for source in used}

    @property
    def runs_dir(self) -> str:
        """The folder of the runs, also where --resume finds its run, whose parameters are not known yet."""
        values = _merged([*self._defaults, *self._named]) | self._options.values
        return str(values.get("runs_dir", specs()["runs_dir"].default))

    def merge(
        self, resumed: dict[str, Any] | None = None, initial: dict[str, Any] | None = None
    ) -> tuple[Parameters, list[Problem]]:
        """Merge every source (see `resolve`) into parameters that are not checked yet.

        Also return the problems so far: unknown names and wrong types.
        """
        sources = self._defaults if resumed is None else [Source(RESUMED, resumed)]
        flags = [Source(specs()[name].flag, {name: value}) for name, value in self._options.values.items()]
        sources = [*sources, *self._named, Source("--init-from", initial or {}), *flags]

        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        problems: list[Problem] = []
        for origin, given, _ in sources:
            good, faults = coerce_all(given, origin)
            values |= good
            origins |= dict.fromkeys(good, origin)
            problems += faults
        if self._options.serve_tensorboard and values.get("tensorboard") is False:
            off = f"tensorboard is off ({origins['tensorboard']})"
            problems.append(Problem(f"--serve-tensorboard has nothing to show: {off}"))
        return Parameters.from_values(values, origins), problems

    def check_names_and_types(self) -> None:
        """Raise Alg1Error for unknown names and wrong types, before the run of --resume is read."""
        raise_problems(self.merge(resumed=None if self._options.resume is None else {})[1])

    def resolve(
        self, resumed: dict[str, Any] | None = None, initial: dict[str, Any] | None = None
    ) -> Parameters:
        """Merge every source into valid parameters; raises one Alg1Error that lists every problem.

        `resumed` are the parameters of the run to resume, which replace config.json and configs/; `initial`
        are those of the model that --init-from names, which override the files.
        """
        params, problems = self.merge(resumed, initial)
        raise_problems([*problems, *params.problems()])
        return params


def _default_files(config: str | None) -> list[Path]:
    """Return config.json and the files of configs/ that exist; a folder as --config replaces configs/."""
    legacy = [Path(LEGACY_FILE)] if Path(LEGACY_FILE).exists() else []
    return legacy if config and _config_path(config).is_dir() else legacy + _files_in(Path(CONFIG_DIR))


def _files_in(folder: Path) -> list[Path]:
    return [folder / name for name in CONFIG_FILES.values() if (folder / name).exists()]


def _config_path(config: str) -> Path:
    """Return the path that --config means: `fast` is configs/fast, unless the current folder has a `fast`."""
    preset = shipped(Path(CONFIG_DIR, config))
    is_name = os.sep not in config and config not in (os.curdir, os.pardir)
    return preset if is_name and preset.is_dir() and not os.path.lexists(config) else shipped(config)


def _named_files(config: str | None) -> list[Path]:
    """Return the files of --config PATH; there is at least one, or Alg1Error is raised."""
    if config is None:
        return []
    path = _config_path(config)
    if path.is_dir():
        if paths := _files_in(path):
            return paths
        record = RunFolder(path).record_path
        raise Alg1Error(
            f"--config {path}: none of {', '.join(CONFIG_FILES.values())} is in this folder",
            f"for the parameters of this run: --config {shell_quote(str(record))}"
            if record.is_file()
            else PATH_HINT,
        )
    if not path.exists():
        folders = (Path(CONFIG_DIR), FOLDER / CONFIG_DIR)
        presets = {preset.name for folder in folders for preset in folder.glob("*") if preset.is_dir()}
        close = difflib.get_close_matches(path.name, presets, n=1)
        suggestion = f"; did you mean {Path(CONFIG_DIR, close[0])}?" if close else ""
        raise Alg1Error(f"--config {path}: no such file or folder{suggestion}", PATH_HINT)
    if path.suffix == ".safetensors":
        raise Alg1Error(
            f"--config {path}: these are weights", f"to start from them: --init-from {shell_quote(str(path))}"
        )
    return [path]


def _merged(sources: list[Source]) -> dict[str, Any]:
    return {name: value for source in sources for name, value in source.values.items()}


def _read(path: Path) -> Source:
    """Read a configuration file, or the parameters of a run's meta/full_config.json."""
    data = read_bytes(path)
    values = (_parse_yaml if path.suffix in (".yaml", ".yml") else _parse_json)(path, data)
    LOGGER.debug("%s: %s", path, ", ".join(map(str, values)) or "no settings")
    return Source(str(path), values, data)


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        values = parse_json_object(data, path)
    except Alg1Error as error:
        raise Alg1Error(error.message, error.hint if path.suffix == ".json" else PATH_HINT) from None
    recorded = values.get("parameters")
    if not isinstance(recorded, dict) or "origins" not in values:
        return values
    # Without --output: another run must not overwrite the export of this one.
    return {name: value for name, value in recorded.items() if name != "output"}


def _parse_yaml(path: Path, data: bytes) -> dict[str, Any]:
    text = decode(data, path)
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a name that is given twice in one mapping, at any level."""

        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)  # as written: before `<<` is merged
            refuse_repeats(path, [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return node

    try:
        value = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or first_line(error)
        raise Alg1Error(f"{path}: {where}not YAML: {reason}", YAML_HINT) from None
    if not isinstance(value, dict | None):
        raise Alg1Error(f"{path}: must hold names and values", YAML_HINT)
    return value or {}  # None: an empty file, or only comments
