"""The typed parameters: defaults, types, limits, and every problem in one message."""

from __future__ import annotations

import dataclasses
import json
import math
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import load_config, validate_config
from parameters import (
    PARTS,
    DataConfig,
    ModelConfig,
    Parameters,
    TensorBoardConfig,
    TrainConfig,
    coerce_all,
    specs,
)
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import read_json_object
from utils_alg1.base.problems import Problem, nearest, raise_problems, shown
from utils_alg1.base.settings import coerce

DOCUMENTED_DEFAULTS = {
    "batch_size": 4,
    "block_size": 32,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 4,
    "dropout": 0.0,
    "max_iters": 5000,
    "learning_rate": 1e-3,
    "eval_interval": 100,
    "eval_iters": 20,
    "train_split": 0.9,
    "val_split": 0.1,
    "seed": 1337,
}

FURTHER_NAMES = """
    device dtype compile threads optimizer weight_decay beta1 beta2 lr_schedule warmup_iters min_lr grad_clip
    grad_accum_steps checkpoint_interval keep_checkpoints patience export histogram_interval tensorboard aim
    output runs_dir run_tag activation_interval attention_interval embedding_interval sample_interval
    gradient_norm_interval speed_interval checkpoint_minutes max_seconds
"""


def problem_texts(config) -> list[str]:
    return [problem.text for problem in config.problems()]


# --- names and defaults ---


def test_documented_defaults():
    for name, default in DOCUMENTED_DEFAULTS.items():
        spec = specs()[name]
        assert (spec.default, type(spec.default)) == (default, type(default)), name
        assert getattr(PARTS[spec.part](), name) == default, name


def test_documented_names_exist():
    assert specs().keys() >= {*DOCUMENTED_DEFAULTS, *FURTHER_NAMES.split()}


def test_a_flag_is_the_name_with_dashes():
    flags = {name: "--" + name.replace("_", "-") for name in specs()}
    assert {name: spec.flag for name, spec in specs().items()} == flags | {"data_path": "--data"}


def test_names_and_flags_are_unique_over_all_parts():
    fields = [field.name for config_class in PARTS.values() for field in dataclasses.fields(config_class)]
    assert list(specs()) == fields
    assert len({spec.flag for spec in specs().values()}) == len(fields)


def test_every_parameter_says_what_it_is():
    assert [name for name, spec in specs().items() if not spec.help.strip()] == []


@pytest.mark.parametrize("config_class", PARTS.values())
def test_defaults_are_valid(config_class):
    assert config_class().problems() == []


# --- types ---


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("batch_size", 8, 8),
        ("batch_size", 8.0, 8),
        ("batch_size", "8", 8),
        ("batch_size", " 8 ", 8),
        ("batch_size", "8.0", 8),
        ("batch_size", "1e3", 1000),
        ("batch_size", "10_000", 10_000),  # as in YAML
        ("learning_rate", "1_0.5", 10.5),
        ("seed", str(2**63 - 1), 2**63 - 1),  # a float would round it
        ("learning_rate", "1e-3", 0.001),
        ("learning_rate", "3E-4", 0.0003),
        ("learning_rate", 1, 1.0),
        ("dropout", "0", 0.0),
        ("aim", True, True),
        ("aim", "true", True),
        ("aim", "FALSE", False),
        ("compile", "off", "off"),
        ("compile", False, "off"),  # what YAML reads in `compile: off`
        ("compile", True, "on"),
        ("run_tag", "", ""),
        ("output", None, None),
        ("output", "a.safetensors", "a.safetensors"),
        ("vocab_size", None, None),
        ("vocab_size", "65", 65),
    ],
)
def test_coercion(name, given, expected):
    value = coerce(specs()[name], given)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "complaint"),
    [
        ("batch_size", "eight", "must be a whole number"),
        ("batch_size", "", "must be a whole number"),
        ("batch_size", 8.5, "must be a whole number"),
        ("batch_size", "8.5", "must be a whole number"),
        ("batch_size", "10_", "must be a whole number"),
        ("batch_size", True, "must be a whole number"),
        ("batch_size", None, "must be a whole number"),
        ("batch_size", [8], "must be a whole number"),
        ("batch_size", math.inf, "must be a whole number"),
        ("batch_size", "nan", "must be a whole number"),
        ("learning_rate", "fast", "must be a number"),
        ("learning_rate", False, "must be a number"),
        ("learning_rate", None, "must be a number"),
        ("learning_rate", {"a": 1}, "must be a number"),
        pytest.param("learning_rate", 10**400, "must be a number", id="beyond a float"),
        ("aim", 1, "must be true or false"),
        ("aim", "yes", "must be true or false"),
        ("aim", None, "must be true or false"),
        ("run_tag", 5, "must be text"),
        ("run_tag", False, "must be text"),
        ("device", None, "must be text"),
    ],
)
def test_refused_types(name, given, complaint):
    with pytest.raises(ValueError) as caught:
        coerce(specs()[name], given)
    assert str(caught.value) == complaint


