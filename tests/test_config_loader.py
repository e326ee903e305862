"""Where values come from and which one wins; what a run is called, and what is recorded about it."""

from __future__ import annotations

import datetime
import importlib.util
import io
import json
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT, printed_config
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parameters import CONFIG_FILES, PARTS, Parameters, coerce_all, specs
from utils_alg1 import utils_run_manager
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.settings import field_names
from utils_alg1.console.command_line import Options, parse_command_line
from utils_alg1.run_directory import LOCK_NAME, NO_RUN_HINT, RUN_ID, find_run, list_runs, lock_run
from utils_alg1.utils_config_loader import ConfigLoader
from utils_alg1.utils_run_manager import (
    MetadataCapture,
    RunDirectoryCreator,
    RunIDGenerator,
    copy_files,
    create_run,
)

# A value other than the default for every parameter; they go together.
OTHER = {
    "n_embd": 128,
    "n_head": 8,
    "n_layer": 2,
    "block_size": 16,
    "dropout": 0.25,
    "vocab_size": 65,
    "positions": "rotary",
    "qk_norm": True,
    "zero_init": True,
    "batch_size": 12,
    "max_iters": 2000,
    "max_seconds": 3600.0,
    "learning_rate": 3e-4,
    "eval_interval": 50,
    "eval_iters": 10,
    "seed": 7,
    "device": "cpu",
    "dtype": "bfloat16",
    "compile": "off",
    "threads": 2,
    "optimizer": "sgd",
    "weight_decay": 0.1,
    "beta1": 0.8,
    "beta2": 0.95,
    "lr_schedule": "cosine",
    "warmup_iters": 100,
    "min_lr": 1e-5,
    "grad_clip": 1.0,
    "grad_accum_steps": 2,
    "checkpoint_interval": 0,
    "checkpoint_minutes": 2.5,
    "keep_checkpoints": 5,
    "patience": 3,
    "export": "last",
    "playground": False,
    "output": "out.safetensors",
    "runs_dir": "elsewhere",
    "run_tag": "a tag",
    "aim": False,
    "data_path": "text.txt",
    "val_data": "other.txt",
    "train_split": 0.8,
    "val_split": 0.2,
    "new_characters": "add",
    "tensorboard": False,
    "histogram_interval": 100,
    "activation_interval": 200,
    "attention_interval": 300,
    "embedding_interval": 0,
    "sample_interval": 1,
    "gradient_norm_interval": 5,
    "speed_interval": 50,
    "port": 7007,
}

FILES = {f"configs/{name}": PARTS[part] for part, name in CONFIG_FILES.items()}

CONFIG_HINT = "hint: python train.py --help explains every value\n"


def write(path: str | Path, values: object) -> None:
    """A configuration file: text as it stands, anything else as its suffix says."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(values, bytes):
        path.write_bytes(values)
        return
    if not isinstance(values, str):
        values = yaml.safe_dump(values) if path.suffix == ".yaml" else json.dumps(values)
    path.write_text(values, encoding="utf-8")


def resolve(*words: str):
    return ConfigLoader(parse_command_line(list(words))).resolve()


def flags(values: dict[str, object]) -> list[str]:
    """The command line that says these values."""
    words = []
    for name, value in values.items():
        flag = specs()[name].flag
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words.append(f"{flag}={value}")
    return words


def short(value: object) -> str:
    return ascii(value)[:40]


# --- every parameter through every source ---


def test_other_values_are_other_than_the_defaults():
    assert [name for name, spec in specs().items() if OTHER[name] == spec.default] == []
    assert OTHER.keys() == specs().keys()


def test_every_parameter_has_a_flag(workdir):
    params = resolve(*flags(OTHER))
    assert params.flat() == OTHER
    assert params.origins == {name: spec.flag for name, spec in specs().items()}


@pytest.mark.parametrize("name", [name for name, spec in specs().items() if spec.type is bool])
def test_a_boolean_has_two_flags_of_which_one_is_given(workdir, name):
    on = specs()[name].flag
    off = on.replace("--", "--no-", 1)
    assert resolve(off).flat()[name] is False
    assert resolve(on).flat()[name] is True
    with pytest.raises(Alg1Error, match=f"^{off} is given 2 times: {off}, {on}$"):
        resolve(off, on)


@pytest.mark.parametrize("path", ["config.json", *FILES, "a.json", "a.yaml", "preset"])
def test_every_parameter_can_stand_in_every_file(workdir, path):
    files = {path: OTHER}
    if path == "preset":
        files = {f"{path}/model.json": OTHER}
    for name, values in files.items():
        write(name, values)
    named = ["--config", path] if path in ("a.json", "a.yaml", "preset") else []
    params = resolve(*named)
    assert params.flat() == OTHER
    assert params.origins == dict.fromkeys(specs(), *files)


def test_a_folder_is_merged_from_its_four_files(workdir):
    for path, config_class in FILES.items():
        write(path, {name: OTHER[name] for name in field_names(config_class)})
    params = resolve()
    assert params.flat() == OTHER == ConfigLoader.load_configs()
    assert {name: params.origins[name] for name in ("n_embd", "seed", "data_path", "port")} == {
        "n_embd": "configs/model.json",
        "seed": "configs/train.yaml",
        "data_path": "configs/data.yaml",
        "port": "configs/tensorboard.json",
    }


def test_in_a_folder_the_later_file_wins(workdir):
    for number, path in enumerate(FILES):
        write(path, {"seed": number})
        assert resolve().train.seed == number
        assert resolve().origins["seed"] == path


def test_without_any_source_everything_is_a_default(workdir):
    params = resolve()
    assert params.flat() == {name: spec.default for name, spec in specs().items()}
    assert set(params.origins.values()) == {"default"}


# --- which one wins ---


def test_priority_and_origins_are_shown_line_by_line(workdir, train):
    write("config.json", dict.fromkeys(["seed", "threads", "patience", "eval_iters"], 1))
    write("configs/train.yaml", dict.fromkeys(["seed", "threads", "patience"], 2))
    write("more.yaml", dict.fromkeys(["seed", "threads"], 3))
    result = train("--print-config", "--config", "more.yaml", "--seed", 4)
    assert result.code == 0
    assert result.err == ""
    names = ("batch_size", "eval_iters", "seed", "threads", "patience", "output")
    helps = {name: specs()[name].help for name in names}
    assert [line for line in result.out.splitlines() if line.split(":")[0] in names] == [
        f"batch_size: 4                 # default                   {helps['batch_size']}",
        f"eval_iters: 1                 # config.json               {helps['eval_iters']}",
        f"seed: 4                       # --seed                    {helps['seed']}",
        f"threads: 3                    # more.yaml                 {helps['threads']}",
        f"patience: 2                   # configs/train.yaml        {helps['patience']}",
        f"output: null                  # default                   {helps['output']}",
    ]


def test_the_listing_shows_every_parameter_once_under_its_part(workdir, train):
    lines = [line for line in train("--print-config").out.splitlines() if line]
    assert [line for line in lines if line.startswith("#")] == [
        f"# --- {part}: {config_class.__doc__}" for part, config_class in PARTS.items()
    ]
    assert [line.split(":")[0] for line in lines if not line.startswith("#")] == list(specs())
    assert os.listdir(workdir) == []


def test_the_listing_shows_the_choices(workdir, train):
    assert re.search(r"^optimizer: adamw .* \(adamw, sgd, muon\)$", train("--print-config").out, re.M)


# --- --print-config > my.yaml, and back ---

ANY_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
SPECIAL_WORDS = """
    off yes null ~ 1e-3 1e3 1.0 0x1f 1:30 2026-01-31 = << - ? : # {} [] a:b 'a" %a @a `a !a &a *a |a >a ... 🙂
