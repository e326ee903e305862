"""Every parameter of ALG1: typed dataclasses, one field for each flag, file key and line of --print-config.

To add a parameter, add a field here with `setting(default, help, limits)`, then run
`python docs/write_configs.py`, which writes it to configs/. The flag, the file key, the validation and the
listing are made from the field. What a resumed run may change is `changeable` instead. An option of the model
is added to `MODEL_OPTIONS` too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import read_json_object
from utils_alg1.base.problems import Problem, explain, raise_problems, shown
from utils_alg1.base.settings import Spec, changeable, coerce, field_names, setting, yaml_line, yaml_value

DEFAULT = "default"  # the origin of a value that nothing sets
CONFIG_DIR = "configs"  # its files are read at every start, unless --config names another folder
CONFIG_FILES = {  # part -> file name, in merging order. A key may be in any file; the last one wins.
    "model": "model.json",
    "train": "train.yaml",
    "data": "data.yaml",
    "tensorboard": "tensorboard.json",
}


@dataclass
class Part:
    """A group of parameters, each of them a field made with `setting`."""

    def problems(self) -> list[Problem]:
        """Return what is wrong with the values, for `raise_problems`; wrong ones count as their defaults."""
        found: list[Problem] = []
        usable = dataclasses.replace(self)
        for name, value in vars(self).items():
            if complaint := specs()[name].violation(value):
                found.append(Problem(f"{name} = {shown(value)} {complaint}", (name,)))
                setattr(usable, name, specs()[name].default)
        return [*found, *usable.joint_problems()]

    def joint_problems(self) -> Iterator[Problem]:
        """Yield what is wrong with several values taken together, each of which is good by itself."""
        yield from ()


@dataclass
class ModelConfig(Part):
    """The network: a decoder-only transformer."""

    n_embd: int = setting(64, "embedding dimension", above=0)
    n_head: int = setting(4, "number of attention heads per block; must divide n_embd", above=0)
    n_layer: int = setting(4, "number of transformer blocks", above=0)
    block_size: int = setting(32, "context length in characters", above=0)
    dropout: float = setting(0.0, "dropout probability", minimum=0, below=1)
    vocab_size: int | None = setting(None, "number of distinct characters; by default the text's", above=0)
    positions: str = setting("learned", "position embeddings; rotary is RoPE", choices=("learned", "rotary"))
    qk_norm: bool = setting(False, "QK-norm: RMS-normalize the queries and keys of each head")
    zero_init: bool = setting(False, "zero-initialize the output projections of attention and feed-forward")

    @classmethod
    def from_json(cls, path: str | Path, vocab_size: int | None = None) -> ModelConfig:
        """Read a JSON file of parameters; see `from_dict`. Raises Alg1Error if that is not possible."""
        return cls.from_dict(read_json_object(path), vocab_size)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], vocab_size: int | None = None) -> ModelConfig:
        """Build a config from a dictionary, which may contain other parameters of a run too.

        `vocab_size`, if given, replaces the dictionary's. Raises Alg1Error that lists every problem.
        """
        values = dict(config_dict)
        if vocab_size is not None:
            values["vocab_size"] = vocab_size
        good, problems = coerce_all(values)
        config = cls(**{name: value for name, value in good.items() if name in field_names(cls)})
        problems += config.problems()
        if values.get("vocab_size") is None:  # a wrong one is a problem already
            problems.append(NO_VOCAB_SIZE)
        raise_problems(problems)
        return config

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_parameters(self) -> int:
        """The number of weights of the network; vocab_size must be known."""
        assert self.vocab_size is not None
        C, V = self.n_embd, self.vocab_size
        tables = V * C + (self.block_size * C if self.positions == "learned" else 0)
        block = 12 * C * C + 10 * C  # matrices; biases and two LayerNorms
        head = V * C + V
        return tables + self.n_layer * block + 2 * C + head  # 2 C: the final LayerNorm

    def stored(self) -> dict[str, Any]:
        """Return the values for a file, as in older ones without the MODEL_OPTIONS at their defaults."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in MODEL_OPTIONS or value != MODEL_OPTIONS[name]
        }

    def joint_problems(self) -> Iterator[Problem]:
        if self.n_embd % self.n_head:
            width = max(1, round(self.n_embd / self.n_head)) * self.n_head
            yield Problem(
                f"n_embd = {self.n_embd} must be divisible by n_head = {self.n_head} (n_embd = {width} is)",
                ("n_embd", "n_head"),
            )
        elif self.positions == "rotary" and self.head_size % 2:
            even = max(2, round(self.n_embd / self.n_head / 2) * 2) * self.n_head
            yield Problem(
                f"positions = rotary rotates pairs, but a head of n_embd / n_head = {self.head_size} is odd"
                f" (n_embd = {even} makes it even)",
                ("n_embd", "n_head", "positions"),
            )

    def validate(self) -> None:
        """Raise Alg1Error that lists every problem, if there is one."""
        raise_problems(self.problems() + ([NO_VOCAB_SIZE] if self.vocab_size is None else []))

    def check_vocab_size(self, vocab_size: int) -> None:
        """Raise Alg1Error if vocab_size is set, and not that of the vocabulary."""
        if self.vocab_size not in (None, vocab_size):
            raise Alg1Error(
                f"vocab_size = {self.vocab_size}, but the vocabulary has {vocab_size} characters",
                "leave vocab_size out: it is read from the text, or from the model of --init-from",
            )

    def apply_to_model_module(self, model: types.ModuleType) -> None:
        """Set the globals of `model.py` that `BigramLanguageModel()` reads without a config."""
        for name in field_names(type(self)):
            setattr(model, name, getattr(self, name))