def test_a_file_name_of_undecodable_bytes_is_text():
    name = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    assert coerce(specs()["data_path"], name) == name


def test_coerce_all_keeps_the_good_and_names_the_origin_of_the_bad():
    good, problems = coerce_all({"_comment": "words", "n_embd": 8, "n_heads": 2, "seed": "x"}, "model.json")
    assert good == {"n_embd": 8}
    assert [problem.text for problem in problems] == [
        "model.json: unknown name 'n_heads'; did you mean n_head?",
        "model.json: seed = 'x' must be a whole number",
    ]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("batchsize", "; did you mean batch_size?"),
        ("learning-rate", "; did you mean learning_rate?"),
        ("N_EMBED", "; did you mean n_embd?"),
        ("zzz", ""),
    ],
)
def test_nearest_known_name(word, expected):
    assert nearest(word, specs()) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a b", "'a b'"),
        ("two\nlines", r"'two\nlines'"),
        (None, "null"),
        (True, "true"),
        (1.5, "1.5"),
        ([1, "a"], '[1, "a"]'),
        ("x" * 100, "'" + "x" * 56 + "..."),
        ({(1, 2): 3}, "(dict)"),
        pytest.param(10**5000, "(int)", id="a number too long to print"),
    ],
)
def test_values_in_messages_are_one_short_line(value, expected):
    assert shown(value) == expected


# --- limits ---

LIMITS = [
    ("n_embd", 4, 0, "must be above 0"),
    ("n_head", 1, -1, "must be above 0"),
    ("n_layer", 1, 0, "must be above 0"),
    ("block_size", 1, 0, "must be above 0"),
    ("block_size", 2**31 - 1, 2**31, "must be at most 2147483647"),
    ("dropout", 0.0, -0.01, "must be at least 0"),
    ("dropout", 0.99, 1.0, "must be below 1"),
    ("vocab_size", 1, 0, "must be above 0"),
    ("positions", "rotary", "sine", "must be one of learned, rotary"),
    ("batch_size", 1, 0, "must be above 0"),
    ("max_iters", 1, 0, "must be above 0"),
    ("learning_rate", 1e-12, 0.0, "must be above 0"),
    ("eval_interval", 1, 0, "must be above 0"),
    ("eval_iters", 1, 0, "must be above 0"),
    ("seed", 0, -1, "must be at least 0"),
    ("seed", 2**63 - 1, 2**63, "must be at most 9223372036854775807"),
    ("max_seconds", 0.0, -0.5, "must be at least 0"),
    ("device", "cpu", "", "must not be empty"),
    ("dtype", "bfloat16", "half", "must be one of auto, float32, bfloat16, float16"),
    ("compile", "on", "yes", "must be one of auto, on, off"),
    ("threads", 0, -1, "must be at least 0"),
    ("threads", 1024, 1025, "must be at most 1024"),
    ("optimizer", "sgd", "adam", "must be one of adamw, sgd, muon"),
    ("weight_decay", 0.0, -1.0, "must be at least 0"),
    ("beta1", 0.0, 1.0, "must be below 1"),
    ("beta2", 0.5, -0.5, "must be at least 0"),
    ("lr_schedule", "wsd", "cosin", "must be one of constant, cosine, linear, step, wsd"),
    ("warmup_iters", 0, -1, "must be at least 0"),
    ("min_lr", 0.0, -1e-9, "must be at least 0"),
    ("grad_clip", 0.0, -1.0, "must be at least 0"),
    ("grad_accum_steps", 1, 0, "must be above 0"),
    ("checkpoint_interval", 0, -1, "must be at least 0"),
    ("checkpoint_minutes", 0.0, -1.0, "must be at least 0"),
    ("keep_checkpoints", 1, 0, "must be above 0"),
    ("patience", 0, -1, "must be at least 0"),
    ("export", "last", "newest", "must be one of best, last"),
    ("runs_dir", "elsewhere", "", "must not be empty"),
    ("data_path", "shakespeare", "", "must not be empty"),
    ("val_data", "other.txt", "", "must not be empty"),
    ("train_split", 0.5, 0.0, "must be above 0"),
    ("val_split", 0.01, 1.0, "must be below 1"),
    ("new_characters", "add", "keep", "must be one of refuse, add"),
    ("histogram_interval", 0, -1, "must be at least 0"),
    ("activation_interval", 0, -1, "must be at least 0"),
    ("attention_interval", 0, -1, "must be at least 0"),
    ("embedding_interval", 0, -1, "must be at least 0"),
    ("sample_interval", 0, -1, "must be at least 0"),
    ("gradient_norm_interval", 0, -1, "must be at least 0"),
    ("speed_interval", 0, -1, "must be at least 0"),
    ("port", 1, 0, "must be at least 1"),
    ("port", 65535, 65536, "must be at most 65535"),
]
WITHOUT_LIMITS = {"qk_norm", "zero_init", "output", "playground", "run_tag", "aim", "tensorboard"}


