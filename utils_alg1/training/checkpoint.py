"""Checkpoints: one verified file for each, written atomically, the last few and the best kept.

A checkpoint holds the model, the optimizer's state and, as JSON, everything else a run needs to go on with
the same bytes. There is no random state in it: see `utils_runtime.derive_seed`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model import BigramLanguageModel
from parameters import ModelConfig, coerce_all
from utils_alg1.base.errors import Alg1Error, disk_error
from utils_alg1.network.tensor_file import read_tensors, write_tensors
from utils_alg1.run_directory import (
    CHECKPOINT_NAME,
    RunFolder,
    checkpoint_path,
    checkpoint_paths,
    checkpoint_step,
)
from utils_alg1.training.progress import Evaluation, Progress
from utils_alg1.training.trainer import Trainer
from utils_alg1.utils_output import LOGGER

FORMAT = "alg1-checkpoint"
FORMAT_VERSION = 1
OTHER_CHECKPOINT = "use another checkpoint, written by train.py"
LARGE = 1e300  # no figure of a run comes near


@dataclass
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        tensors: "model.<name>" and "optimizer.<state>.<name>".
        metadata: see `CheckpointStore.save`.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any]

    @property
    def progress(self) -> Progress:
        return Progress.from_dict(self.metadata["progress"])

    @property
    def parameters(self) -> dict[str, Any]:
        """The run's parameters, by name."""
        return self.metadata["parameters"]

    @property
    def world_size(self) -> int:
        """How many processes shared the steps taken."""
        return self.metadata.get("world_size", 1)

    def load_model(self, model: BigramLanguageModel) -> None:
        """Give the model these weights.

        Raises:
            Alg1Error: they are for another model.
        """
        prefix = "model."
        weights = {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise Alg1Error(
                f"{self.path}: not the weights of this model: {reason}", OTHER_CHECKPOINT
            ) from None

    def load_trainer(self, trainer: Trainer) -> None:
        """Give model, optimizer and loss scaler the state they had.

        Raises:
            Alg1Error: they are for another model or optimizer.
        """
        self.load_model(trainer.model)
        for parameter, state in self._optimizer_states(trainer).items():
            trainer.optimizer.state[parameter] = state
        if self.metadata["scaler"]:
            trainer.scaler.load_state_dict(self.metadata["scaler"])

    def _optimizer_states(self, trainer: Trainer) -> dict[torch.nn.Parameter, dict[str, torch.Tensor]]:
        """What the optimizer kept for each parameter; every tensor has the size that the update will read."""
        keys_of = trainer.optimizer.keys_by_parameter()
        found = {name for name in self.tensors if name.startswith("optimizer.")}
        # Nothing was kept before the first update, which a loss scaler may have put off.
        if not found and (self.progress.step == 0 or trainer.scaler.is_enabled()):
            return {}
        states: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
        for name, parameter in trainer.model.named_parameters():
            states[parameter] = {}
            found -= {f"optimizer.{key}.{name}" for key in keys_of[parameter]}
            for key in sorted(keys_of[parameter]):
                tensor = self.tensors.get(f"optimizer.{key}.{name}")
                shape = () if key == "step" else parameter.shape
                if tensor is None or tensor.shape != shape or tensor.dtype != parameter.dtype:
                    raise Alg1Error(
                        f"{self.path}: the optimizer's {key} of {name} does not fit", OTHER_CHECKPOINT
                    )
                states[parameter][key] = tensor.to(parameter.device)
        if found:
            raise Alg1Error(f"{self.path}: unknown optimizer state {sorted(found)[0]}", OTHER_CHECKPOINT)
        return states

    def build_model(self) -> BigramLanguageModel:
        """A model of its own with these weights, to sample from."""
        model = BigramLanguageModel(ModelConfig(**self.metadata["model"]))
        self.load_model(model)
        model.vocabulary = self.metadata["vocabulary"]
        return model


class CheckpointStore:
    """The checkpoints of a run, written in a thread, one at a time, while the training goes on.

    Leaving its `with` block waits for the last one.

    Args:
        folder: of the checkpoints; the caller holds the run's lock.
        keep: how many of the newest stay, beside the best.

    Attributes:
        newest_step: of the newest checkpoint that is whole on disk; at first that which the run goes on from.
    """

    def __init__(self, folder: Path, keep: int, newest_step: int | None = None):
        self.folder = folder
        self.keep = keep
        self.newest_step = newest_step
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # `wait` has told, or what ended the loop matters more
            self.wait()
        self._writer.shutdown()

    def path(self, step: int) -> Path:
        return checkpoint_path(self.folder, step)

    def save(self, trainer: Trainer, progress: Progress, about: dict[str, Any]) -> Path:
        """Copy everything of progress.step, then write and prune in the background: `wait` says how it ended.

        Args:
            about: further JSON values: parameters, corpus_sha256, trackers, ...

        Raises:
            Alg1Error: see `wait`, of the checkpoint before.
        """
        self.wait()
        model = trainer.model
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            for key, value in trainer.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "progress": dataclasses.asdict(progress),
            "model": model.config.stored(),
            "vocabulary": model.vocabulary,
            "scaler": trainer.scaler.state_dict(),
            "world_size": trainer.runtime.processes.world_size,
            "compiled": trainer.backward.compiled,
            **about,
        }
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._writing = self._writer.submit(self._write, copies, metadata, progress.step, progress.best_step)
        return self.path(progress.step)

    def _write(
        self, tensors: dict[str, torch.Tensor], metadata: dict[str, Any], step: int, best_step: int | None
    ) -> None:
        """In the thread."""
        write_tensors(self.path(step), tensors, metadata)
        self.newest_step = step
        self.prune(best_step)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            Alg1Error: the file system refused (exit code 4); older checkpoints are as they were.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def check(self) -> None:
        """Raise what `wait` would if the last checkpoint has failed by now; waits for nothing."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def prune(self, best_step: int | None) -> None:
        """Remove all but the newest `keep` and the best."""
        paths = checkpoint_paths(self.folder)
        best = self.path(best_step) if best_step is not None else None
        for path in paths[: -self.keep]:
            if path != best:
                with contextlib.suppress(OSError):  # a file too many does no harm
                    path.unlink()
                    LOGGER.debug("removed %s", path)

    def load_best(self, progress: Progress) -> Checkpoint:
        """The checkpoint with the lowest validation loss.

        Raises:
            Alg1Error: it is missing or damaged.
        """
        assert progress.best_step is not None  # a run ends with an evaluation
        return read_checkpoint(self.path(progress.best_step))


class NoCheckpoints(CheckpointStore):
    """For a process that is not the first: it keeps nothing."""

    def __init__(self) -> None:
        super().__init__(Path(), 0)

    def save(self, trainer: Trainer, progress: Progress, about: dict[str, Any]) -> Path:
        self.newest_step = progress.step
        return self.path(progress.step)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        Alg1Error: not there, damaged, or not a checkpoint.
    """
    return parse_checkpoint(*read_tensors(path), path)