NO_VOCAB_SIZE = Problem("vocab_size is missing", ("vocab_size",))
# Options of the model that are not in the reference model, with the value that is the reference model. Files
# from before an option existed do not contain it, and have that value. A new option is added here too.
MODEL_OPTIONS: dict[str, Any] = {
    name: getattr(ModelConfig, name) for name in ("positions", "qk_norm", "zero_init")
}
# Those that tables of runs show first.
MAIN_PARAMETERS = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "learning_rate")


@dataclass
class TrainConfig(Part):
    """Training, and what a run keeps."""

    batch_size: int = setting(4, "sequences per micro-batch", above=0)
    max_iters: int = changeable(5000, "number of training steps", above=0)
    max_seconds: float = changeable(
        0.0, "seconds of training after which the run saves and ends, as at SIGTERM; 0: no limit", minimum=0
    )
    learning_rate: float = setting(1e-3, "peak learning rate", above=0)
    eval_interval: int = changeable(100, "steps between evaluations; there is one at the end too", above=0)
    eval_iters: int = changeable(
        20,
        "an evaluation reads 4 x eval_iters sequences of each split",
        above=0,
    )
    seed: int = setting(1337, "random seed", minimum=0, maximum=2**63 - 1)
    device: str = changeable("auto", "device: auto (CUDA or the CPU), cpu, cuda, cuda:N, mps, xpu or xpu:N")
    dtype: str = setting(
        "auto",
        "data type of the products; auto: the fastest, on a CPU by processor and sizes",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    compile: str = changeable(
        "auto", "torch.compile of the step; auto: for long runs on CUDA", choices=("auto", "on", "off")
    )
    threads: int = changeable(
        0,
        "CPU threads; 0 or auto: one for small training steps, else PyTorch's default",
        minimum=0,
        maximum=1024,
        auto=0,
    )
    optimizer: str = setting(
        "adamw", "optimizer; muon: for hidden matrices, AdamW for the rest", choices=("adamw", "sgd", "muon")
    )
    weight_decay: float = setting(0.01, "weight decay of matrices; other weights have none", minimum=0)
    beta1: float = setting(0.9, "AdamW's beta1; momentum of SGD and Muon", minimum=0, below=1)
    beta2: float = setting(0.999, "AdamW's beta2", minimum=0, below=1)
    lr_schedule: str = setting(
        "constant",
        "learning rate schedule; wsd: warm-up, stable, decay",
        choices=("constant", "cosine", "linear", "step", "wsd"),
    )
    warmup_iters: int = setting(0, "steps of linear learning rate warm-up", minimum=0)
    min_lr: float = setting(0.0, "learning rate at the end of the schedule", minimum=0)
    grad_clip: float = setting(0.0, "maximum gradient norm; 0: no clipping", minimum=0)
    # The number of micro-batches over all processes must stay the same.
    grad_accum_steps: int = changeable(
        1, "gradient accumulation steps: micro-batches per training step, in each process", above=0
    )
    checkpoint_interval: int = changeable(
        500,
        "steps between checkpoints, besides those by the clock, at a new best and at the end; 0: only those",
        minimum=0,
    )
    checkpoint_minutes: float = changeable(
        5.0, "minutes after which there is a checkpoint in any case; 0: none by the clock", minimum=0
    )
    keep_checkpoints: int = changeable(2, "number of newest checkpoints to keep, besides the best", above=0)
    patience: int = changeable(
        0, "early stopping: evaluations without a new best val loss before the run ends; 0: off", minimum=0
    )
    export: str = changeable(
        "best", "weights to export: those of the best val loss, or the last", choices=("best", "last")
    )
    playground: bool = changeable(True, "a playground in eval/report.html, for up to a million parameters")
    output: str | None = changeable(None, "file to write the export to as well", is_path=True)
    runs_dir: str = changeable("runs", "folder of the run directories", is_path=True)
    run_tag: str = changeable("", "text to append to the run's name")
    aim: bool = changeable(True, "log to Aim")

    def joint_problems(self) -> Iterator[Problem]:
        if self.warmup_iters > self.max_iters:
            yield Problem(
                f"warmup_iters = {self.warmup_iters} is longer than the run, max_iters = {self.max_iters}",
                ("warmup_iters", "max_iters"),
            )
        if self.min_lr > self.learning_rate:
            yield Problem(
                f"min_lr = {self.min_lr:g} is above learning_rate = {self.learning_rate:g}",
                ("min_lr", "learning_rate"),
            )
        if self.patience and self.eval_interval > self.max_iters:
            yield Problem(
                f"patience = {self.patience} needs evaluations on the way, but"
                f" eval_interval = {self.eval_interval} is longer than max_iters = {self.max_iters}",
                ("patience", "eval_interval", "max_iters"),
            )


@dataclass
class DataConfig(Part):
    """The text, and how it is split."""

    # The texts themselves must stay the same: checkpoints contain their digests.
    data_path: str = changeable(
        "data/input.txt",
        "UTF-8 text: a file, a folder, a pattern in quotes, or a named corpus such as shakespeare",
        flag="--data",
        is_path=True,
    )
    val_data: str | None = changeable(
        None,
        "another text for validation; then all of the first is for training, and no split is used",
        is_path=True,
    )
    train_split: float = setting(0.9, "fraction of the text for training", above=0, maximum=1)
    val_split: float = setting(0.1, "fraction of the text for validation", above=0, below=1)
    new_characters: str = setting(
        "refuse",
        "what to do with characters of the text that the model of --init-from lacks: refuse the text, or add"
        " them with new weights",
        choices=("refuse", "add"),
    )

    def joint_problems(self) -> Iterator[Problem]:
        total = self.train_split + self.val_split
        if total > 1 + 1e-9 and self.val_data is None:
            yield Problem(
                f"train_split = {self.train_split:g} and val_split = {self.val_split:g}"
                f" make {total:g}, more than the whole text"
                + ("; val_data names another one for validation" if self.train_split == 1 else ""),
                ("train_split", "val_split"),
            )

    def unused_splits(self) -> list[str]:
        """Return the splits that are set although val_data takes their place, each as "name = value"."""
        names = []
        if self.val_data is not None:
            if self.train_split not in (DataConfig.train_split, 1):  # 1: all of the text, as with val_data
                names.append("train_split")
            if self.val_split != DataConfig.val_split:
                names.append("val_split")
        return [f"{name} = {getattr(self, name):g}" for name in names]


def interval(default: int, what: str) -> Any:
    """Return a setting for a logging interval in steps."""
    return changeable(default, f"steps between {what}; 0: never", minimum=0)


@dataclass
class TensorBoardConfig(Part):
    """TensorBoard, and how often both trackers log what."""

    tensorboard: bool = changeable(True, "log to TensorBoard")
    histogram_interval: int = interval(500, "histograms of parameters and gradients")
    activation_interval: int = interval(500, "histograms of activations")
    attention_interval: int = interval(1000, "images of the attention weights")
    embedding_interval: int = interval(1000, "snapshots of the token embeddings")
    sample_interval: int = interval(1000, "samples of generated text")
    gradient_norm_interval: int = interval(10, "values of the gradient norm")
    speed_interval: int = interval(100, "values of tokens per second")
    port: int = changeable(6006, "port of --serve-tensorboard", minimum=1, maximum=65535)


def due(step: int, interval: int) -> bool:
    """Return whether something that happens every `interval` steps happens at `step`; never if 0."""
    return interval > 0 and step % interval == 0


@dataclass
class Parameters:
    """All parameters of a run, and the origin of each value: "default", a file or a flag."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    tensorboard: TensorBoardConfig
    origins: dict[str, str]

    @classmethod
    def from_values(cls, values: Mapping[str, Any], origins: Mapping[str, str]) -> Parameters:
        """Build all parameters without checking them; `values` are of the right types (see `coerce_all`)."""
        parts = {
            part: config_class(**{n: values[n] for n in field_names(config_class) if n in values})
            for part, config_class in PARTS.items()
        }
        return cls(**parts, origins={name: origins.get(name, DEFAULT) for name in specs()})

    def problems(self) -> list[Problem]:
        """Return what is wrong with the values, with their origins."""
        found = [problem for part in PARTS for problem in getattr(self, part).problems()]
        for i, (text, names) in enumerate(found):
            given = [f"{name} from {self.origins[name]}" for name in names if self.origins[name] != DEFAULT]
            found[i] = Problem(f"{text} ({', '.join(given)})" if given else text, names)
        return found

    def flops_per_micro_batch(self) -> float:
        """Estimate the floating-point operations of the forward and backward pass of a micro-batch.

        6 x weights of the blocks x characters (Kaplan et al. 2020, Scaling Laws for Neural Language Models).
        """
        characters = self.train.batch_size * self.model.block_size
        return 6.0 * 12 * self.model.n_layer * self.model.n_embd**2 * characters

    def changed(self) -> dict[str, Any]:
        """Return the values that differ from the defaults, by name."""
        return {name: value for name, value in self.flat().items() if value != specs()[name].default}

    def flat(self) -> dict[str, Any]:
        """Return every parameter by name."""
        return {name: getattr(getattr(self, spec.part), name) for name, spec in specs().items()}

    def to_yaml(self) -> str:
        """Format every value, with its origin and its help as a comment, as YAML that --config takes."""
        sections = []
        for part, config_class in PARTS.items():
            lines = [f"# --- {part}: {config_class.__doc__}"]
            for name, value in vars(getattr(self, part)).items():
                comment = f"{yaml_value(self.origins[name]):<24}  {specs()[name].explanation}"
                lines.append(yaml_line(name, value, comment))
            sections.append("\n".join(lines) + "\n")
        return "\n".join(sections)


PARTS: dict[str, Any] = {
    "model": ModelConfig,
    "train": TrainConfig,
    "data": DataConfig,
    "tensorboard": TensorBoardConfig,
}


@functools.cache
def specs() -> dict[str, Spec]:
    """Return the specification of every parameter, by name, in the order of the dataclasses."""
    found: dict[str, Spec] = {}
    for part, config_class in PARTS.items():
        hints = typing.get_type_hints(config_class)
        for f in dataclasses.fields(config_class):
            hint = hints[f.name]
            kind = typing.get_args(hint)[0] if typing.get_args(hint) else hint  # int of int | None
            known = {**f.metadata, "flag": f.metadata["flag"] or "--" + f.name.replace("_", "-")}
            found[f.name] = Spec(name=f.name, part=part, type=kind, default=f.default, **known)
    return found


def coerce_all(values: Mapping[str, Any], origin: str = "") -> tuple[dict[str, Any], list[Problem]]:
    """Convert values from `origin` to the types of the parameters; each that cannot be is a problem."""
    good: dict[str, Any] = {}
    problems: list[Problem] = []
    where = f"{origin}: " if origin else ""
    known = specs()
    for name, value in values.items():
        if name == "_comment":  # JSON has no comments
            continue
        if name in known:
            try:
                good[name] = coerce(known[name], value)
            except ValueError as error:
                problems.append(Problem(f"{where}{name} = {shown(value)} {error}", (name,)))
        else:
            section = "; there are no sections: move its names to the top level"
            meant = section if isinstance(value, dict) else explain(str(name), known, value)
            problems.append(Problem(f"{where}unknown name {shown(name)}{meant}"))
    return good, problems


def format_settings(file_name: str | Path, about: str, values: Mapping[str, Any]) -> str:
    """Format parameters with their help as JSON or YAML, by the suffix; `about` is a comment at the top."""
    helps = {name: specs()[name].explanation for name in values}
    if Path(file_name).suffix == ".json":
        comment = [*about.splitlines(), *(f"{name}: {text}" for name, text in helps.items())]
        return json.dumps({"_comment": comment, **values}, indent=2, ensure_ascii=False) + "\n"
    lines = [f"# {line}" for line in about.splitlines()]
    lines += [yaml_line(name, value, helps[name]) for name, value in values.items()]
    return "\n".join(lines) + "\n"