def test_the_table_of_limits_is_complete():
    assert {name for name, *_ in LIMITS} == specs().keys() - WITHOUT_LIMITS


@pytest.mark.parametrize(("name", "last_good", "first_bad", "complaint"), LIMITS)
def test_limits(name, last_good, first_bad, complaint):
    config_class = PARTS[specs()[name].part]
    own_limit = dataclasses.replace(config_class(), **{name: last_good})
    assert [p for p in own_limit.problems() if p.names == (name,)] == []
    beyond = dataclasses.replace(config_class(), **{name: first_bad})
    assert [p.text for p in beyond.problems() if p.names == (name,)] == [
        f"{name} = {shown(first_bad)} {complaint}"
    ]


@pytest.mark.parametrize(
    ("config_class", "name", "value", "complaint"),
    [
        (ModelConfig, "n_embd", "64", "n_embd = '64' must be a whole number"),
        (ModelConfig, "n_embd", 64.0, "n_embd = 64.0 must be a whole number"),
        (ModelConfig, "dropout", math.nan, "dropout = NaN must be finite"),
        (TrainConfig, "compile", False, "compile = false must be text"),
        (TrainConfig, "aim", 1, "aim = 1 must be true or false"),
        (DataConfig, "data_path", None, "data_path = null must be text"),
        (TensorBoardConfig, "port", True, "port = true must be a whole number"),
        (TrainConfig, "learning_rate", math.inf, "learning_rate = Infinity must be finite"),
        (TrainConfig, "output", "a\0b", r"output = 'a\x00b' must hold no null character or half surrogate"),
        (TrainConfig, "output", "\ud800", r"output = '\ud800' must hold no null character or half surrogate"),
    ],
)
def test_a_value_of_the_wrong_type_is_a_problem(config_class, name, value, complaint):
    assert problem_texts(config_class(**{name: value})) == [complaint]


def test_a_whole_number_serves_as_a_number():
    assert ModelConfig(dropout=0).problems() == []