def parse_checkpoint(
    tensors: dict[str, torch.Tensor], metadata: dict[str, Any] | None, path: Path
) -> Checkpoint:
    """`read_checkpoint` for a file that `read_tensors` has read: also one that a stranger made.

    Raises:
        Alg1Error: not a checkpoint, or one with values that no run of ours has written.
    """
    if metadata is None or metadata.get("format") != FORMAT:
        raise Alg1Error(f"{path}: this is not a checkpoint", OTHER_CHECKPOINT)
    if metadata.get("format_version") != FORMAT_VERSION:
        raise Alg1Error(
            f"{path}: checkpoint format {metadata.get('format_version')!r} is not known",
            "use the release of ALG1 that wrote it",
        )
    checkpoint = Checkpoint(path, tensors, metadata)
    try:
        sound = _is_sound(checkpoint)
    except (KeyError, TypeError, ValueError, AttributeError, Alg1Error):
        sound = False
    if not sound:
        raise Alg1Error(f"{path}: this checkpoint makes no sense", OTHER_CHECKPOINT)
    return checkpoint


def _is_sound(checkpoint: Checkpoint) -> bool:
    """Whether every value has its type and the sizes are those of the tensors; or an exception."""
    metadata = checkpoint.metadata
    config = ModelConfig(**metadata["model"])
    config.validate()
    tokens = checkpoint.tensors["model.token_embedding_table.weight"].shape
    table = checkpoint.tensors.get("model.position_embedding_table.weight")
    positions = None if table is None else tuple(table.shape)
    layers = {name.split(".")[2] for name in checkpoint.tensors if name.startswith("model.blocks.")}
    progress = checkpoint.progress
    evaluation = progress.evaluation or Evaluation(0, 0.0, 0.0, 0.0)
    steps = [progress.step, progress.evaluations_since_best, evaluation.step, progress.best_step or 0]
    numbers = [*dataclasses.astuple(evaluation), progress.seconds, progress.best_val or 0]
    named = CHECKPOINT_NAME.fullmatch(checkpoint.path.name)
    vocabulary = metadata["vocabulary"]
    return (
        tokens == (config.vocab_size, config.n_embd)
        and positions == ((config.block_size, config.n_embd) if config.positions == "learned" else None)
        and len(layers) == config.n_layer
        and all(type(step) is int and step >= 0 for step in steps)
        and all(isinstance(number, (int, float)) and abs(number) < LARGE for number in numbers)
        and (named is None or int(named[1]) == progress.step)
        and not coerce_all(checkpoint.parameters)[1]
        and all(isinstance(character, str) for character in vocabulary)
        and vocabulary == sorted(set(vocabulary))
        and len(vocabulary) == config.vocab_size
        and isinstance(metadata["corpus_sha256"], str)
        and type(checkpoint.world_size) is int
        and checkpoint.world_size > 0
        and isinstance(metadata.get("compiled"), (bool, type(None)))
        and all(isinstance(copy["synced"], int) for copy in metadata["trackers"].values())
        and all(isinstance(copy["run"], (str, type(None))) for copy in metadata["trackers"].values())
        and isinstance(metadata["scaler"], dict)
    )


