"""Checkpoints: one verified file for each, written atomically, the last few and the best kept.

A checkpoint holds the model, the optimizer's state and, as JSON, everything else a run needs to go on with
the same bytes. There is no random state in it: see `utils_runtime.derive_seed`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data import Corpus
from errors import Alg1Error, disk_error
from files import read_tensors, remove_temporary_files, write_tensors
from model import BigramLanguageModel
from parameters import (
    MODEL_OPTIONS,
    ModelConfig,
    Parameters,
    TrainConfig,
    coerce_all,
    field_names,
    shown,
    specs,
)
from utils import Tokenizer, show_characters
from utils_alg1.utils_output import LOGGER, Console
from utils_alg1.utils_run_manager import (
    NO_RUN_HINT,
    Run,
    RunDirectoryCreator,
    checkpoint_dir,
    export_path,
    find_run,
    list_runs,
    lock_run,
    no_folder,
)
from utils_alg1.utils_training import Evaluation, Progress, Trainer, learning_rate

FORMAT = "alg1-checkpoint"
FORMAT_VERSION = 1
OTHER_CHECKPOINT = "use another checkpoint, written by train.py"
LARGE = 1e300  # no figure of a run comes near
NAME = re.compile(r"step_(\d{9,})\.safetensors")


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


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:09d}.safetensors"


def checkpoint_paths(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted((path for path in folder.glob("step_*") if NAME.fullmatch(path.name)), key=_step)


def _step(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("step_"))


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
    named = NAME.fullmatch(checkpoint.path.name)
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
    paths = checkpoint_paths(checkpoint_dir(run_dir))
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


# --- what a run starts from ---------------------------------------------------------------------------


@dataclass
class Start:
    """What a run starts from: a checkpoint of its own, the weights of another, or nothing.

    Attributes:
        run, checkpoint: of the run that --resume names, locked.
        initial: the model that --init-from names, and where it was read.
    """

    run: Run | None = None
    checkpoint: Checkpoint | None = None
    initial: BigramLanguageModel | None = None
    initial_path: str = ""

    @property
    def parameters(self) -> dict[str, Any] | None:
        """The parameters of the run that goes on."""
        return self.checkpoint.parameters if self.checkpoint else None

    @property
    def sizes(self) -> dict[str, Any] | None:
        """The sizes of the initial model."""
        if self.initial is None:
            return None
        sizes = dataclasses.asdict(self.initial.config)
        free = ("dropout", "vocab_size", "zero_init")  # the weights do not depend on them
        return {name: value for name, value in sizes.items() if name not in free}

    @property
    def compiled_before(self) -> bool | None:
        """Whether the steps taken were compiled; None where none were taken."""
        return self.checkpoint.metadata.get("compiled") if self.checkpoint else None

    def without_run(self) -> Start:
        """The same for another process: the run belongs to one."""
        return dataclasses.replace(self, run=None)

    def check(self, params: Parameters, corpus: Corpus, world_size: int = 1) -> None:
        """Check that parameters, text and number of processes fit to what the run starts from.

        Raises:
            Alg1Error: naming what does not.
        """
        if self.checkpoint is not None:
            check_resumable(self.checkpoint, params, corpus.sha256, world_size)
        for name, value in (self.sizes or {}).items():
            asked = getattr(params.model, name)
            if asked != value:
                raise Alg1Error(
                    f"{self.initial_path}: its {name} is {value}, not {asked}", f"leave {name} out"
                )
        if self.initial is not None:
            check_vocabulary(self.initial, corpus.tokenizer, self.initial_path)


# What --init-from can be there.
OF_NANOGPT = {
    "resume": "to continue a run: --resume latest",
    "scratch": "leave --init-from out: a run starts from scratch",
}


def find_start(resume: str | None, init_from: str | None, runs_dir: str, console: Console) -> Start:
    """Read what --resume or --init-from names.

    Raises:
        Alg1Error: it is not there, in use, damaged, or has no checkpoint.
    """
    if resume is not None:
        return Start(*reopen_run(runs_dir, resume, console))
    if init_from is not None:
        if init_from in OF_NANOGPT and not Path(init_from).exists():
            raise Alg1Error(f"--init-from {init_from}: must be a file of weights", OF_NANOGPT[init_from])
        return Start(initial=load_model_file(Path(init_from)), initial_path=init_from)
    return Start()


def reopen_run(runs_dir: str, name: str, console: Console) -> tuple[Run, Checkpoint]:
    """Take the run that --resume names, and its newest good checkpoint.

    `name` may also be the path of one checkpoint file: the run then goes on from there.

    Raises:
        Alg1Error: no such run, in use, or no checkpoint that can be read.
    """
    file = Path(name)
    from_file = bool(NAME.fullmatch(file.name)) and file.is_file()
    if from_file:
        folders = file.absolute().parents
        if len(folders) < 3 or file.absolute().parent != checkpoint_dir(folders[2]):
            raise Alg1Error(
                f"{file}: this checkpoint is not in a run directory",
                "to start a new run from its weights: --init-from PATH",
            )
        path = folders[2]
    else:
        saved = [run for run in list_runs(runs_dir) if checkpoint_paths(checkpoint_dir(run))]
        path = saved[-1] if saved and name == "latest" else find_run(runs_dir, name)
    run = lock_run(path)
    try:
        RunDirectoryCreator(run.path.parent).create_subdirectories(run.path)  # what was deleted by hand
        for folder in (run.checkpoint_dir, run.export_path.parent, run.meta_dir, run.eval_dir):
            remove_temporary_files(folder)  # left by a killed process
        checkpoint = read_checkpoint(file) if from_file else newest_checkpoint(run.path, console.warn)
        forget_missing_best(checkpoint)
        return run, checkpoint
    except BaseException:
        run.lock.release()
        raise


def forget_missing_best(checkpoint: Checkpoint) -> None:
    """A best checkpoint that is no longer there cannot be exported: let the best be sought anew."""
    old = checkpoint.progress
    if old.best_step is None or checkpoint_path(checkpoint.path.parent, old.best_step).exists():
        return
    progress = Progress(old.step, seconds=old.seconds)
    if old.evaluation is not None and old.evaluated():
        progress.add(old.evaluation)
    checkpoint.metadata["progress"] = dataclasses.asdict(progress)


def set_newer_aside(checkpoint: Checkpoint, say: Callable[[str], None]) -> None:
    """Rename what lies past the checkpoint that a run goes on from: it is damaged, or a past not repeated.

    Raises:
        Alg1Error: the file system refused (exit code 4).
    """
    for path in checkpoint_paths(checkpoint.path.parent):
        if _step(path) > _step(checkpoint.path):
            aside = path.with_name(path.name + ".aside")
            say(f"renaming {path.name} to {aside.name}: the run goes on from {checkpoint.path.name}")
            try:
                path.rename(aside)
            except OSError as error:
                raise disk_error(f"rename {path}", error) from error


def check_vocabulary(model: BigramLanguageModel, tokenizer: Tokenizer, path: str) -> None:
    """Check that a model's characters are the text's.

    Raises:
        Alg1Error: showing the characters that differ.
    """
    if model.vocabulary is None and model.config.vocab_size == tokenizer.vocab_size:
        return  # weights of another program: what the text has is all that is known
    if model.vocabulary is None:
        raise Alg1Error(
            f"{path}: it does not hold its vocabulary, and is for {model.config.vocab_size} characters;"
            f" the text has {tokenizer.vocab_size}",
            "use the text that it was trained on",
        )
    ours, theirs = set(tokenizer.vocabulary), set(model.vocabulary)
    if ours != theirs:
        parts = {"only in the text": ours - theirs, "only in the model": theirs - ours}
        listed = "; ".join(f"{w}: {show_characters(c)}" for w, c in parts.items() if c)
        raise Alg1Error(
            f"{path}: the vocabularies differ: {listed}",
            "bring the text to the model's characters, or train without --init-from",
        )


def check_resumable(
    checkpoint: Checkpoint, params: Parameters, corpus_sha256: str, world_size: int = 1
) -> None:
    """Check that a run may go on with these parameters, this text and this number of processes.

    Raises:
        Alg1Error: naming every parameter that shaped the steps already taken and differs, old -> new.
    """
    now = params.flat()
    old = MODEL_OPTIONS | coerce_all(checkpoint.parameters)[0]
    changed = [
        f"{name}: {shown(old[name])} -> {shown(now[name])}"
        for name, spec in specs().items()
        if name in old and old[name] != now[name] and not spec.limits.may_change
    ]
    step = checkpoint.progress.step
    old_train = TrainConfig(**{n: v for n, v in old.items() if n in field_names(TrainConfig)})
    changed += micro_batches_changed(
        old_train.grad_accum_steps, checkpoint.world_size, params.train.grad_accum_steps, world_size
    )
    if step > params.train.max_iters:
        raise Alg1Error(
            f"the run is at step {step} already, past max_iters = {params.train.max_iters}",
            f"use --max-iters {step} or more",
        )
    longer = old_train.max_iters != params.train.max_iters and not changed
    if longer and any(learning_rate(old_train, s) != learning_rate(params.train, s) for s in range(step)):
        changed.append(
            f"max_iters: {old_train.max_iters} -> {params.train.max_iters}"
            f" (it moves the {params.train.lr_schedule} schedule of the steps already taken)"
        )
    if changed:
        raise Alg1Error(
            f"the run cannot go on with other values: {'; '.join(changed)}",
            "leave them out, or start a new run from its weights: --init-from PATH",
        )
    if checkpoint.metadata["corpus_sha256"] != corpus_sha256:
        raise Alg1Error(
            f"{params.data.data_path}: this is not the text that the run was trained on",
            "name that text with --data, or start a new run from its weights: --init-from PATH",
        )


def micro_batches_changed(old_steps: int, old_world_size: int, steps: int, world_size: int) -> list[str]:
    """What differs in the micro-batches of a step, however many processes share them; [] if nothing does."""
    taken = old_steps * old_world_size
    if taken == steps * world_size:
        return []
    if old_world_size == world_size:
        return [f"grad_accum_steps: {old_steps} -> {steps}"]
    way_on = f" (--grad-accum-steps {taken // world_size} keeps them)" if taken % world_size == 0 else ""
    change = f"{old_steps} x {old_world_size} processes -> {steps} x {world_size}"
    return [f"micro-batches of a step: {change}{way_on}"]


def check_output(output: str | None) -> None:
    """Check before training that --output can name a file, and that nothing else is lost by writing it.

    Raises:
        Alg1Error: its folder is not there, it is a folder itself, or a file that is not an export.
    """
    if output is None:
        return
    if not Path(output).absolute().parent.is_dir():
        raise Alg1Error(f"--output {output}: there is no folder {Path(output).parent}", "create it")
    if Path(output).is_dir():
        raise Alg1Error(f"--output {output}: this is a folder", "name a file in it")
    if Path(output).exists():
        try:
            read_tensors(output)
        except Alg1Error:
            hint = "name another file: an export would take its place"
            raise Alg1Error(f"--output {output}: this file is not an export", hint) from None


NO_WEIGHTS_HINT = "train one: python train.py, or name a --model"


def find_weights(runs_dir: str, name: str | None = None) -> Path:
    """The file to sample a run from: its export, or while it has none its newest checkpoint.

    Args:
        name: a run id or a run directory; None is the latest run that has any weights.

    Raises:
        Alg1Error: there is no such run, or nothing to sample from.
    """
    runs = list_runs(runs_dir)[::-1] if name is None else [find_run(runs_dir, name)]
    for run_dir in runs:
        if path := weights_of(run_dir):
            return path
    if name is not None:
        raise Alg1Error(f"{name} has not any weights yet", NO_WEIGHTS_HINT)
    missing = no_folder(runs_dir)
    hint = NO_RUN_HINT if missing else NO_WEIGHTS_HINT
    raise Alg1Error(f"no run in {runs_dir} has any weights yet{missing}", hint)


def weights_of(run_dir: Path) -> Path | None:
    """A run's export, or while it has none its newest checkpoint; None where it has neither."""
    candidates = [export_path(run_dir), *checkpoint_paths(checkpoint_dir(run_dir))[::-1]]
    return next((path for path in candidates if path.is_file()), None)


def load_model_file(path: Path) -> BigramLanguageModel:
    """A model from an export, a checkpoint, or any file in the lecture's layout.

    Raises:
        Alg1Error: it is none of these, or damaged.
    """
    if path.is_dir() and (weights := weights_of(path)):
        hint = f"name {weights}, or the run with --run (inference.py) or --resume (train.py)"
        raise Alg1Error(f"{path}: this is a run, not a file of weights", hint)
    tensors, metadata = read_tensors(path)
    if metadata is not None and metadata.get("format") == FORMAT:
        return parse_checkpoint(tensors, metadata, path).build_model()
    return BigramLanguageModel().load_tensors(tensors, metadata, path)