# --- several parameters together ---


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            ModelConfig(n_embd=66),
            "n_embd = 66 must be divisible by n_head = 4 (n_embd = 64 is)",
        ),
        (
            ModelConfig(n_embd=1, n_head=4),
            "n_embd = 1 must be divisible by n_head = 4 (n_embd = 4 is)",
        ),
        (
            ModelConfig(n_embd=36, positions="rotary"),
            "positions = rotary rotates pairs, but a head of n_embd / n_head = 9 is odd"
            " (n_embd = 32 makes it even)",
        ),
        (
            ModelConfig(n_embd=4, positions="rotary"),
            "positions = rotary rotates pairs, but a head of n_embd / n_head = 1 is odd"
            " (n_embd = 8 makes it even)",
        ),
        (
            ModelConfig(n_embd=66, positions="rotary"),
            "n_embd = 66 must be divisible by n_head = 4 (n_embd = 64 is)",
        ),
        (
            TrainConfig(warmup_iters=11, max_iters=10, eval_interval=5),
            "warmup_iters = 11 is longer than the run, max_iters = 10",
        ),
        (
            TrainConfig(min_lr=0.01, learning_rate=0.001),
            "min_lr = 0.01 is above learning_rate = 0.001",
        ),
        (
            TrainConfig(patience=2, eval_interval=11, max_iters=10),
            "patience = 2 needs evaluations on the way, but eval_interval = 11 is longer than max_iters = 10",
        ),
        (
            DataConfig(train_split=0.9, val_split=0.2),
            "train_split = 0.9 and val_split = 0.2 make 1.1, more than the whole text",
        ),
    ],
)
def test_values_that_do_not_go_together(config, expected):
    assert problem_texts(config) == [expected]


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(n_embd=68),
        ModelConfig(n_embd=36, positions="learned"),
        ModelConfig(n_embd=40, positions="rotary"),
        TrainConfig(warmup_iters=10, max_iters=10),
        TrainConfig(min_lr=0.001, learning_rate=0.001),
        TrainConfig(patience=2, eval_interval=10, max_iters=10),
        TrainConfig(patience=0, eval_interval=11, max_iters=10),
        DataConfig(train_split=0.7, val_split=0.3),  # 0.7 + 0.3 rounds to just below 1 or above
        DataConfig(train_split=0.5, val_split=0.1),
        DataConfig(val_data="other.txt", train_split=1.0, val_split=0.2),
    ],
)
def test_values_that_just_go_together(config):
    assert config.problems() == []


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (ModelConfig(n_layer=0, n_embd=66), [("n_layer",), ("n_embd", "n_head")]),
        (TrainConfig(seed=-1, min_lr=1.0), [("seed",), ("min_lr", "learning_rate")]),
        (DataConfig(data_path="", val_split=0.9), [("data_path",), ("train_split", "val_split")]),
    ],
)
def test_a_wrong_value_does_not_hide_values_that_do_not_go_together(config, names):
    assert [problem.names for problem in config.problems()] == names


def test_all_joint_problems_of_a_part_are_found():
    config = TrainConfig(warmup_iters=9, max_iters=5, min_lr=1.0, patience=1, eval_interval=6)
    assert [problem.names for problem in config.problems()] == [
        ("warmup_iters", "max_iters"),
        ("min_lr", "learning_rate"),
        ("patience", "eval_interval", "max_iters"),
    ]


# --- one message ---


def test_one_problem_is_one_line():
    with pytest.raises(Alg1Error) as caught:
        raise_problems([Problem("a is wrong", ("a",))], "mend a")
    assert (caught.value.message, caught.value.hint, caught.value.exit_code) == ("a is wrong", "mend a", 2)


def test_several_problems_are_a_list_under_their_number():
    with pytest.raises(Alg1Error) as caught:
        raise_problems([Problem("a is wrong", ("a",)), Problem("no such name")])
    assert caught.value.message == "2 problems:\n  - a is wrong\n  - no such name"


def test_a_joint_problem_is_not_echoed_when_one_of_its_values_is_wrong_itself():
    joint = Problem("a and b disagree", ("a", "b"))
    with pytest.raises(Alg1Error, match=r"^a is wrong$"):
        raise_problems([Problem("a is wrong", ("a",)), joint])
    with pytest.raises(Alg1Error, match=r"^2 problems:\n  - c is wrong\n  - a and b disagree$"):
        raise_problems([Problem("c is wrong", ("c",)), joint])


def test_no_problem_raises_nothing():
    raise_problems([])


def test_problems_of_all_parts_come_together_with_their_origins():
    values = {"n_layer": 0, "max_iters": 5, "warmup_iters": 6, "val_split": 0.5, "port": 0}
    origins = {"n_layer": "model.json", "warmup_iters": "--warmup-iters", "port": "tensorboard.json"}
    assert [problem.text for problem in Parameters.from_values(values, origins).problems()] == [
        "n_layer = 0 must be above 0 (n_layer from model.json)",
        "warmup_iters = 6 is longer than the run, max_iters = 5 (warmup_iters from --warmup-iters)",
        "train_split = 0.9 and val_split = 0.5 make 1.4, more than the whole text",
        "port = 0 must be at least 1 (port from tensorboard.json)",
    ]


def test_parameters_know_every_value_and_its_origin():
    params = Parameters.from_values({"n_layer": 2, "port": 7000}, {"n_layer": "--n-layer", "port": "f"})
    defaults = {name: spec.default for name, spec in specs().items()}
    assert params.flat() == defaults | {"n_layer": 2, "port": 7000}
    assert (params.model.n_layer, params.tensorboard.port) == (2, 7000)
    assert params.origins == dict.fromkeys(specs(), "default") | {"n_layer": "--n-layer", "port": "f"}