def newest_checkpoint(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint:
    """The newest checkpoint of a run that verifies; a damaged one is a warning and the next older one.

    Raises:
        Alg1Error: there is none left.
    """
    paths = checkpoint_paths(RunFolder(run_dir).checkpoint_dir)
    for path in reversed(paths):
        try:
            return read_checkpoint(path)
        except Alg1Error as error:
            warn(f"{error.message}; trying an older one")
    if paths:
        raise Alg1Error(
            f"{run_dir}: none of its {len(paths)} checkpoints can be read",
            "put a copy of one there, or start anew: python train.py (an export serves as --init-from)",
        )
    raise Alg1Error(f"{run_dir}: it has no checkpoint yet", "start anew: python train.py")


def set_newer_aside(checkpoint: Checkpoint, say: Callable[[str], None]) -> None:
    """Rename what lies past the checkpoint that a run goes on from: it is damaged, or a past not repeated.

    Raises:
        Alg1Error: the file system refused (exit code 4).
    """
    for path in checkpoint_paths(checkpoint.path.parent):
        if checkpoint_step(path) > checkpoint_step(checkpoint.path):
            aside = path.with_name(path.name + ".aside")
            say(f"renaming {path.name} to {aside.name}: the run goes on from {checkpoint.path.name}")
            try:
                path.rename(aside)
            except OSError as error:
                raise disk_error(f"rename {path}", error) from error