"""
ODD_TEXTS = [
    *SPECIAL_WORDS.split(),
    *("", " ", " a", "a ", "a: b", "a #b", "- a", "--- a", "a  # b", "\\", "many words " * 30),
    *("a\nb", "\r\n", "\t", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff", "\ue000"),
    *("caf\udce9", "caf\u0301 日本"),
]
TEXTS = [name for name, spec in specs().items() if spec.type is str and not spec.choices]


def any_value(name: str) -> st.SearchStrategy:
    """Every value of the right type that a file or a flag could give, also where it is out of range."""
    spec = specs()[name]
    of_type = {
        int: st.integers(0, 2**63 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: st.sampled_from(spec.choices) if spec.choices else ANY_TEXT,
    }[spec.type]
    return of_type | st.none() if spec.default is None else of_type


some_parameters = st.lists(
    st.sampled_from([*specs()]).flatmap(lambda name: st.tuples(st.just(name), any_value(name))), max_size=9
).map(dict)


def check_reading_back(params: Parameters) -> None:
    """Check that the listing of parameters holds each on a line, and is read as the same values."""
    text = params.to_yaml()
    assert all(line.isprintable() for line in text.split("\n"))
    write("my.yaml", text)
    read, problems = coerce_all(ConfigLoader.load_train_config("my.yaml"))
    assert problems == []
    for name, value in params.flat().items():
        assert re.search(rf"^{name}: .*  # ", text, re.M)
        assert repr(read.pop(name)) == repr(value)  # 0.0 is not -0.0
    assert read == {}


@pytest.mark.parametrize("first", range(0, len(ODD_TEXTS), len(TEXTS)))
def test_the_listing_of_odd_texts_gives_the_same_texts(workdir, first):
    values = dict(zip(TEXTS, ODD_TEXTS[first:], strict=False))
    origins = dict(zip(specs(), [*ODD_TEXTS[first:], *ODD_TEXTS], strict=False))
    check_reading_back(Parameters.from_values(values, origins))


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some_parameters, ANY_TEXT)
def test_the_listing_of_any_parameters_gives_the_same_values(workdir, some, origin):
    check_reading_back(Parameters.from_values(some, dict.fromkeys(specs(), origin)))


def test_the_listing_serves_as_configuration(workdir, train):
    flags_given = flags(OTHER | {"run_tag": "off", "output": "a: b # c", "data_path": "日本\n.txt"})
    printed = train("--print-config", *flags_given).out
    assert '\ndata_path: "' in printed  # escaped, on its line
    write("my.yaml", printed)
    again = train("--print-config", "--config", "my.yaml")
    assert (again.code, again.err) == (0, "")
    expected = {name: value for name, (value, _) in printed_config(printed).items()}
    assert expected == OTHER | {"run_tag": "off", "output": "a: b # c", "data_path": "日本\n.txt"}
    assert printed_config(again.out) == {name: (value, "my.yaml") for name, value in expected.items()}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_the_listing_can_be_read_back_whatever_the_encoding_of_the_output(
    workdir, train, monkeypatch, encoding
):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written := io.BytesIO(), encoding))
    write("café.json", {"seed": 5})
    flags_given = ["--data", "café/日本.txt", "--run-tag", "caf\udce9", "--config", "café.json"]
    result = train("--print-config", "--verbose", *flags_given)
    assert (result.code, result.err) == (0, "")
    write("my.yaml", written.getvalue())
    params = resolve("--config", "my.yaml")
    assert (params.data.data_path, params.train.run_tag) == ("café/日本.txt", "caf\udce9")
    assert (params.train.seed, params.origins["seed"]) == (5, "my.yaml")


# --- folders and files of --config ---


def test_a_file_named_by_config_stands_above_the_folder(workdir):
    write("configs/train.yaml", {"seed": 1, "batch_size": 2})
    write("legacy.json", {"seed": 5})
    params = resolve("--config", "legacy.json")
    assert (params.train.seed, params.origins["seed"]) == (5, "legacy.json")
    assert (params.train.batch_size, params.origins["batch_size"]) == (2, "configs/train.yaml")


def test_a_folder_named_by_config_takes_the_place_of_the_folder(workdir):
    write("config.json", {"seed": 1, "batch_size": 2, "patience": 3})
    write("configs/train.yaml", {"seed": 4, "batch_size": 5, "beta1": 0.8})
    write("configs/model.json", "{")  # it is not read either
    write("preset/train.yaml", {"seed": 6})
    params = resolve("--config", "preset")
    assert {
        name: (params.flat()[name], params.origins[name])
        for name in ("seed", "batch_size", "patience", "beta1")
    } == {
        "seed": (6, "preset/train.yaml"),
        "batch_size": (2, "config.json"),
        "patience": (3, "config.json"),
        "beta1": (0.9, "default"),
    }


def test_the_folder_itself_may_be_named(workdir):
    write("config.json", {"seed": 1, "batch_size": 2})
    write("configs/train.yaml", {"seed": 3})
    write("configs/data.yaml", {"val_split": 0.05})
    assert resolve("--config", "configs") == resolve()
    assert resolve("--config", "configs/").train.seed == 3


def test_config_json_counts_where_the_shipped_folder_names_nothing(workdir):
    write("config.json", {"seed": 1, "patience": 3})
    shutil.copytree(PROJECT / "configs", "configs")
    params = resolve()
    assert params.changed() == {}
    origins = {name: f"configs/{CONFIG_FILES[spec.part]}" for name, spec in specs().items()}
    assert params.origins == origins
    text = Path("configs/train.yaml").read_text()
    write("configs/train.yaml", "".join(line for line in text.splitlines(True) if "seed" not in line))
    params = resolve()
    assert params.changed() == {"seed": 1}
    assert params.origins == origins | {"seed": "config.json"}


def test_a_resumed_run_takes_the_place_of_the_files(workdir):
    write("config.json", {"seed": 1})
    write("configs/train.yaml", {"threads": 1, "batch_size": 8})
    write("more.json", {"max_iters": 900})
    options = parse_command_line(["--config", "more.json", "--patience", "3"])
    resumed = {"seed": 5, "max_iters": 100, "patience": 0, "batch_size": 16}
    params = ConfigLoader(options).resolve(resumed=resumed)
    assert {name: (params.flat()[name], params.origins[name]) for name in [*resumed, "threads"]} == {
        "seed": (5, "resumed run"),
        "batch_size": (16, "resumed run"),
        "max_iters": (900, "more.json"),
        "patience": (3, "--patience"),
        "threads": (0, "default"),
    }


def test_the_sizes_of_an_initial_model_stand_above_the_files(workdir):
    write("configs/model.json", {"n_embd": 32, "n_layer": 1, "dropout": 0.5})
    options = parse_command_line(["--n-layer", "3"])
    params = ConfigLoader(options).resolve(initial={"n_embd": 16, "n_layer": 2})
    assert {
        name: (params.flat()[name], params.origins[name]) for name in ("n_embd", "n_layer", "dropout")
    } == {
        "n_embd": (16, "--init-from"),
        "n_layer": (3, "--n-layer"),
        "dropout": (0.5, "configs/model.json"),
    }


CHOICES = {
    "batch_size": st.integers(1, 2**31 - 1),
    "seed": st.integers(0, 2**63 - 1),
    "dropout": st.floats(0, 1, exclude_max=True),
    "weight_decay": st.floats(0, 1e300),
    "optimizer": st.sampled_from(["adamw", "sgd"]),
    "aim": st.booleans(),
    "run_tag": st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    "port": st.integers(1, 65535),
}
SOURCES = ["config.json", *FILES, "more.yaml", "preset/model.json", "preset/train.yaml", "command line"]
# The configuration that --config names: the sources that do not count beside it.
NAMED = {"": "more preset", "more.yaml": "preset", "preset": "more configs"}
some_values = st.fixed_dictionaries({}, optional=CHOICES)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*NAMED]), st.fixed_dictionaries(dict.fromkeys(SOURCES, some_values)))
def test_the_strongest_source_wins_and_is_named(workdir, named, assignment):
    expected = {name: (spec.default, "default") for name, spec in specs().items()}
    for source in SOURCES:
        values = assignment[source]
        if source.startswith(tuple(NAMED[named].split())):
            write(source, values)
            continue
        for name, value in values.items():
            expected[name] = (value, specs()[name].flag if source == "command line" else source)
        if source != "command line":
            write(source, values)
    params = resolve(*(["--config", named] if named else []), *flags(assignment["command line"]))
    assert {name: (value, params.origins[name]) for name, value in params.flat().items()} == expected


# --- the readings of a file ---


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "0.001", "1.0e-3", "'1e-3'", '" 0.001 "'])
def test_yaml_numbers_are_numbers(workdir, number):
    write("configs/train.yaml", f"learning_rate: {number}\n")
    assert resolve().train.learning_rate == 0.001


@pytest.mark.parametrize(
    ("word", "value"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'off'", "off")]
)
def test_compile_on_and_off_in_yaml_are_words(workdir, word, value):
    write("configs/train.yaml", f"compile: {word}\n")
    assert resolve().train.compile == value


@pytest.mark.parametrize("content", ["", "# only a comment\n", "---\n", "null\n", "{}\n"])
def test_a_yaml_file_without_values_changes_nothing(workdir, content):
    write("configs/train.yaml", content)
    assert set(resolve().origins.values()) == {"default"}


def test_a_comment_in_json_is_no_parameter(workdir):
    write("configs/model.json", {"_comment": "wide", "n_embd": 128})
    assert resolve().model.n_embd == 128


@pytest.mark.parametrize(
    ("load", "path"),
    [
        (ConfigLoader.load_model_config, "model.json"),
        (ConfigLoader.load_train_config, "train.yaml"),
        (ConfigLoader.load_data_config, "data.yaml"),
        (ConfigLoader.load_tensorboard_config, "tensorboard.json"),
    ],
)
def test_each_file_can_be_read_by_itself(workdir, load, path):
    write(path, {"anything": 1})
    assert load(path) == {"anything": 1}
    with pytest.raises(Alg1Error, match=rf"^nowhere/{path}: no such file$"):
        load(f"nowhere/{path}")


def test_load_configs_reads_what_is_there(workdir):
    write("some/train.yaml", {"seed": 1})
    assert ConfigLoader.load_configs("some") == {"seed": 1}
    with pytest.raises(Alg1Error, match=r"^configs: no such folder$"):
        ConfigLoader.load_configs()


def test_files_used_are_those_that_count(workdir):
    for path in (
        "config.json",
        "configs/train.yaml",
        "configs/notes.yaml",
        "preset/model.json",
        "a.json",
        "unused.json",
    ):
        write(path, {})
    for config, used, named in (
        ([], "config.json configs/train.yaml", ""),
        (["--config", "preset"], "config.json", "preset/model.json"),
        (["--config", "a.json"], "config.json configs/train.yaml", "a.json"),
    ):
        for resume, expected in (([], f"{used} {named}"), (["--resume", "latest"], named)):
            sources = ConfigLoader(parse_command_line([*config, *resume]))
            assert sources.files == {Path(name): Path(name).read_bytes() for name in expected.split()}


def test_a_file_is_read_once_and_kept_as_it_was_then(workdir):
    write("configs/train.yaml", "runs_dir: here\n")
    sources = ConfigLoader(Options())
    write("configs/train.yaml", "runs_dir: there\n")
    assert (sources.runs_dir, sources.resolve().train.runs_dir) == ("here", "here")
    assert sources.files == {Path("configs/train.yaml"): b"runs_dir: here\n"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "from-configs"),
        (["--config", "a.json"], "from-a"),
        (["--config", "preset"], "from-legacy"),
        (["--runs-dir", "here"], "here"),
    ],
)
def test_the_runs_folder_is_known_before_the_parameters_are(workdir, words, expected):
    write("config.json", {"runs_dir": "from-legacy"})
    write("configs/train.yaml", {"runs_dir": "from-configs", "no_such_name": 1})
    write("a.json", {"runs_dir": "from-a"})
    write("preset/train.yaml", {"seed": 1})
    assert ConfigLoader(parse_command_line(words)).runs_dir == expected


def test_the_runs_folder_is_the_default_when_nothing_names_one(workdir):
    assert ConfigLoader().runs_dir == "runs"


def test_a_script_without_parameters_finds_the_runs_folder_too(workdir):
    write("configs/train.yaml", {"runs_dir": "from-configs"})
    assert ConfigLoader().runs_dir == "from-configs"
    write("configs/train.yaml", "- 1\n")
    with pytest.raises(Alg1Error, match=r"^configs/train.yaml: must hold names and values$"):
        _ = ConfigLoader().runs_dir


# --- what is wrong with a file ---


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("config.json", "{", "not JSON: Expecting property name"),
        ("config.json", "[1]", "must hold one JSON object of names and values"),
        ("config.json", '{"seed": 1, "seed": 1}', "'seed' stands there twice"),
        ("config.json", b'{"run_tag": "\xff"}', "not UTF-8 at byte 13"),
        ("config.json", '{"seed": ' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
        ("configs/model.json", "n_embd: 64", "not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("configs/train.yaml", "seed: 1\nseed: 1\n", "'seed' stands there twice"),
        ("configs/train.yaml", "seed: {a: 1, b: [{c: 1, c: 1}]}\n", "'c' stands there twice"),
        ("configs/train.yaml", "seed: &a {b: 1}\nthreads: {<<: *a, c: 1, c: 2}\n", "'c' stands there twice"),
        ("configs/train.yaml", "a: b: c", "line 1, column 5: not YAML: mapping values are not allowed here"),
        ("configs/train.yaml", "seed: 1\n\tthreads: 2", "line 2, column 1: not YAML: found character '\\t'"),
        ("configs/train.yaml", "- seed\n- threads\n", "must hold names and values"),
        ("configs/train.yaml", "just words", "must hold names and values"),
        ("configs/train.yaml", "seed: 1\n---\nseed: 2\n", "line 2, column 1: not YAML: but found another"),
        ("configs/train.yaml", "? [a]\n: 1", "line 1, column 3: not YAML: found unhashable key"),
        ("configs/train.yaml", "seed: !!python/name:os.system", "line 1, column 7: not YAML: could not"),
        ("configs/train.yaml", "run_tag: \x07", "not YAML: unacceptable character #x0007"),
        ("configs/train.yaml", b"run_tag: caf\xe9", "not UTF-8 at byte 12"),
        ("configs/data.yaml", "seed: " + "9" * 5000, "not YAML: Exceeds the limit"),
        ("configs/data.yaml", "*nothing", "line 1, column 1: not YAML: found undefined alias"),
    ],
    ids=short,
)
def test_a_broken_file_is_one_error_line_that_names_it(workdir, train, path, content, message):
    write(path, content)
    result = train("--print-config")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {path}: {message}")
    assert [line.split(":")[0] for line in result.err.splitlines()] in (["error"], ["error", "hint"])


@pytest.mark.parametrize(
    ("path", "content", "error"),
    [
        ("config.json", '{"batchsize": 1}', "unknown name 'batchsize'; did you mean batch_size?"),
        (
            "config.json",
            '{"model": {"n_embd": 32}}',
            "unknown name 'model'; there are no sections: move its names to the top level",
        ),
        ("configs/train.yaml", "1: 2", "unknown name 1"),
        ("configs/train.yaml", "yes: 2", "unknown name true"),
        ("configs/train.yaml", "batch_size:", "batch_size = null must be a whole number"),
        ("configs/train.yaml", "batch_size: [1, 2]", "batch_size = [1, 2] must be a whole number"),
        ("configs/train.yaml", "batch_size: {2020-01-01: 3}", "batch_size = (dict) must be a whole number"),
        ("configs/train.yaml", "batch_size: &a [*a]", "batch_size = (list) must be a whole number"),
        ("configs/train.yaml", "aim: 1", "aim = 1 must be true or false"),
        ("configs/train.yaml", "run_tag: 2024", "run_tag = 2024 must be text"),
        ("configs/model.json", '{"n_layer": true}', "n_layer = true must be a whole number"),
    ],
    ids=short,
)
def test_a_wrong_value_in_a_file_names_file_and_value(workdir, train, path, content, error):
    write(path, content)
    result = train("--print-config")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"error: {path}: {error}\n{CONFIG_HINT}"


def test_the_problems_of_all_sources_come_in_one_message(workdir, train):
    write("config.json", {"batchsize": 8, "dropout": 1})
    write("configs/train.yaml", "seed: x\nlr_schedule: cosin\n")
    write("a.json", {"n_embd": 30})
    result = train("--config", "a.json", "--batch-size", "two", "--val-split", 0.5)
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "error: 7 problems:\n"
        "  - config.json: unknown name 'batchsize'; did you mean batch_size?\n"
        "  - configs/train.yaml: seed = 'x' must be a whole number\n"
        "  - --batch-size: batch_size = 'two' must be a whole number\n"
        "  - dropout = 1.0 must be below 1 (dropout from config.json)\n"
        "  - n_embd = 30 must be divisible by n_head = 4 (n_embd = 32 is) (n_embd from a.json)\n"
        "  - lr_schedule = 'cosin' must be one of constant, cosine, linear, step, wsd"
        " (lr_schedule from configs/train.yaml)\n"
        "  - train_split = 0.9 and val_split = 0.5 make 1.4, more than the whole text"
        " (val_split from --val-split)\n" + CONFIG_HINT
    )


@pytest.mark.parametrize("start", ["", "--resume latest", "--init-from nowhere.safetensors"])
def test_a_file_that_cannot_be_read_is_reported_first(workdir, train, start):
    """What its values would go with is unknown."""
    write("configs/train.yaml", "seed: 1\nseed: 2\n")
    result = train("--max-iters", "five", "--n-embd", 6, *start.split())
    expected = "error: configs/train.yaml: 'seed' stands there twice\nhint: keep one of them\n"
    assert (result.code, result.out, result.err) == (2, "", expected)


@pytest.mark.parametrize("start", ["--resume latest", "--init-from nowhere.safetensors"])
def test_names_and_types_are_checked_before_a_run_or_a_model_is_read(workdir, train, start):
    write("more.json", {"n_layr": 2})
    flags = "--config more.json --max-iters five --serve-tensorboard --no-tensorboard"
    assert train(*start.split(), *flags.split()).err == (
        "error: 3 problems:\n"
        "  - more.json: unknown name 'n_layr'; did you mean n_layer?\n"
        "  - --max-iters: max_iters = 'five' must be a whole number\n"
        "  - --serve-tensorboard has nothing to show: tensorboard is off (--tensorboard)\n" + CONFIG_HINT
    )


def test_a_yaml_mapping_may_merge_another_and_stand_above_it(workdir):
    write("a.yaml", "base: &base {a: 1}\nmore: &more {<<: *base, a: 2}\nlast: {<<: *more, a: 3}\n")
    assert ConfigLoader.load_file("a.yaml") == {"base": {"a": 1}, "more": {"a": 2}, "last": {"a": 3}}


def test_a_wrong_value_is_reported_even_where_a_stronger_source_has_a_good_one(workdir, train):
    write("configs/train.yaml", "seed: x\n")
    assert train("--print-config", "--seed", 5).err == (
        f"error: configs/train.yaml: seed = 'x' must be a whole number\n{CONFIG_HINT}"
    )


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("nowhere", "--config nowhere: no such file or folder"),
        (
            "empty",
            "--config empty: none of model.json, train.yaml, data.yaml, tensorboard.json is in this folder",
        ),
    ],
)
def test_config_must_name_something(workdir, train, path, error):
    Path("empty").mkdir()
    result = train("--print-config", "--config", path)
    assert result.code == 2
    assert result.err.splitlines()[0] == f"error: {error}"


# --- what ships ---


def test_the_shipped_files_hold_every_parameter_at_its_default(workdir):
    """Each in the file of its part, with its help."""
    for path, config_class in FILES.items():
        text = (PROJECT / path).read_text()
        values = ConfigLoader.load_train_config(PROJECT / path)
        values.pop("_comment", None)
        assert list(values) == field_names(config_class)
        for name, value in values.items():
            spec = specs()[name]
            assert repr(value) == repr(spec.default)
            assert re.search(rf"\b{name}: .*{re.escape(spec.explanation)}", text)
    assert resolve("--config", str(PROJECT / "configs")).changed() == {}


def test_the_shipped_files_are_what_the_script_writes():
    """After a change to parameters.py, docs/write_configs.py is to be run."""
    written = runpy.run_path(str(PROJECT / "docs/write_configs.py"))["config_files"]()
    assert [str(path) for path in written] == list(FILES)
    for path, text in written.items():
        assert (PROJECT / path).read_bytes() == text.encode(), "run python docs/write_configs.py"


# --- nothing is loaded before it is needed ---

LIGHT = [
    "utils_alg1.base.errors",
    "parameters",
    "config",
    "utils_alg1.base.problems",
    "utils",
    "utils_alg1.console.command_line",
    "utils_alg1.utils_config_loader",
    "utils_alg1.console.dialogue",
    "train",
    "inference",
    "search",
]
HEAVY = {"torch", "numpy", "yaml", "rich", "aim", "tensorboard", "matplotlib", "safetensors", "optuna"}

IMPORT_ALL = """
import contextlib, gc, importlib, io, json, sys
gc.disable()
heard, loaded, helped = io.StringIO(), {}, {}
light, further = sys.argv[1].split(), sys.argv[2].split()