# --- ModelConfig ---


def test_model_config_from_a_dictionary_of_all_parameters():
    config = ModelConfig.from_dict({"n_embd": "32", "dropout": 0, "batch_size": 8, "vocab_size": 10})
    assert config == ModelConfig(n_embd=32, dropout=0.0, vocab_size=10)


def test_the_vocabulary_of_the_corpus_takes_the_place_of_the_given_one():
    given = {"vocab_size": 10}
    assert ModelConfig.from_dict(given, vocab_size=65).vocab_size == 65
    assert given == {"vocab_size": 10}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "vocab_size is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": "many"}, "vocab_size = 'many' must be a whole number"),
        ({"vocab_size": 0}, "vocab_size = 0 must be above 0"),
        ({"vocab_size": 5, "n_embed": 8}, "unknown name 'n_embed'; did you mean n_embd?"),
        (
            {"n_embd": "wide", "n_head": 3, "n_layer": 0},
            "3 problems:\n  - n_embd = 'wide' must be a whole number\n  - n_layer = 0 must be above 0"
            "\n  - vocab_size is missing",
        ),
    ],
)
def test_model_config_lists_what_is_wrong_with_a_dictionary(given, message):
    with pytest.raises(Alg1Error) as caught:
        ModelConfig.from_dict(given)
    assert caught.value.message == message
    assert caught.value.exit_code == 2


def test_model_config_from_a_file(workdir):
    path = workdir / "model.json"
    path.write_text(json.dumps({"_comment": "small", "n_embd": 8, "n_head": 2}), encoding="utf-8")
    assert ModelConfig.from_json(path, vocab_size=3) == ModelConfig(n_embd=8, n_head=2, vocab_size=3)
    with pytest.raises(Alg1Error, match=r"^nowhere\.json: no such file$"):
        ModelConfig.from_json("nowhere.json")


def test_validate_needs_a_vocabulary_and_problems_does_not():
    assert ModelConfig().problems() == []
    ModelConfig(vocab_size=1).validate()
    with pytest.raises(Alg1Error, match=r"^vocab_size is missing$"):
        ModelConfig().validate()


def test_apply_to_model_module_sets_every_global():
    module = types.ModuleType("model")
    config = ModelConfig(n_embd=8, n_head=2, n_layer=1, block_size=5, dropout=0.25, vocab_size=7)
    config.apply_to_model_module(module)
    assert {name: getattr(module, name) for name in dataclasses.asdict(config)} == dataclasses.asdict(config)


sizes = st.one_of(st.integers(-2, 12), st.sampled_from([2**31 - 1, 2**31, 64, 1.0, 2.5, "4", None, True]))
dropouts = st.one_of(
    st.floats(), st.integers(-1, 2), st.sampled_from([0.0, 1.0, math.nextafter(1, 0), "0.1", None, True])
)


def is_size(value) -> bool:
    return type(value) is int and 0 < value < 2**31


@given(n_embd=sizes, n_head=sizes, n_layer=sizes, block_size=sizes, dropout=dropouts, vocab_size=sizes)
def test_a_model_config_is_valid_exactly_when_the_rules_hold(
    n_embd, n_head, n_layer, block_size, dropout, vocab_size
):
    config = ModelConfig(n_embd, n_head, n_layer, block_size, dropout, vocab_size)
    all_sizes = (n_embd, n_head, n_layer, block_size, vocab_size)
    follows_the_rules = (
        all(map(is_size, all_sizes))
        and type(dropout) in (int, float)
        and 0 <= dropout < 1
        and n_embd % n_head == 0
    )
    assert (config.problems() == [] and config.vocab_size is not None) == follows_the_rules


@given(n_head=st.integers(1, 16), width=st.integers(1, 16), dropout=st.floats(0, 1, exclude_max=True))
def test_a_model_config_that_follows_the_rules_is_valid(n_head, width, dropout):
    ModelConfig(n_head * width, n_head, dropout=dropout, vocab_size=1).validate()


@given(n_embd=st.integers(1, 300), n_head=st.integers(2, 40))
def test_the_width_that_is_offered_instead_is_valid(n_embd, n_head):
    problems = ModelConfig(n_embd, n_head).problems()
    if n_embd % n_head:
        offered = int(problems[0].text.rpartition("n_embd = ")[2].removesuffix(" is)"))
        assert ModelConfig(offered, n_head).problems() == []
        assert abs(offered - n_embd) < n_head
    else:
        assert problems == []


