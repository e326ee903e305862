"""Every parameter of ALG1: typed dataclasses, one field for each flag, file key and line of --print-config.

To add a parameter, add a field here with `setting(default, help, limits)`; the flag, the file key, the
validation and the listing follow from it. Nothing else in the project writes a default down.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import read_json_object
from utils_alg1.base.problems import (
    Problem,
    joint_problem,
    named_origin,
    names_in,
    nearest,
    raise_problems,
    shown,
)
from utils_alg1.base.settings import A_PATH, TYPE_NAMES, Spec, coerce, field_names, setting


@dataclass
class ModelConfig:
    """The network: a decoder-only transformer, sized by these numbers."""

    n_embd: int = setting(64, "width of the embeddings and of every block", above=0)
    n_head: int = setting(4, "attention heads in a block; n_embd is divisible by it", above=0)
    n_layer: int = setting(4, "transformer blocks", above=0)
    block_size: int = setting(32, "longest context, in characters", above=0)
    dropout: float = setting(0.0, "share of activations dropped while training", minimum=0, below=1)
    vocab_size: int | None = setting(None, "distinct characters; read from the corpus when left out", above=0)
    positions: str = setting(
        "learned",
        "how a character's place is told: a learned vector, or rotary: turned queries and keys",
        choices=("learned", "rotary"),
    )
    qk_norm: bool = setting(False, "give the queries and keys of every head one length")
    zero_init: bool = setting(False, "start every block as one that adds nothing: its last matrices are zero")

    @classmethod
    def from_json(cls, path: str | Path, vocab_size: int | None = None) -> ModelConfig:
        """Read a JSON file of parameters; see `from_dict`.

        Raises:
            Alg1Error: the file is not there or not a JSON object, or a value in it is wrong.
        """
        return cls.from_dict(read_json_object(path), vocab_size)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], vocab_size: int | None = None) -> ModelConfig:
        """Build and validate from a dictionary, which may hold the other parameters of a run as well.

        `vocab_size`, where given, is the corpus's and takes the place of the dictionary's.

        Raises:
            Alg1Error: listing every problem: unknown names, wrong types, values out of range or missing.
        """
        values = dict(config_dict)
        if vocab_size is not None:
            values["vocab_size"] = vocab_size
        good, problems = coerce_all(values)
        config = cls(**{name: value for name, value in good.items() if name in field_names(cls)})
        missing = values.get("vocab_size") is None  # a wrong one is a problem already
        raise_problems([*problems, *config.problems(need_vocab_size=missing)])
        return config

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_parameters(self) -> int:
        """How many weights a network of these sizes has; vocab_size is known."""
        assert self.vocab_size is not None
        C, V = self.n_embd, self.vocab_size
        tables = V * C + (self.block_size * C if self.positions == "learned" else 0)
        block = 12 * C * C + 10 * C  # matrices; biases and two LayerNorms
        head = V * C + V
        return tables + self.n_layer * block + 2 * C + head  # 2 C: the last LayerNorm

    def stored(self) -> dict[str, Any]:
        """As files hold it: without options at their defaults, so that the reference model's have none."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in MODEL_OPTIONS or value != MODEL_OPTIONS[name]
        }

    def problems(self, need_vocab_size: bool = False) -> list[Problem]:
        """What is wrong with these values; an empty list when nothing is."""
        found = range_problems(self)
        wrong = names_in(found)
        if not wrong & {"n_embd", "n_head"} and self.n_embd % self.n_head:
            width = max(1, round(self.n_embd / self.n_head)) * self.n_head
            found += joint_problem(
                f"n_embd = {self.n_embd} must be divisible by n_head = {self.n_head} (n_embd = {width} is)",
                "n_embd",
                "n_head",
            )
        elif (
            not wrong & {"n_embd", "n_head", "positions"}
            and self.positions == "rotary"
            and self.head_size % 2
        ):
            even = max(2, round(self.n_embd / self.n_head / 2) * 2) * self.n_head
            found += joint_problem(
                f"positions = rotary turns pairs, but a head of n_embd / n_head = {self.head_size} is odd"
                f" (n_embd = {even} makes it even)",
                "n_embd",
                "n_head",
                "positions",
            )
        if need_vocab_size and self.vocab_size is None:
            found += joint_problem("vocab_size is missing", "vocab_size")
        return found

    def validate(self) -> None:
        """Check every value.

        Raises:
            Alg1Error: listing every problem at once.
        """
        raise_problems(self.problems(need_vocab_size=True))

    def check_vocab_size(self, vocab_size: int) -> None:
        """Check that a vocab_size that was asked for is the text's.

        Raises:
            Alg1Error: naming both.
        """
        if self.vocab_size not in (None, vocab_size):
            raise Alg1Error(
                f"vocab_size = {self.vocab_size}, but the text has {vocab_size} distinct characters",
                "leave vocab_size out: it is read from the text",
            )

    def apply_to_model_module(self, model: types.ModuleType) -> None:
        """Set the globals that `model.BigramLanguageModel()` reads when it is given no config."""
        for name in field_names(type(self)):
            setattr(model, name, getattr(self, name))


