"""Checkpoints: one verified file each, written atomically; the last few and the best are kept.

A checkpoint is a tensor file (network/tensor_file.py), step_NNNNNNNNN.safetensors. Its float32 tensors are

    model.<parameter>               as in BigramLanguageModel.state_dict()
    optimizer.<state>.<parameter>   as in Optimizer.state: exp_avg, exp_avg_sq, step, momentum_buffer

and its metadata, as JSON, are `CheckpointMetadata`. There is no random state: see training/seeds.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import types
import typing
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch

from model import BigramLanguageModel
from parameters import ModelConfig, coerce_all
from utils_alg1.base.errors import CANNOT_TRAIN, Alg1Error, disk_error
from utils_alg1.base.scripts import command
from utils_alg1.base.text import shell_join
from utils_alg1.base.threads import single_worker
from utils_alg1.network.tensor_file import read_tensors, write_tensors
from utils_alg1.network.weights import CHECKPOINT_FORMAT, FORMAT_VERSION, OTHER_CHECKPOINT, fits_vocabulary
from utils_alg1.run_directory import (
    CHECKPOINT_NAME,
    RunFolder,
    checkpoint_path,
    checkpoint_paths,
    checkpoint_step,
)
from utils_alg1.training.arithmetic import Arithmetic
from utils_alg1.training.flat import FlatParameters
from utils_alg1.training.progress import Evaluation, Progress
from utils_alg1.training.trainer import Trainer

LOGGER = logging.getLogger("alg1")

# The state of each group of parameters, by its kind: "model", "optimizer.exp_avg", ...
JoinedTensors = list[tuple[FlatParameters, dict[str, torch.Tensor]]]


class TrackerState(TypedDict):
    """What a checkpoint holds of a tracker."""

    run: str | None  # the id of the run there
    synced: int  # the step that it is flushed to


class CheckpointMetadata(TypedDict, total=False):
    """What a checkpoint holds besides its tensors. Old files may lack origins, world_size and arithmetic."""

    format: str  # CHECKPOINT_FORMAT
    format_version: int  # FORMAT_VERSION
    run_id: str
    parameters: dict[str, Any]  # the parameters of the run, by name
    origins: dict[str, str]  # where each of them came from, by name
    model: dict[str, Any]  # ModelConfig.stored(): the sizes of the model
    vocabulary: list[str]  # the characters by token
    corpus_sha256: str  # Corpus.sha256, of the text and a held-out text
    progress: dict[str, Any]  # Progress: step, best loss, newest evaluation, seconds
    scaler: dict[str, Any]  # GradScaler.state_dict(): empty unless float16
    world_size: int  # the number of processes
    arithmetic: dict[str, Any]  # Arithmetic: how its steps were computed; of old files, only if compiled
    trackers: dict[str, TrackerState]  # by name


@dataclass
class Checkpoint:
    """A verified checkpoint in memory."""

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: CheckpointMetadata

    @property
    def progress(self) -> Progress:
        return Progress.from_dict(self.metadata["progress"])

    def load_model(self, model: BigramLanguageModel) -> None:
        """Load these weights into the model.

        Raises:
            Alg1Error: they are for another model.
        """
        self._copy_to({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, "model.")

    def load_trainer(self, trainer: Trainer) -> None:
        """Load the state of model, optimizer, loss scaler and progress.

        Raises:
            Alg1Error: it is for another model or optimizer.
        """
        stateless = not any(name.startswith("optimizer.") for name in self.tensors)
        # Earlier versions saved no optimizer before its first update; with float16 all may have been skipped.
        if stateless and (self.progress.step == 0 or trainer.scaler.is_enabled()):
            self.load_model(trainer.model)
        else:
            self._copy_to(named_tensors(joined_tensors(trainer)))
        if self.metadata["scaler"]:
            trainer.scaler.load_state_dict(self.metadata["scaler"])
        trainer.progress = self.progress

    def _copy_to(self, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        """Copy the tensors of this prefix to those of the same names."""
        saved = {name: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
        for name in sorted(tensors.keys() | saved.keys()):
            pair = [side[name] for side in (tensors, saved) if name in side]
            if len({(tensor.shape, tensor.dtype) for tensor in pair}) != 1 or len(pair) != 2:
                text = f"{self.path}: its {name} does not fit this model or optimizer"
                raise Alg1Error(text, OTHER_CHECKPOINT)
        for name, tensor in tensors.items():
            tensor.detach().copy_(saved[name])


def joined_tensors(trainer: Trainer) -> JoinedTensors:
    """Return the tensors of the state of a trainer, as they lie in memory."""
    joined = []
    for flat in trainer.optimizer.flats:
        state = trainer.optimizer.state[flat.tensor]
        joined.append((flat, {"model": flat.tensor} | {f"optimizer.{key}": t for key, t in state.items()}))
    return joined


def named_tensors(joined: JoinedTensors) -> dict[str, torch.Tensor]:
    """Return the tensors of the single parameters, by their names in a checkpoint."""
    return {
        f"{kind}.{name}": tensor
        for flat, tensors in joined
        for kind, of_all in tensors.items()
        for name, tensor in flat.split(of_all).items()
    }


class CheckpointStore:
    """The checkpoints of a run, written one at a time by a thread while training continues.

    The end of its `with` block waits for the last one.

    Args:
        folder: of the checkpoints; the caller holds the run's lock.
        keep: how many of the newest are kept, besides the best.

    Attributes:
        newest_step: that of the newest complete checkpoint, maybe the one that was resumed, or None.
    """

    def __init__(self, folder: Path, keep: int, newest_step: int | None = None):
        self.folder = folder
        self.keep = keep
        self.newest_step = newest_step
        self._writer = single_worker("checkpoint", self._warn_of_waits)
        self._writing: Future[None] | None = None

    @staticmethod
    def _warn_of_waits(reason: str) -> None:
        LOGGER.warning("warning: the training waits while a checkpoint is written: %s", reason)

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        except Alg1Error as error:  # another exception ends the block, or its own `wait` would have raised
            LOGGER.warning("warning: %s", error.message)
        self._writer.shutdown()

    def path(self, step: int) -> Path:
        return checkpoint_path(self.folder, step)

    @property
    def newest(self) -> Path | None:
        """The file of the newest checkpoint, or None if there is none."""
        return None if self.newest_step is None else self.path(self.newest_step)

    def save(self, trainer: Trainer, run_metadata: CheckpointMetadata) -> None:
        """Copy the state of a trainer, then write and prune in the background: `wait` tells how it ended.

        Args:
            run_metadata: unknown to the trainer: parameters, origins, run_id, corpus_sha256, trackers.

        Raises:
            Alg1Error: the checkpoint before this one could not be written (exit code 4).
        """
        self.wait()
        model, progress = trainer.model, trainer.progress
        assert model.vocabulary is not None
        metadata: CheckpointMetadata = {
            "format": CHECKPOINT_FORMAT,
            "format_version": FORMAT_VERSION,
            "progress": dataclasses.asdict(progress),
            "model": model.config.stored(),
            "vocabulary": model.vocabulary,
            "scaler": trainer.scaler.state_dict(),
            "world_size": trainer.runtime.dist.world_size,
            "arithmetic": dataclasses.asdict(trainer.backward.arithmetic),
            **run_metadata,
        }
        copies = [
            (flat, {kind: tensor.to("cpu", copy=True) for kind, tensor in tensors.items()})
            for flat, tensors in joined_tensors(trainer)
        ]
        trainer.clock.saved()
        self._writing = self._writer.submit(self._write, copies, metadata, progress.step, progress.best_step)

    def _write(
        self, joined: JoinedTensors, metadata: CheckpointMetadata, step: int, best_step: int | None
    ) -> None:
        """Write and prune, in the writer thread."""
        write_tensors(self.path(step), named_tensors(joined), dict(metadata))
        self.newest_step = step
        self.prune(best_step)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            Alg1Error: the file system refused (exit code 4); older checkpoints are unchanged.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def raise_if_failed(self) -> None:
        """Raise what `wait` would raise if the last checkpoint has failed by now, without waiting."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def prune(self, best_step: int | None) -> None:
        """Remove all but the newest `keep` and the best."""
        for path in checkpoint_paths(self.folder)[: -self.keep]:
            if checkpoint_step(path) != best_step:
                with contextlib.suppress(OSError):  # one file too many does no harm
                    path.unlink()
                    LOGGER.debug("removed %s", path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        Alg1Error: not there, damaged, not a checkpoint, or one with values that no run has written.
    """
    tensors, metadata = read_tensors(path)
    if metadata is None or metadata.get("format") != CHECKPOINT_FORMAT:
        raise Alg1Error(f"{path}: this is not a checkpoint", OTHER_CHECKPOINT)
    if metadata.get("format_version") != FORMAT_VERSION:
        raise Alg1Error(
            f"{path}: checkpoint format {metadata.get('format_version')!r} is not known",
            "use the release of ALG1 that wrote it",
        )
    arithmetic = {"compiled": metadata.get("compiled")}
    metadata = {"origins": {}, "world_size": 1, "arithmetic": arithmetic} | metadata
    checkpoint = Checkpoint(path, tensors, metadata)  # type: ignore[arg-type]
    try:
        fault = _find_fault(checkpoint)
    except (KeyError, TypeError, ValueError, AttributeError, Alg1Error):
        fault = "metadata"
    if fault is not None:
        raise Alg1Error(f"{path}: this checkpoint makes no sense ({fault})", OTHER_CHECKPOINT)
    return checkpoint


def _find_fault(checkpoint: Checkpoint) -> str | None:
    """Return which value has a wrong type or does not fit the others, or None; or raise."""
    metadata, progress = checkpoint.metadata, checkpoint.progress
    evaluation, config = progress.evaluation, ModelConfig(**metadata["model"])
    config.validate()
    weights = [tensor for name, tensor in checkpoint.tensors.items() if name.startswith("model.")]
    step_in_name = CHECKPOINT_NAME.fullmatch(checkpoint.path.name)  # None for a renamed copy
    checks = {
        "metadata": _has_types(metadata, CheckpointMetadata) and metadata["world_size"] > 0,
        "trackers": all(_has_types(state, TrackerState) for state in metadata["trackers"].values()),
        "progress": _has_types(vars(progress), Progress) and progress.step >= 0,
        "evaluation": evaluation is None or _has_types(vars(evaluation), Evaluation),
        "step": step_in_name is None or int(step_in_name[1]) == progress.step,
        "arithmetic": Arithmetic(**metadata["arithmetic"]).is_known,
        "parameters": not coerce_all(metadata["parameters"])[1],
        "weights": sum(tensor.numel() for tensor in weights) == config.n_parameters,
        "vocabulary": fits_vocabulary(metadata["vocabulary"], config),
    }
    return next((name for name, holds in checks.items() if not holds), None)


def _has_types(values: Mapping[str, Any], schema: type) -> bool:
    """Return whether each value has the type that a dataclass or TypedDict declares; KeyError if missing."""
    for name, hint in typing.get_type_hints(schema).items():
        kind = hint if isinstance(hint, types.UnionType) else typing.get_origin(hint) or hint
        if not isinstance(values[name], kind):
            return False
    return True


def newest_checkpoint(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint:
    """Read the newest checkpoint of a run that verifies; each damaged one costs a warning.

    Raises:
        Alg1Error: there is none left.
    """
    run = RunFolder(run_dir)
    paths = checkpoint_paths(run.checkpoint_dir)
    for path in reversed(paths):
        try:
            return read_checkpoint(path)
        except Alg1Error as error:
            if error.exit_code == CANNOT_TRAIN:  # out of memory: the others are as large
                raise
            warn(f"{error.message}; trying an older one")
    if paths:
        raise Alg1Error(
            f"{run_dir}: none of its {len(paths)} checkpoints can be read",
            f"put a copy of one there, or {_new_run(run)}",
        )
    raise Alg1Error(f"{run_dir}: it has no checkpoint", _new_run(run))


def _new_run(run: RunFolder) -> str:
    """Return how to train in place of resuming a run without checkpoints: from its export if it has one."""
    words = ["--config", run.record_path] if run.record_path.is_file() else []
    if not run.export_path.is_file():
        return f"start anew: {command('train.py')}"
    words += ["--init-from", run.export_path]
    return f"start a new run from its export: {command('train.py')} {shell_join(map(str, words))}"


def quarantine_newer(checkpoint: Checkpoint, say: Callable[[str], None]) -> None:
    """Rename the checkpoints newer than the one that a run continues from: they are damaged or outdated.

    Raises:
        Alg1Error: the file system refused (exit code 4).
    """
    for path in checkpoint_paths(checkpoint.path.parent):
        if checkpoint_step(path) > checkpoint_step(checkpoint.path):
            quarantined = path.with_name(path.name + ".aside")
            say(f"renaming {path.name} to {quarantined.name}: the run continues from {checkpoint.path.name}")
            try:
                path.rename(quarantined)
            except OSError as error:
                raise disk_error(f"rename {path}", error) from error
