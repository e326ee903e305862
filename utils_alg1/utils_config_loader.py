"""Configuration files and command line -> parameters, each with its origin.

Priority, highest first: the command line; the file named by --config; the folder named by --config, or else
configs/; config.json; the defaults in `parameters.py`. If a run is resumed, its own parameters take the place
of config.json and configs/.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any, NamedTuple

from parameters import (
    CONFIG_DIR,
    CONFIG_FILES,
    Parameters,
    build_parts,
    coerce_all,
    part_problems,
    specs,
)
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import decode, parse_json_object, read_bytes, refuse_repeats
from utils_alg1.base.problems import Problem, raise_problems
from utils_alg1.console.command_line import FLAGS_ONLY, Options
from utils_alg1.run_directory import RunFolder

LOGGER = logging.getLogger("alg1")
RESUMED = "resumed run"  # the origin of its values
LEGACY_FILE = "config.json"
PATH_HINT = "name a JSON or YAML file, or a folder like configs/"
YAML_HINT = "write one `name: value` a line, with a space behind the colon and no tab"
YAML_SUFFIXES = (".yaml", ".yml")


class Source(NamedTuple):
    """Values and their origin; for a file also its content."""

    origin: str
    values: dict[str, Any]
    data: bytes = b""


class Sources:
    """The command line and the configuration files that it reads, each of them once.

    A file that cannot be read is a problem that is reported together with the others.
    """

    def __init__(self, options: Options):
        self._options = options
        self._unreadable: list[Problem] = []
        self._default_sources = self._read(_default_files(options.config))
        try:
            named = _config_files(options.config) if options.config else []
        except Alg1Error as error:
            self._add_unreadable(error)
            named = []
        self._config_sources = self._read(named)

    def _read(self, paths: list[Path]) -> list[Source]:
        sources = []
        for path in paths:
            try:
                data = read_bytes(path)
                source = Source(str(path), _parse(path, data), data)
            except Alg1Error as error:
                self._add_unreadable(error)
            else:
                LOGGER.debug("%s: %s", path, ", ".join(map(str, source.values)) or "no settings")
                sources.append(source)
        return sources

    def _add_unreadable(self, error: Alg1Error) -> None:
        self._unreadable.append(Problem(error.message, (), error.hint))

    @property
    def files(self) -> dict[Path, bytes]:
        """The content of the files whose values are used, for the run's records."""
        resumes = self._options.resume is not None
        used = self._config_sources if resumes else [*self._default_sources, *self._config_sources]
        return {Path(source.origin): source.data for source in used}

    @property
    def runs_dir(self) -> str:
        """The folder in which --resume finds its run, whose own parameters are not known yet.

        Raises:
            Alg1Error: a file that may name it cannot be read.
        """
        raise_problems(self._unreadable)
        files = [*self._default_sources, *self._config_sources]
        values = [*(source.values for source in files), self._options.values]
        named = [source["runs_dir"] for source in values if "runs_dir" in source]
        return str(named[-1]) if named else specs()["runs_dir"].default

    def check(self) -> None:
        """Check each value by itself, before the run or the model that it is for has been read.

        Raises:
            Alg1Error: every problem of the parameters and of the files that are used, in one message.
        """
        values, origins, problems = self._merge({} if self._options.resume is not None else None, None)
        of_values = part_problems(build_parts(values), origins)
        raise_problems([*problems, *(problem for problem in of_values if len(problem.names) == 1)])

    def resolve(
        self, resumed: dict[str, Any] | None = None, initial: dict[str, Any] | None = None
    ) -> Parameters:
        """Merge every source into validated parameters; see `ConfigLoader.resolve`."""
        return Parameters.from_values(*self.merge(resumed, initial))

    def merge(
        self, resumed: dict[str, Any] | None = None, initial: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
        """Return the arguments of `Parameters.from_values`: values, their origins and the problems so far.

        Raises:
            Alg1Error: a file cannot be read. Whether the other values fit to those in it is unknown, so the
                message lists only what is wrong by itself.
        """
        if self._unreadable:
            self.check()
        return self._merge(resumed, initial)

    def _merge(
        self, resumed: dict[str, Any] | None, initial: dict[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
        sources = self._default_sources if resumed is None else [Source(RESUMED, resumed)]
        sources = [*sources, *self._config_sources]
        if initial is not None:
            sources.append(Source("--init-from", initial))

        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        problems = list(self._unreadable)
        for origin, source, _ in sources:
            good, faults = coerce_all(source, origin, FLAGS_ONLY)
            values.update(good)
            origins.update(dict.fromkeys(good, origin))
            problems += faults
        for name, value in self._options.values.items():
            flag = specs()[name].flag
            good, faults = coerce_all({name: value})
            values.update(good)
            origins.update(dict.fromkeys(good, flag))
            problems += [fault._replace(text=f"{fault.text} (from {flag})") for fault in faults]
        off = values.get("tensorboard") is False and not self._unreadable  # an unread file may turn it on
        if self._options.serve_tensorboard and off:
            text = f"--serve-tensorboard has nothing to show: tensorboard is off ({origins['tensorboard']})"
            problems.append(Problem(text, ()))
        return values, origins, problems


class ConfigLoader:
    """Reads configuration files and merges them with the command line."""

    @staticmethod
    def load_file(path: str | Path) -> dict[str, Any]:
        """Read a YAML or JSON file without checking its values. Raises Alg1Error with file and fault."""
        return _parse(Path(path), read_bytes(path))

    load_model_config = load_file
    load_train_config = load_file
    load_data_config = load_file
    load_tensorboard_config = load_file

    @staticmethod
    def load_configs(config_dir: str | Path = CONFIG_DIR) -> dict[str, Any]:
        """Merge the files of a folder that exist, later ones over earlier ones; see CONFIG_FILES.

        Raises:
            Alg1Error: the folder does not exist, or a file in it cannot be read.
        """
        if not Path(config_dir).is_dir():
            names = ", ".join(CONFIG_FILES.values())
            raise Alg1Error(f"{config_dir}: no such folder", f"name one that holds {names}")
        merged: dict[str, Any] = {}
        for path in _files_in(Path(config_dir)):
            merged.update(_parse(path, read_bytes(path)))
        return merged

    @staticmethod
    def read(options: Options) -> Sources:
        """Read every file that the command line uses, once."""
        return Sources(options)

    @staticmethod
    def resolve(
        options: Options,
        resumed: dict[str, Any] | None = None,
        initial: dict[str, Any] | None = None,
    ) -> Parameters:
        """Merge every source into validated parameters.

        Args:
            options: the command line.
            resumed: the parameters of the run to resume; they replace config.json and configs/.
            initial: the parameters of the model that --init-from names; they override the files.

        Raises:
            Alg1Error: every problem of every source, in one message.
        """
        return Sources(options).resolve(resumed, initial)

    @staticmethod
    def runs_dir(given: str | None) -> str:
        """Return the folder of the runs for a script without train.py's flags.

        Args:
            given: the script's own --runs-dir; None for the folder that train.py uses by default.

        Raises:
            Alg1Error: a configuration file cannot be read.
        """
        return Sources(Options()).runs_dir if given is None else given


def _default_files(config: str | None) -> list[Path]:
    """Return config.json and the files of configs/ that exist, weakest first.

    A folder named by --config takes the place of configs/.
    """
    legacy = [Path(LEGACY_FILE)] if Path(LEGACY_FILE).exists() else []
    replaced = config and Path(config).is_dir()
    return legacy if replaced else legacy + _files_in(Path(CONFIG_DIR))


def _files_in(folder: Path) -> list[Path]:
    return [folder / name for name in CONFIG_FILES.values() if (folder / name).exists()]


def _config_files(config: str) -> list[Path]:
    """Return the files of --config PATH.

    Raises:
        Alg1Error: there are none.
    """
    path = Path(config)
    if path.is_dir():
        paths = _files_in(path)
        if not paths:
            record = RunFolder(path).record_path
            raise Alg1Error(
                f"--config {path}: none of {', '.join(CONFIG_FILES.values())} is in this folder",
                f"for the parameters of this run: --config {record}" if record.is_file() else PATH_HINT,
            )
        return paths
    if not path.exists():
        presets = [folder.name for folder in Path(CONFIG_DIR).glob("*") if folder.is_dir()]
        close = difflib.get_close_matches(path.name, presets, n=1)
        suggestion = f"; did you mean {Path(CONFIG_DIR, close[0])}?" if close else ""
        raise Alg1Error(f"--config {path}: no such file or folder{suggestion}", PATH_HINT)
    if path.suffix == ".safetensors":
        raise Alg1Error(f"--config {path}: these are weights", f"to start from them: --init-from {path}")
    return [path]


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    """Parse the content of a configuration file, or the parameters of a run's meta/full_config.json.

    Raises:
        Alg1Error: naming file and fault.
    """
    if path.suffix in YAML_SUFFIXES:
        return _parse_yaml(path, data)
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
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise Alg1Error(f"{path}: {where}not YAML: {error.problem}", YAML_HINT) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise Alg1Error(f"{path}: not YAML: {reason}", YAML_HINT) from None
    if value is None:  # an empty file, or only comments
        return {}
    if not isinstance(value, dict):
        raise Alg1Error(f"{path}: must hold names and values", YAML_HINT)
    return value