# What departs from the reference model, and its value there: files from before these were known have none.
MODEL_OPTIONS: dict[str, Any] = {
    name: getattr(ModelConfig, name) for name in ("positions", "qk_norm", "zero_init")
}


@dataclass
class TrainConfig:
    """The training of it, and where the run is kept."""

    batch_size: int = setting(4, "sequences in a micro-batch", above=0)
    max_iters: int = setting(5000, "training steps", above=0, may_change=True)
    learning_rate: float = setting(1e-3, "peak learning rate", above=0)
    eval_interval: int = setting(
        100, "steps between evaluations; there is always one at the end", above=0, may_change=True
    )
    eval_iters: int = setting(20, "batches in an evaluation, of each split", above=0, may_change=True)
    seed: int = setting(1337, "the same seed gives the same run", minimum=0, maximum=2**63 - 1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", may_change=True)
    dtype: str = setting(
        "auto",
        "arithmetic of the forward pass; auto is bfloat16 or float16 on CUDA, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    compile: str = setting(
        "auto",
        "torch.compile of the training step; auto is on for a long run on CUDA, where it ends sooner",
        choices=("auto", "on", "off"),
        may_change=True,
    )
    threads: int = setting(
        0,
        "CPU threads; 0 is one for a small step, else PyTorch's choice",
        minimum=0,
        maximum=1024,
        may_change=True,
    )
    optimizer: str = setting("adamw", "how weights are updated", choices=("adamw", "sgd", "muon"))
    weight_decay: float = setting(0.01, "decay of weight matrices", minimum=0)
    beta1: float = setting(0.9, "AdamW's first moment, the momentum of SGD and Muon", minimum=0, below=1)
    beta2: float = setting(0.999, "AdamW's second moment", minimum=0, below=1)
    lr_schedule: str = setting(
        "constant",
        "learning rate over the steps; wsd is warm-up, stable, decay",
        choices=("constant", "cosine", "linear", "step", "wsd"),
    )
    warmup_iters: int = setting(0, "steps over which the learning rate rises from zero", minimum=0)
    min_lr: float = setting(0.0, "what the schedule decays to", minimum=0)
    grad_clip: float = setting(0.0, "largest gradient norm; 0 does not clip", minimum=0)
    grad_accum_steps: int = setting(
        1,
        "micro-batches summed into one step, by each process",
        above=0,
        may_change=True,  # its product with the number of processes may not
    )
    checkpoint_interval: int = setting(
        500,
        "steps between checkpoints, beside those at a better val loss and at the end; 0 is only those",
        minimum=0,
        may_change=True,
    )
    keep_checkpoints: int = setting(2, "newest checkpoints kept, beside the best", above=0, may_change=True)
    patience: int = setting(
        0,
        "evaluations without a better val loss that end the run; 0 never does",
        minimum=0,
        may_change=True,
    )
    export: str = setting(
        "best", "which weights are exported at the end", choices=("best", "last"), may_change=True
    )
    output: str | None = setting(None, "also write the export to this file", may_change=True)
    runs_dir: str = setting("runs", "folder of the run directories", may_change=True)
    run_tag: str = setting("", "words for the end of the run's name", may_be_empty=True, may_change=True)
    aim: bool = setting(True, "track with Aim", may_change=True)

    def problems(self) -> list[Problem]:
        """What is wrong with these values; an empty list when nothing is."""
        found = range_problems(self)
        wrong = names_in(found)
        if not wrong & {"warmup_iters", "max_iters"} and self.warmup_iters > self.max_iters:
            found += joint_problem(
                f"warmup_iters = {self.warmup_iters} is longer than the run, max_iters = {self.max_iters}",
                "warmup_iters",
                "max_iters",
            )
        if not wrong & {"min_lr", "learning_rate"} and self.min_lr > self.learning_rate:
            found += joint_problem(
                f"min_lr = {self.min_lr:g} is above learning_rate = {self.learning_rate:g}",
                "min_lr",
                "learning_rate",
            )
        evaluations = {"patience", "eval_interval", "max_iters"}
        if not wrong & evaluations and self.patience and self.eval_interval > self.max_iters:
            found += joint_problem(
                f"patience = {self.patience} needs evaluations on the way, but"
                f" eval_interval = {self.eval_interval} is longer than max_iters = {self.max_iters}",
                "patience",
                "eval_interval",
                "max_iters",
            )
        return found


@dataclass
class DataConfig:
    """The text."""

    data_path: str = setting(
        "data/input.txt",
        "a UTF-8 text file, or one of the names shakespeare and python-docs",
        stands_for=(A_PATH,),
        flag="--data",
        may_change=True,  # the checkpoint holds the text's digest, which may not
    )
    train_split: float = setting(0.9, "share of the text to train on", above=0, below=1)
    val_split: float = setting(0.1, "share of the text to evaluate on", above=0, below=1)

    def problems(self) -> list[Problem]:
        """What is wrong with these values; an empty list when nothing is."""
        found = range_problems(self)
        wrong = names_in(found)
        if wrong & {"train_split", "val_split"}:
            return found
        total = self.train_split + self.val_split
        if total > 1 + 1e-9:
            found += joint_problem(
                f"train_split = {self.train_split:g} and val_split = {self.val_split:g}"
                f" make {total:g}, more than the whole text",
                "train_split",
                "val_split",
            )
        return found


@dataclass
class TensorBoardConfig:
    """TensorBoard, and how often a run is looked at, which Aim is shown too."""

    tensorboard: bool = setting(True, "track with TensorBoard", may_change=True)
    histogram_interval: int = setting(
        500,
        "steps between histograms of parameters and gradients; 0 draws none",
        minimum=0,
        may_change=True,
    )
    activation_interval: int = setting(
        500, "steps between histograms of activations; 0 draws none", minimum=0, may_change=True
    )
    attention_interval: int = setting(
        1000,
        "steps between pictures of the attention weights; 0 draws none",
        minimum=0,
        may_change=True,
    )
    embedding_interval: int = setting(
        1000, "steps between views of the token embeddings; 0 keeps none", minimum=0, may_change=True
    )
    sample_interval: int = setting(
        1000, "steps between samples of generated text; 0 draws none", minimum=0, may_change=True
    )
    gradient_norm_interval: int = setting(
        10, "steps between points of the gradient's norm; 0 has none", minimum=0, may_change=True
    )
    speed_interval: int = setting(
        100, "steps between points of tokens per second; 0 has none", minimum=0, may_change=True
    )
    port: int = setting(6006, "port of --serve-tensorboard", minimum=1, maximum=65535, may_change=True)

    def problems(self) -> list[Problem]:
        """What is wrong with these values; an empty list when nothing is."""
        return range_problems(self)


def due(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps happens at this one; 0 is never."""
    return interval > 0 and step % interval == 0


@dataclass
class Parameters:
    """All parameters of a run, and where each value came from ("default", a file, a flag)."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    tensorboard: TensorBoardConfig
    origins: dict[str, str]

    @classmethod
    def from_values(
        cls, values: Mapping[str, Any], origins: Mapping[str, str], problems: list[Problem]
    ) -> Parameters:
        """Build from values of the right types (see `coerce_all`) and where each came from.

        Raises:
            Alg1Error: `problems` found so far and every further one, in one message.
        """
        parts = build_parts(values)
        raise_problems([*problems, *part_problems(parts, origins)])
        return cls(**parts, origins={name: origins.get(name, "default") for name in specs()})

    def flops_per_step(self) -> float:
        """Floating-point operations of a training step, roughly: six for each weight of the blocks and
        character (Kaplan et al. 2020, Scaling Laws for Neural Language Models)."""
        weights = 12 * self.model.n_layer * self.model.n_embd**2
        characters = self.train.batch_size * self.train.grad_accum_steps * self.model.block_size
        return 6.0 * weights * characters

    def changed(self) -> dict[str, Any]:
        """The values that are not the defaults, by name."""
        return {name: value for name, value in self.flat().items() if value != specs()[name].default}

    def flat(self) -> dict[str, Any]:
        """Every parameter by name."""
        return {
            name: value for part in PARTS for name, value in dataclasses.asdict(getattr(self, part)).items()
        }


PARTS: dict[str, Any] = {
    "model": ModelConfig,
    "train": TrainConfig,
    "data": DataConfig,
    "tensorboard": TensorBoardConfig,
}


def build_parts(values: Mapping[str, Any]) -> dict[str, Any]:
    """The dataclasses of PARTS, by their keys there, unchecked; what `values` leaves out is the default."""
    return {
        part: config_class(**{n: values[n] for n in field_names(config_class) if n in values})
        for part, config_class in PARTS.items()
    }


def part_problems(parts: Mapping[str, Any], origins: Mapping[str, str]) -> list[Problem]:
    """What is wrong with the values of `build_parts`, each with where it came from."""
    found = [problem for config in parts.values() for problem in config.problems()]
    return [named_origin(problem, origins) for problem in found]


@functools.cache
def specs() -> dict[str, Spec]:
    """Every parameter by name, in the order of the dataclasses."""
    found: dict[str, Spec] = {}
    for part, config_class in PARTS.items():
        hints = typing.get_type_hints(config_class)
        for f in dataclasses.fields(config_class):
            kinds = [kind for kind in typing.get_args(hints[f.name]) if kind is not type(None)]
            found[f.name] = Spec(
                name=f.name,
                part=part,
                type=kinds[0] if kinds else hints[f.name],
                optional=bool(kinds),
                default=f.default,
                limits=f.metadata["limits"],
            )
    return found


def coerce_all(
    values: Mapping[str, Any], origin: str | None = None, flags_only: Container[str] = ()
) -> tuple[dict[str, Any], list[Problem]]:
    """Coerce a flat dictionary of parameters: the good values, and a problem for each of the others.

    Args:
        origin: where the values come from, as a problem names it.
        flags_only: names that are no parameters but flags of train.py.
    """
    good: dict[str, Any] = {}
    problems: list[Problem] = []
    where = f"{origin}: " if origin else ""
    known = specs()
    for name, value in values.items():
        if name == "_comment":  # JSON has no comments of its own
            continue
        if name not in known:
            text = f"{where}unknown name {shown(name)}{nearest(str(name), known)}"
            if str(name).replace("-", "_") in flags_only:
                text = f"{where}{shown(name)} is a flag of train.py only"
            elif isinstance(value, dict):
                text = (
                    f"{where}{shown(name)} is a section, and there are none: move its names to the top level"
                )
            problems.append(Problem(text, ()))
            continue
        try:
            good[name] = coerce(known[name], value)
        except ValueError as error:
            problems.append(Problem(f"{where}{name} = {shown(value)} {error}", (name,)))
    return good, problems


def range_problems(config: Any) -> list[Problem]:
    """Every field of a dataclass whose value has the wrong type or is outside its limits."""
    problems = []
    for name in field_names(type(config)):
        spec, value = specs()[name], getattr(config, name)
        fitting = (int, float) if spec.type is float else spec.type
        try:
            complaint = spec.limits.broken_by(coerce(spec, value))
            if value is not None and not isinstance(value, fitting):  # text that is a number, say
                complaint = f"must be {TYPE_NAMES[spec.type]}"
        except ValueError as error:
            complaint = str(error)
        if complaint:
            problems.append(Problem(f"{name} = {shown(value)} {complaint}", (name,)))
    return problems