# --- JSON files ---

BAD_JSON = [
    (b"", "not JSON: Expecting value: line 1 column 1 (char 0)"),
    (b'{"n_embd": 8,\n "n_head"}', "not JSON: Expecting ':' delimiter: line 2 column 10 (char"),
    (b"[1, 2]", "must hold one JSON object of names and values"),
    (b"null", "must hold one JSON object of names and values"),
    (b'{"seed": 1, "seed": 2}', "'seed' stands there twice"),
    (b'{"a": {"b": 1, "b": 1}}', "'b' stands there twice"),
    (b'{"run_tag": "caf\xe9"}', "not UTF-8 at byte 16"),
    (b'{"seed": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
    (b'{"seed": ' + b"[" * 100_000, "not JSON: maximum recursion depth"),
]


@pytest.mark.parametrize(("content", "message"), BAD_JSON, ids=[message for _, message in BAD_JSON])
def test_a_bad_json_file_is_named_with_its_fault(workdir, content, message):
    (workdir / "config.json").write_bytes(content)
    with pytest.raises(Alg1Error) as caught:
        read_json_object("config.json")
    assert caught.value.message.startswith(f"config.json: {message}")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("path", "message"),
    [("none.json", "none.json: no such file"), (".", ".: cannot be read: Is a directory")],
)
def test_a_json_file_that_is_no_file(workdir, path, message):
    with pytest.raises(Alg1Error) as caught:
        read_json_object(path)
    assert caught.value.message == message


def test_a_json_file_may_begin_with_a_bom(workdir):
    (workdir / "config.json").write_bytes(b'\xef\xbb\xbf{"seed": 5}')
    assert read_json_object("config.json") == {"seed": 5}


def test_legacy_configuration_is_read_as_it_stands(workdir):
    (workdir / "config.json").write_text('{"batch_size": "8", "colour": "red"}', encoding="utf-8")
    assert load_config() == {"batch_size": "8", "colour": "red"}


def test_validate_config_lists_every_problem():
    validate_config({"batch_size": 8, "n_embd": 128})
    with pytest.raises(Alg1Error) as caught:
        validate_config({"batchsize": 8, "n_embd": 30, "dropout": 1, "seed": "x"})
    assert caught.value.message.splitlines() == [
        "4 problems:",
        "  - unknown name 'batchsize'; did you mean batch_size?",
        "  - seed = 'x' must be a whole number",
        "  - dropout = 1.0 must be below 1",
        "  - n_embd = 30 must be divisible by n_head = 4 (n_embd = 32 is)",
    ]


@pytest.mark.parametrize(
    "word, known, found",
    [
        ("--temp", ["--stop", "--temperature", "--top-k"], "--temperature"),
        (":temp", [":help", ":temperature"], ":temperature"),
        ("--lr", ["--min-lr", "--learning-rate", "--lr-schedule"], "--learning-rate"),
        ("max_steps", ["max_iters", "seed"], "max_iters"),
        ("learning_rat", ["learning_rate", "seed"], "learning_rate"),
        ("--n-lyer", ["--n-layer", "--n-head"], "--n-layer"),
        ("qqqq", ["seed"], ""),
        ("N_EMBD", ["n_embd", "n_head"], "n_embd"),
        ("--nope", ["--compile"], ""),  # dashes make no words alike
        ("corpus", ["data_path", "seed"], "data_path"),
        ("data", ["data_path", "seed"], "data_path"),
        ("--data-path", ["--data", "--seed"], "--data"),
        (":max_length", [":length", ":seed"], ":length"),
        (":max_new_tokens", [":length", ":seed"], ":length"),
        ("--length", ["--max-new-tokens", "--seed"], "--max-new-tokens"),
        ("--corpus", ["--data", "--seed"], "--data"),
        ("--", ["--seed"], ""),
        ("batchsize", ["batch_size"], "batch_size"),
        ("--export-onnx", ["--export", "--runs-dir"], ""),  # another word is no typing error
        ("learning_rate_decay", ["learning_rate", "weight_decay"], ""),
    ],
)
def test_the_word_that_was_meant(word, known, found):
    assert nearest(word, known) == (f"; did you mean {found}?" if found else "")