def load(names):
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        for name in names:
            importlib.import_module(name)
            loaded[name] = [*sys.modules]

load(light)
for script in ("train", "inference", "search"):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        sys.modules[script].main(["--help"])
    helped[script] = out.getvalue(), [*sys.modules]
load(further)
print(json.dumps([heard.getvalue(), loaded, helped]))
"""


def test_importing_prints_nothing_and_loads_nothing_heavy_before_it_is_needed():
    """Nor does --help. In a fresh Python, where nothing is loaded yet."""
    paths = [*PROJECT.glob("*.py"), *PROJECT.glob("utils_*/**/*.py")]
    names = {".".join(path.relative_to(PROJECT).with_suffix("").parts) for path in paths}
    names.remove("utils_alg1.console.terminal")  # imported at a terminal only; it is Rich's
    further = sorted(names - {*LIGHT})
    command = [sys.executable, "-c", IMPORT_ALL, " ".join(LIGHT), " ".join(further)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    heard, loaded, helped = json.loads(done.stdout)
    assert heard == ""
    assert loaded.keys() == names
    assert [name for name in LIGHT if not HEAVY.isdisjoint(loaded[name])] == []
    unneeded = {"aim", "tensorboard", "torch.utils.tensorboard", "torch._inductor"}
    assert (unneeded | {"matplotlib", "rich", "optuna"}).isdisjoint(loaded[further[-1]])
    for script, (text, modules) in helped.items():
        assert text.startswith(f"usage: python {script}.py")
        assert HEAVY.isdisjoint(modules)


def test_help_names_every_flag_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no word is broken at a dash
    with pytest.raises(SystemExit) as stop:
        parse_command_line(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for spec in specs().values():
        default = "" if spec.default in (None, "") else f" ({spec.default})"
        assert f" {spec.flag}" in text
        assert f" {spec.help}{default}" in text


# --- run ids ---

DAY = datetime.date(2026, 1, 31)
NAME = re.compile(r"2026-01-31_(\d{3,})(_[^/\0]+)?")

any_tag = st.one_of(
    st.text(st.characters()),  # all of Unicode, surrogates too
    st.text("./\\_-\0 ~é日🙂\ud800", max_size=80),
    st.text("🙂日𐀀", min_size=60, max_size=300).map(lambda text: text + "/../.."),
)


@pytest.mark.parametrize(
    ("tag", "run_id"),
    [
        ("", "2026-01-31_001"),
        ("first try", "2026-01-31_001_first-try"),
        ("lr=1e-3, wd 0.1", "2026-01-31_001_lr-1e-3-wd-0.1"),
        ("日本 café", "2026-01-31_001_日本-café"),
        ("cafe\u0301", "2026-01-31_001_café"),
        ("../../etc/passwd", "2026-01-31_001_etc-passwd"),
        ("..", "2026-01-31_001"),
        ("/", "2026-01-31_001"),
        ("a\0b\nc\\d", "2026-01-31_001_a-b-c-d"),
        ("\ud800x\udcff", "2026-01-31_001_x"),
        ("x" * 1000, "2026-01-31_001_" + "x" * 60),
        ("𐀀" * 1000, "2026-01-31_001_" + "𐀀" * 50),
        ("x" * 59 + "..y", "2026-01-31_001_" + "x" * 59),
    ],
    ids=ascii,
)
def test_a_tag_becomes_part_of_the_name(workdir, tag, run_id):
    assert RunIDGenerator("runs").generate(tag, DAY) == run_id


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(any_tag)
def test_any_tag_gives_one_path_component(workdir, tag):
    run_id = RunIDGenerator("runs").generate(tag, DAY)
    assert NAME.fullmatch(run_id)
    assert len(os.fsencode(run_id)) <= 255
    assert Path(run_id).name == run_id
    assert run_id.isprintable()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(any_tag)
def test_any_tag_makes_a_run_inside_the_runs_folder_only(workdir, tag):
    shutil.rmtree("runs", ignore_errors=True)
    with create_run("runs", tag) as run:
        run.is_new = False
    assert os.listdir(workdir) == ["runs"]
    assert sorted(os.listdir("runs")) == [".lock", run.run_id]
    assert list_runs("runs") == [run.path]
    assert counter_of(run.run_id) == 1
    assert (
        find_run("runs") == find_run("runs", run.run_id) == find_run("elsewhere", str(run.path)) == run.path
    )


def counter_of(run_id: str) -> int:
    match = RUN_ID.fullmatch(run_id)
    assert match is not None
    return int(match[2])


def make_runs(*names: str) -> None:
    for name in names:
        Path("runs", name).mkdir(parents=True)


def test_counters_go_on_from_the_highest_of_the_day(workdir):
    generate = RunIDGenerator("runs").generate
    assert generate(date=DAY) == "2026-01-31_001"
    make_runs("2026-01-31_001", "2026-01-31_004_x", "2026-01-30_009", "2026-01-31_12", "2026-01-31_050x")
    Path("runs/2026-01-31_077").touch()  # no run: a file
    assert generate(date=DAY) == "2026-01-31_005"
    make_runs("2026-01-31_999")
    assert generate("big", DAY) == "2026-01-31_1000_big"
    make_runs("2026-01-31_1000_big")
    assert generate(date=DAY) == "2026-01-31_1001"


def test_the_date_is_todays(workdir):
    day = datetime.date.today()
    assert RunIDGenerator("runs").generate() in {f"{day}_001", f"{datetime.date.today()}_001"}


def test_runs_are_listed_by_date_and_number(workdir):
    ordered = ["2025-12-31_002", "2026-01-01_001_b", "2026-01-01_999_a", "2026-01-01_1000", "2026-01-02_001"]
    make_runs(*sorted(ordered), "notes", "2026-01-03", "2026-1-4_001")
    Path("runs/2027-01-01_001").touch()
    assert [path.name for path in list_runs("runs")] == ordered
    assert find_run("runs").name == "2026-01-02_001"


def test_the_latest_run_of_a_busy_day_is_past_999(workdir):
    make_runs("2026-01-01_999", "2026-01-01_1000", "2026-01-01_1001_tag")
    assert find_run("runs", "latest").name == "2026-01-01_1001_tag"


@pytest.mark.parametrize("runs_dir", ["nowhere", "file", "a\0b"])
def test_a_runs_folder_that_is_none_holds_no_runs(workdir, runs_dir):
    Path("file").touch()
    assert list_runs(runs_dir) == []


@pytest.mark.parametrize(
    ("made", "name", "message", "hint"),
    [
        ([], "latest", "there is no run in runs: no such folder", NO_RUN_HINT),
        ([], "x", "x: no such run in runs, and no run directory", NO_RUN_HINT),
        (
            ["2026-01-01_001_a"],
            "2026-01-01_00",
            "2026-01-01_00: no such run in runs, and no run directory",
            "the latest is 2026-01-01_001_a",
        ),
        (
            ["2026-01-01_001"],
            "runs",
            "runs: no such run in runs, and no run directory",
            "the latest is 2026-01-01_001",
        ),
        (
            ["2026-01-01_001"],
            "",
            ": no such run in runs, and no run directory",
            "the latest is 2026-01-01_001",
        ),
    ],
)
def test_a_run_that_is_not_there(workdir, made, name, message, hint):
    make_runs(*made)
    with pytest.raises(Alg1Error) as caught:
        find_run("runs", name)
    assert (caught.value.message, caught.value.hint, caught.value.exit_code) == (message, hint, 2)


def test_a_number_names_a_run_without_its_tag(workdir):
    make_runs("2026-01-01_001_a", "2026-01-01_0011_b", "2026-01-01_002")
    assert find_run("runs", "2026-01-01_001").name == "2026-01-01_001_a"


# --- run directories ---

LAYOUT = {
    "meta",
    "logs",
    "logs/tensorboard",
    "artifacts",
    "artifacts/checkpoints",
    "artifacts/export",
    "eval",
}


def folders_in(path: Path) -> set[str]:
    return {str(found.relative_to(path)) for found in path.rglob("*") if found.is_dir()}


def test_a_run_directory_has_its_layout(workdir):
    path = RunDirectoryCreator("deep/runs").create("2026-01-31_001")
    assert path == Path("deep/runs/2026-01-31_001")
    assert folders_in(path) == LAYOUT


def test_the_paths_of_a_run_are_in_its_layout(workdir):
    with create_run("runs", "x") as run:
        parents = {run.log_path.parent, run.metrics_path.parent, run.export_path.parent}
        folders = {run.meta_dir, run.tensorboard_dir, run.checkpoint_dir, run.eval_dir, *parents}
        assert {str(folder.relative_to(run.path)) for folder in folders} == LAYOUT - {"artifacts"}


def test_a_run_directory_is_made_only_once(workdir):
    creator = RunDirectoryCreator("runs")
    kept = creator.create("2026-01-31_001") / "meta" / "notes.md"
    kept.write_text("mine")
    with pytest.raises(FileExistsError):
        creator.create("2026-01-31_001")
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("run_id", ["../escaped", "a/b", "", ".", os.path.abspath("/escaped")])
def test_a_run_directory_is_a_direct_child_of_the_runs_folder(workdir, run_id):
    with pytest.raises(Alg1Error) as caught:
        RunDirectoryCreator("runs").create(run_id)
    assert caught.value.message == f"{run_id!r} is not the name of a run"
    assert os.listdir(workdir) == []


def test_a_run_that_never_began_leaves_nothing(workdir):
    with create_run("runs") as run:
        assert run.path.is_dir()
    assert os.listdir("runs") == [".lock"]


def test_a_run_that_began_stays(workdir):
    with create_run("runs") as run:
        run.is_new = False
    assert folders_in(run.path) == LAYOUT


def test_a_run_is_locked_while_it_lives(workdir):
    with create_run("runs") as run:
        run.is_new = False
        with pytest.raises(Alg1Error) as caught:
            lock_run(run.path, timeout=0.01)
        assert caught.value.message == f"{run.path} is in use by another process"
        assert caught.value.exit_code == 2
    with lock_run(run.path) as again:
        assert again.run_id == run.run_id


def test_a_run_waits_for_another_that_is_being_created(workdir, monkeypatch):
    monkeypatch.setattr(utils_run_manager, "LOCK_SECONDS", 0)
    Path("runs").mkdir()
    with FileLock(Path("runs", LOCK_NAME)), pytest.raises(Alg1Error) as caught:
        create_run("runs")
    assert caught.value.message == "runs/.lock was not free for a minute"
    assert caught.value.exit_code == 2
    assert os.listdir("runs") == [LOCK_NAME]
    assert create_run("runs").run_id.endswith("_001")


@pytest.fixture
def slow_numbers(monkeypatch):
    """Wait after a number is found, so that without a lock two runs would find the same one."""
    generate = RunIDGenerator.generate

    def slowly(*arguments) -> str:
        run_id = generate(*arguments)
        time.sleep(0.01)
        return run_id

    monkeypatch.setattr(RunIDGenerator, "generate", slowly)


def test_runs_created_by_eight_threads_get_eight_numbers(workdir, slow_numbers):
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda number: create_run("runs", f"t{number}"), range(8)))
    assert sorted(counter_of(run.run_id) for run in runs) == list(range(1, 9))
    for run in runs:
        run.lock.release()


def test_runs_created_by_eight_processes_get_eight_numbers(workdir, slow_numbers):
    fork = multiprocessing.get_context("fork")
    together, names = fork.Barrier(8), fork.SimpleQueue()

    def create() -> None:
        together.wait(60)
        names.put(create_run("runs").run_id)

    processes = [fork.Process(target=create) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert sorted(counter_of(names.get()) for _ in processes) == list(range(1, 9))


def test_files_copied_under_the_same_name_are_numbered(workdir):
    files = {Path(folder, "train.yaml"): folder.encode() for folder in "abc"}
    for more in (files, {Path("d/train.yaml"): b"b"}):  # the second is there already
        copy_files(more, Path("meta/configs"))
        copies = {path.name: path.read_text() for path in Path("meta/configs").iterdir()}
        assert copies == {"train.yaml": "a", "train-2.yaml": "b", "train-3.yaml": "c"}


def test_the_configuration_files_of_a_folder_are_copied(workdir):
    write("configs/train.yaml", "seed: 1 # mine\n")
    write("configs/notes.txt", "no")
    MetadataCapture.copy_configs("configs", "meta")
    assert os.listdir("meta/configs") == ["train.yaml"]
    assert Path("meta/configs/train.yaml").read_text() == "seed: 1 # mine\n"


# --- where a run came from ---


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the program takes for its own checkout; no other repository or setting counts."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.setattr(utils_run_manager, "__file__", str(folder / "utils_run_manager.py"))
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    return folder


NO_GIT = {"commit": "unknown", "branch": "unknown", "dirty": "unknown"}


def test_outside_a_repository_git_is_unknown(checkout, workdir):
    assert MetadataCapture.capture_git_info("git.txt") == NO_GIT
    assert Path("git.txt").read_text() == "commit: unknown\nbranch: unknown\ndirty: unknown\n"


def test_without_git_git_is_unknown(checkout, workdir, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    assert MetadataCapture.capture_git_info("git.txt") == NO_GIT


def test_a_git_that_hangs_is_unknown(checkout, workdir, monkeypatch):
    def hang(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    assert MetadataCapture.capture_git_info("git.txt") == NO_GIT


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_branch_and_changes_of_the_checkout_are_recorded(checkout, workdir):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *who, *arguments], cwd=checkout, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    git("checkout", "-q", "-b", "trunk")
    assert MetadataCapture.capture_git_info("git.txt") == NO_GIT | {"dirty": "no"}
    (checkout / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    clean = {"commit": git("rev-parse", "HEAD"), "branch": "trunk", "dirty": "no"}
    assert MetadataCapture.capture_git_info("git.txt") == clean
    assert Path("git.txt").read_text() == f"commit: {clean['commit']}\nbranch: trunk\ndirty: no\n"
    (checkout / "file").write_text("2")
    assert MetadataCapture.capture_git_info("git.txt") == clean | {"dirty": "yes"}


def test_the_environment_names_versions_and_the_command(workdir, monkeypatch):
    import numpy

    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    version = runpy.run_path(str(Path(torch.origin).with_name("version.py")))["__version__"]  # not imported
    monkeypatch.setattr(sys, "argv", ["train.py", "--run-tag", "my caf\udce9"])
    info = MetadataCapture.capture_env_info("env.txt")
    assert info["python"] == sys.version.split()[0]
    assert version.startswith(info["torch"]) and info["numpy"] == numpy.__version__
    assert Path("env.txt").read_text().splitlines()[2] == r"command: train.py --run-tag $'my caf\xe9'"


def test_a_package_that_is_missing_is_said_so(workdir, monkeypatch):
    def version(package):
        raise utils_run_manager.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(utils_run_manager.metadata, "version", version)
    info = MetadataCapture.capture_env_info("env.txt")
    assert {info[package] for package in ("torch", "tensorboard", "aim")} == {"not installed"}
