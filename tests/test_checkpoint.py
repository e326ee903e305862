"""Checkpoints: written atomically, verified, pruned; a resumed run ends with the bytes of an unbroken one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import os
import shlex
import shutil
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import QUIET_TRACKERS, TEXT, TINY, at, compile_with, lasting_metrics, stop_at
from filelock import FileLock
from safetensors.numpy import save

from model import BigramLanguageModel
from parameters import MODEL_OPTIONS, ModelConfig, TrainConfig
from utils_alg1.base import files
from utils_alg1.base.errors import Alg1Error, disk_error
from utils_alg1.base.files import atomic_file, write_atomically
from utils_alg1.network.products import onednn_works
from utils_alg1.network.tensor_file import METADATA_KEY, digest, read_tensors, write_tensors
from utils_alg1.report import results as results_module
from utils_alg1.run_directory import checkpoint_paths
from utils_alg1.training import arithmetic as arithmetic_module
from utils_alg1.training import checkpoint as checkpoint_module
from utils_alg1.training import runtime as runtime_module
from utils_alg1.training.arithmetic import Arithmetic, Processor, environment
from utils_alg1.training.checkpoint import (
    CheckpointStore,
    joined_tensors,
    named_tensors,
    newest_checkpoint,
    read_checkpoint,
)
from utils_alg1.training.progress import Evaluation, Progress
from utils_alg1.training.resume import load_model_file
from utils_alg1.training.runtime import Runtime
from utils_alg1.training.trainer import Trainer

VOCAB_SIZE = len(set(TEXT))
ALL_KEPT = ["--checkpoint-interval", 1, "--keep-checkpoints", 99]


@pytest.fixture(autouse=True)
def no_picture_and_short_samples(monkeypatch):
    monkeypatch.setattr("utils_alg1.report.pictures.draw_loss_curve", lambda *_: None)
    monkeypatch.setattr("utils_alg1.report.pictures.draw_attention", lambda *_: b"")
    monkeypatch.setattr(results_module, "SAMPLE_LENGTH", 4)


@pytest.fixture
def start(train, text_file):
    """A new run with further flags: `start("--dropout", 0.1, into="a")`."""

    def run(*flags, into="runs"):
        return train("--data", text_file, *TINY, *QUIET_TRACKERS, "--runs-dir", into, *flags)

    return run


@pytest.fixture(scope="module")
def trained() -> dict[tuple, Path]:
    """The runs that `a_run` copies, by their flags and the step that they were interrupted in."""
    return {}


@pytest.fixture
def a_run(trained, train, text_file, tmp_path_factory):
    """A copy of a run with further flags, finished or interrupted in a step; each is trained once."""

    def copy(*flags, stop: int | None = None, into="runs") -> None:
        key = (*flags, stop)
        if key not in trained:
            folder = tmp_path_factory.mktemp("trained")
            shutil.copy(text_file, folder)
            with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
                if stop is not None:
                    stop_at(stop, patch, lambda: signal.raise_signal(signal.SIGINT))
                result = train("--data", "text.txt", *TINY, *QUIET_TRACKERS, *flags)
            assert result.code == (0 if stop is None else 130)
            trained[key] = folder / "runs"
        shutil.copytree(trained[key], into)

    return copy


def only_run(runs_dir: str = "runs") -> Path:
    (run,) = (path for path in Path(runs_dir).iterdir() if path.is_dir())
    return run


def steps(runs_dir: str = "runs") -> list[int]:
    """Of the checkpoints there are."""
    paths = checkpoint_paths(only_run(runs_dir) / "artifacts/checkpoints")
    return [int(path.stem.removeprefix("step_")) for path in paths]


def checkpoint(step: int, runs_dir: str = "runs") -> Path:
    return only_run(runs_dir) / f"artifacts/checkpoints/step_{step:09d}.safetensors"


def export_of(runs_dir: str = "runs") -> Path:
    return only_run(runs_dir) / "artifacts/export/model.safetensors"


def metrics(runs_dir: str = "runs") -> bytes:
    return lasting_metrics(only_run(runs_dir) / "logs/metrics.jsonl")


def final(runs_dir: str = "runs") -> dict:
    return json.loads((only_run(runs_dir) / "eval/final.json").read_text())


def temporary_files() -> list[Path]:
    return [path for path in Path().rglob("*") if path.name.endswith(".tmp")]


def assert_same_tensors(a: Path, b: Path) -> None:
    ours, theirs = read_tensors(a)[0], read_tensors(b)[0]
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_same_end(a: str = "whole", b: str = "runs") -> None:
    """Two runs ended with the same weights, optimizer state, export and metrics."""
    step = steps(a)[-1]
    assert steps(b)[-1] == step
    assert_same_tensors(checkpoint(step, a), checkpoint(step, b))
    assert_same_tensors(export_of(a), export_of(b))
    assert metrics(a) == metrics(b)


def damage(path: Path) -> None:
    """Flip one bit of the last tensor, once the file is there: it is written beside the training."""
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


class Boom(Exception):
    pass


def explode() -> None:
    raise Boom


# --- one file -----------------------------------------------------------------------------------------


def make_trainer(**settings) -> Trainer:
    model = BigramLanguageModel(ModelConfig(n_embd=8, n_head=2, n_layer=1, block_size=4, vocab_size=5))
    model.vocabulary = list("abcde")
    tokens = torch.arange(100).numpy() % 5
    runtime = Runtime()
    return Trainer(model, (tokens, tokens), TrainConfig(**settings), runtime, pytest.fail)


def take_steps(trainer: Trainer, *numbers: int) -> None:
    for step in numbers:
        at(trainer, step).forward_backward()
        trainer.optimizer_step()


def having(trainer: Trainer, progress: Progress) -> Trainer:
    """The trainer with that progress."""
    trainer.progress = progress
    return trainer


ABOUT = {"run_id": "x", "parameters": {}, "origins": {}, "corpus_sha256": "", "trackers": {}}


def saved_in(folder: Path, trainer: Trainer, progress: Progress, about: dict) -> Path:
    """A checkpoint on disk."""
    with CheckpointStore(folder, 2) as store:
        store.save(having(trainer, progress), about)
        store.wait()
        return store.path(progress.step)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_checkpoint_brings_everything_back(optimizer, tmp_path):
    trainer, twin = (make_trainer(optimizer=optimizer) for _ in range(2))
    take_steps(trainer, 0, 1)
    progress = Progress(2, 1.5, 1, 1, Evaluation(1, 1.4, 1.5, 1e-3), 0.25)
    path = saved_in(tmp_path, trainer, progress, ABOUT)
    read = read_checkpoint(path)
    assert read.progress == progress
    assert (read.metadata["run_id"], read.metadata["vocabulary"]) == ("x", list("abcde"))
    read.load_trainer(twin)
    take_steps(trainer, 2)
    take_steps(twin, 2)
    for ours, theirs in zip(trainer.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_builds_a_model_to_sample_from(tmp_path):
    trainer = make_trainer()
    model = load_model_file(saved_in(tmp_path, trainer, Progress(), ABOUT), print)
    assert model.config == trainer.model.config
    assert model.vocabulary == list("abcde")
    assert torch.equal(model.lm_head.weight, trainer.model.lm_head.weight)


def test_the_same_state_gives_the_same_bytes(tmp_path):
    trainer = make_trainer()
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.mkdir()
        saved_in(path, trainer, Progress(), ABOUT)
    a, b = ((path / "step_000000000.safetensors").read_bytes() for path in paths)
    assert a == b


def test_every_flipped_bit_is_noticed(tmp_path):
    path = saved_in(tmp_path, make_trainer(), Progress(), ABOUT)
    data = path.read_bytes()
    for place in range(0, len(data), len(data) // 97):
        flipped = bytearray(data)
        flipped[place] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(Alg1Error) as caught:
            read_checkpoint(path)
        assert str(path) in caught.value.message


def test_every_truncation_is_noticed(tmp_path):
    path = saved_in(tmp_path, make_trainer(), Progress(), ABOUT)
    data = path.read_bytes()
    for length in (0, 1, 7, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(Alg1Error, match="not a whole safetensors file"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    "about, message",
    [
        ({"format": "alg1-model"}, "this is not a checkpoint"),
        ({"format": "alg1-checkpoint", "format_version": 2}, "checkpoint format 2 is not known"),
    ],
)
def test_another_kind_of_file_is_refused(about, message, tmp_path):
    write_tensors(tmp_path / "file", {"x": torch.zeros(1)}, about)
    with pytest.raises(Alg1Error, match=f"{tmp_path / 'file'}: {message}"):
        read_checkpoint(tmp_path / "file")


def test_a_pickle_file_is_named_as_one(tmp_path):
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(Alg1Error, match="PyTorch pickle file"):
        read_checkpoint(tmp_path / "model.pt")


def test_weights_of_another_model_are_refused(tmp_path):
    path = saved_in(tmp_path, make_trainer(), Progress(), ABOUT)
    other = BigramLanguageModel(ModelConfig(n_embd=4, n_head=2, n_layer=1, block_size=4, vocab_size=5))
    with pytest.raises(Alg1Error, match="does not fit this model"):
        read_checkpoint(path).load_model(other)


# --- while the training goes on -------------------------------------------------------------------------


@pytest.fixture
def held_back(monkeypatch):
    """Checkpoints are not written before this event is set."""
    event = threading.Event()

    def write_late(*arguments):
        assert event.wait(60)
        write_tensors(*arguments)

    monkeypatch.setattr(checkpoint_module, "write_tensors", write_late)
    yield event
    event.set()


def test_a_checkpoint_holds_what_was_there_when_it_was_saved(held_back, tmp_path):
    trainer, store = make_trainer(), CheckpointStore(tmp_path, 2)
    take_steps(trainer, 0)
    then = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in named_tensors(joined_tensors(trainer)).items()}
    progress = Progress(step=1)
    path = store.path(1)
    store.save(having(trainer, progress), ABOUT)
    take_steps(trainer, 1)
    assert progress.step == 2
    assert (path.exists(), store.newest_step) == (False, None)
    held_back.set()
    store.wait()
    assert store.newest_step == 1
    read, twin = read_checkpoint(path), make_trainer()
    read.load_trainer(twin)
    assert read.progress == Progress(step=1)
    assert all(torch.equal(tensor, then[name]) for name, tensor in twin.model.state_dict().items())
    loaded = named_tensors(joined_tensors(twin))
    assert loaded.keys() == state.keys() == read.tensors.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())


def test_leaving_the_store_waits_for_the_last_checkpoint(held_back, tmp_path):
    threading.Timer(0.05, held_back.set).start()
    with CheckpointStore(tmp_path, 2) as store:
        store.save(make_trainer(), ABOUT)
    assert read_checkpoint(store.path(0)).progress == Progress()


@pytest.mark.parametrize("notice", ["wait", "raise_if_failed", "save"])
def test_a_failed_checkpoint_is_told_once(notice, tmp_path, monkeypatch):
    trainer, store = make_trainer(), CheckpointStore(tmp_path, 2)

    def no_space(*_):
        raise disk_error("write it", OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(checkpoint_module, "write_tensors", no_space)
    store.save(trainer, ABOUT)
    store._writer.submit(int).result()  # the one before it is done
    with pytest.raises(Alg1Error, match="cannot write it: No space left") as caught:
        store.save(having(trainer, Progress(1)), ABOUT) if notice == "save" else getattr(store, notice)()
    assert (caught.value.exit_code, store.newest_step) == (4, None)
    store.raise_if_failed()
    store.wait()


def test_a_checkpoint_that_fails_while_the_run_ends_with_another_error_is_a_warning(tmp_path, monkeypatch):
    def no_space(*_):
        raise disk_error("write it", OSError(errno.ENOSPC, "No space left on device"))

    warnings: list[str] = []
    monkeypatch.setattr(checkpoint_module, "write_tensors", no_space)
    monkeypatch.setattr(checkpoint_module.LOGGER, "warning", lambda line, text: warnings.append(line % text))
    with pytest.raises(KeyError), CheckpointStore(tmp_path, 2) as store:
        store.save(make_trainer(), ABOUT)
        raise KeyError
    assert warnings == ["warning: cannot write it: No space left on device"]


@pytest.mark.parametrize("step", [3, 6])
def test_a_checkpoint_that_fails_ends_the_run_before_the_next_one(step, start, monkeypatch):
    """Also the one after the last step."""
    taken = []
    optimizer_step, check = Trainer.optimizer_step, CheckpointStore.raise_if_failed

    def no_space(path, *rest):
        if path.name == f"step_{step:09d}.safetensors":
            raise disk_error(f"write {path}", OSError(errno.ENOSPC, "No space left on device"))
        write_tensors(path, *rest)

    def check_later(store):
        concurrent.futures.wait([store._writing] if store._writing else [])
        check(store)

    def note(trainer):
        taken.append(trainer.step)
        optimizer_step(trainer)

    monkeypatch.setattr(checkpoint_module, "write_tensors", no_space)
    monkeypatch.setattr(CheckpointStore, "raise_if_failed", check_later)
    monkeypatch.setattr(Trainer, "optimizer_step", note)
    result = start("--checkpoint-interval", 3)
    assert result.code == 4
    assert f"error: cannot write {checkpoint(step)}: No space left on device\n" in result.err
    assert f"python train.py --resume {only_run()}" in result.err
    assert taken == list(range(step))
    assert max(steps()) < step


# --- which are kept -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keep, best, kept",
    [(1, 5, [5]), (1, 2, [2, 5]), (2, 5, [4, 5]), (2, 0, [0, 4, 5]), (9, 3, [0, 1, 2, 3, 4, 5])],
)
def test_the_newest_and_the_best_are_kept(keep, best, kept, tmp_path):
    trainer, store = make_trainer(), CheckpointStore(tmp_path, keep)
    for step in range(6):
        store.save(having(trainer, Progress(step, best_step=min(step, best))), ABOUT)
    store.wait()
    assert checkpoint_paths(tmp_path) == [store.path(step) for step in kept]
    assert store.newest_step == 5


def test_names_sort_by_step_and_other_files_are_let_be(tmp_path):
    store = CheckpointStore(tmp_path, 1)
    numbers = [0, 9, 10, 99, 1_000, 5_000, 123_456_789]
    for step in reversed(numbers):
        store.path(step).touch()
    others = ["step_1.safetensors", "step_000000001.safetensors.bak", "notes.txt"]
    for name in others:
        (tmp_path / name).touch()
    assert sorted(map(str, checkpoint_paths(tmp_path))) == [str(store.path(step)) for step in numbers]
    store.prune(best_step=9)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == sorted([*others, store.path(9).name, store.path(numbers[-1]).name])


def test_a_run_keeps_the_last_ones_and_the_best(start, monkeypatch):
    losses = iter([4.0, 1.0, 3.0, 2.0, 2.5, 2.6, 2.7])
    monkeypatch.setattr(Trainer, "_mean_losses", lambda self: (3.0, next(losses)))
    assert start("--eval-interval", 1, "--checkpoint-interval", 1).code == 0
    assert steps() == [1, 5, 6]
    newest = newest_checkpoint(only_run(), pytest.fail)
    assert (newest.progress.best_step, newest.progress.best_val) == (1, 1.0)


# --- interrupted and resumed --------------------------------------------------------------------------

MANNERS = {
    "adamw": ["--dropout", 0.3, "--grad-accum-steps", 3, "--lr-schedule", "cosine", "--warmup-iters", 2],
    "sgd": ["--optimizer", "sgd", "--learning-rate", 0.1, "--lr-schedule", "linear", "--min-lr", 1e-4],
    "muon": ["--optimizer", "muon", "--learning-rate", 0.01, "--lr-schedule", "wsd", "--warmup-iters", 2],
    "bfloat16": ["--dtype", "bfloat16", "--grad-clip", 0.1, "--lr-schedule", "step"],
}


@pytest.mark.parametrize("manner", MANNERS)
def test_a_signal_and_a_resume_change_no_byte(manner, start, train, monkeypatch):
    assert start(*MANNERS[manner], into="whole").code == 0
    stop_at(2, monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    result = start(*MANNERS[manner])
    assert result.code == 143
    assert steps()[-1] == 3
    assert train("--resume", "latest").code == 0
    assert_same_end()


ARITHMETICS = {
    "float32, oneDNN": ([], Processor("AuthenticAMD", 26, "Zen 5"), Arithmetic(products="onednn")),
    "bfloat16": (
        [],
        Processor(name="Xeon", flags=frozenset({"amx_bf16"})),
        Arithmetic(dtype="bfloat16", products="onednn"),
    ),
    "bfloat16 with dropout and Muon": (
        ["--dropout", 0.2, "--optimizer", "muon"],
        Processor(name="Xeon", flags=frozenset({"amx_bf16"})),
        Arithmetic(dtype="bfloat16", products="onednn", muon="bfloat16"),
    ),
    "bfloat16, asked for": (
        ["--dtype", "bfloat16"],
        Processor(name="Pentium"),
        Arithmetic(dtype="bfloat16", products="onednn"),
    ),
}


@pytest.mark.skipif(not onednn_works(torch.bfloat16), reason="this build of PyTorch has no oneDNN")
@pytest.mark.parametrize("flags, processor, arithmetic", ARITHMETICS.values(), ids=ARITHMETICS)
def test_a_resume_on_another_processor_changes_no_byte(
    flags, processor, arithmetic, start, train, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(Processor, "read", lambda: processor)
        patch.setattr(arithmetic_module, "SMALL_STEP_FLOPS", 0)
        patch.setattr(arithmetic_module, "BFLOAT16_N_EMBD", 0)
        assert start(*flags, into="whole").code == 0
        stop_at(2, patch, lambda: signal.raise_signal(signal.SIGTERM))
        assert start(*flags).code == 143
    recorded = vars(arithmetic) | environment(torch.device("cpu"), processor)
    assert newest_checkpoint(only_run(), pytest.fail).metadata["arithmetic"] == recorded
    record = json.loads((only_run() / "meta/full_config.json").read_text())
    assert record["runtime"] == recorded
    result = train("--resume", "latest")
    assert result.code == 0
    assert result.err.splitlines() == [  # that of its products is kept, but it may round differently
        f"warning: the run was computed with PyTorch {torch.__version__} on {processor.name}"
        f" {torch.backends.cpu.get_cpu_capability()}, and continues with"
        f" {environment(torch.device('cpu'), Processor.read())['platform']}: it may not end with the same"
        " bytes"
    ]
    assert f"cpu, {arithmetic.dtype}, 1 thread" in result.out
    assert_same_end()


@pytest.mark.skipif(not onednn_works(torch.bfloat16), reason="this build of PyTorch has no oneDNN")
def test_a_resume_without_the_library_of_the_checkpoint_says_so(start, train, monkeypatch):
    stop_at(2, monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    assert start("--dtype", "bfloat16").code == 143
    monkeypatch.setattr(arithmetic_module, "onednn_works", lambda _: False)
    result = train("--resume", "latest")
    assert result.code == 0
    assert result.err.splitlines() == [
        "warning: the run was computed with products by oneDNN, and continues with products by PyTorch: it"
        " may not end with the same bytes"
    ]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_run_and_a_resume_change_no_byte(backend, start, train, monkeypatch, campaign):
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    if backend == "inductor" and not campaign.whole:
        pytest.skip("takes a minute: pytest --campaign")
    compile_with(monkeypatch, backend)
    flags = ["--compile", "on", "--dropout", 0.2]
    whole = start(*flags, into="whole")
    assert whole.code == 0 and "does not work here" not in whole.err
    stop_at(2, monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    assert start(*flags).code == 143
    # The command line is silent about it now: what was compiled stays compiled.
    result = train("--resume", "latest", "--compile", "auto")
    assert result.code == 0
    assert ", compiled" in result.out
    assert_same_end()


@pytest.mark.parametrize("step", [0, 3, 5])
def test_a_crash_at_any_step_and_a_resume_change_no_byte(step, start, train, monkeypatch, a_run):
    flags = ["--dropout", 0.2, "--checkpoint-interval", 2]
    a_run(*flags, into="whole")
    stop_at(step, monkeypatch, explode)
    with pytest.raises(Boom):
        start(*flags)
    assert steps()[-1] == step - step % 2
    assert train("--resume", "latest").code == 0
    assert_same_end()


def test_a_run_interrupted_at_every_step_ends_with_the_same_bytes(a_run, train, monkeypatch):
    a_run("--dropout", 0.2, into="whole")
    a_run("--dropout", 0.2, stop=0)
    for step in range(1, 5):
        stop_at(step, monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
        assert train("--resume", "latest").code == 130
        assert steps()[-1] == step + 1
    assert train("--resume", "latest").code == 0
    assert_same_end()


OPTIONS = ["--positions", "rotary", "--qk-norm", "--zero-init"]


def test_a_run_with_model_options_is_resumed_to_the_same_bytes(a_run, train):
    flags = [*OPTIONS, "--optimizer", "muon"]
    a_run(*flags, into="whole")
    a_run(*flags, stop=2)
    assert train("--resume", "latest").code == 0
    assert_same_end()
    assert not any("position_embedding_table" in name for name in read_checkpoint(checkpoint(6)).tensors)


def test_the_checkpoints_of_the_reference_model_name_no_options(a_run):
    a_run()
    named = read_checkpoint(checkpoint(6)).metadata["model"].keys()
    assert named == {"n_embd", "n_head", "n_layer", "block_size", "dropout", "vocab_size"}


@pytest.mark.parametrize(
    ("flag", "value", "shown"),
    [
        ("--positions", "rotary", "positions: 'learned' -> 'rotary'"),
        ("--qk-norm", None, "qk_norm: false -> true"),
        ("--zero-init", None, "zero_init: false -> true"),
    ],
)
def test_a_run_from_before_the_options_is_one_of_the_reference_model(flag, value, shown, a_run, train):
    a_run()
    path = checkpoint(6)
    tensors, metadata = read_tensors(path)
    for name in MODEL_OPTIONS:
        del metadata["parameters"][name]
    write_tensors(path, tensors, metadata)

    refused = train("--resume", "latest", flag, *([] if value is None else [value]))

    assert refused.code == 2
    assert f"error: the run cannot be resumed with other values: {shown}\n" in refused.err
    assert train("--resume", "latest", "--max-iters", 7).code == 0


def test_a_signal_prints_the_command_that_goes_on(start, train, text_file, monkeypatch):
    for into in ("runs", "other runs"):
        stop_at(2, monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
        result = start(into=into)
        assert result.code == 130
        line = result.out.splitlines()[-2]
        said, command = line.split("; continue with: ")
        assert said == "stopped at step 3"
        words = shlex.split(command)
        assert words[:3] == ["python", "train.py", "--resume"]
        assert train(*words[2:]).code == 0
        assert final(into)["steps"] == 6


@pytest.mark.parametrize(
    "flags",
    [
        ["--checkpoint-interval", 1, "--keep-checkpoints", 1],
        ["--checkpoint-interval", 0, "--histogram-interval", 1],
        ["--export", "last", "--patience", 100],
        ["--eval-interval", 3],
        ["--eval-iters", 7],
    ],
)
def test_other_intervals_after_a_resume_leave_the_weights_the_same(flags, a_run, train):
    a_run(into="whole")
    a_run(stop=3)
    assert train("--resume", "latest", *flags).code == 0
    assert_same_tensors(checkpoint(6, "whole"), checkpoint(6))


@pytest.mark.parametrize("way", ["latest", "run id", "run directory", "absolute path"])
def test_the_ways_to_name_a_run(way, a_run, train):
    a_run(stop=2)
    run = only_run()
    name = {"latest": way, "run id": run.name, "run directory": run, "absolute path": run.absolute()}[way]
    assert train("--resume", name).code == 0
    assert final()["steps"] == 6


def test_latest_is_the_newest_run(start, train):
    for _ in range(2):
        start()
    _, newest = sorted(path for path in Path("runs").iterdir() if path.is_dir())
    result = train("--resume", "latest", "--max-iters", 7)
    assert result.code == 0
    assert str(newest) in result.out
    assert json.loads((newest / "eval/final.json").read_text())["steps"] == 7


def test_a_run_goes_on_from_one_of_its_checkpoints(a_run, train):
    a_run(*ALL_KEPT, into="whole")
    a_run(*ALL_KEPT)
    result = train("--resume", checkpoint(2))
    assert result.code == 0
    names = [f"step_{step:09d}.safetensors" for step in (3, 4, 5, 6)]
    assert [line for line in result.out.splitlines() if line.startswith("renaming ")] == [
        f"renaming {name} to {name}.aside: the run continues from step_000000002.safetensors"
        for name in names
    ]
    assert sorted(path.name for path in checkpoint(2).parent.glob("*.aside")) == [f"{n}.aside" for n in names]
    assert_same_end()


@pytest.mark.parametrize("flags, code", [(["--print-config"], 0), (["--learning-rate", 9], 2)])
def test_a_resume_that_does_not_start_removes_nothing(flags, code, a_run, train):
    a_run(*ALL_KEPT)
    before = metrics()
    assert train("--resume", checkpoint(2), *flags).code == code
    assert steps() == [0, 1, 2, 3, 4, 5, 6]
    assert metrics() == before


def test_a_finished_run_resumed_is_as_it_was(a_run, train):
    a_run()
    kept = [*only_run().rglob("*.safetensors"), only_run() / "logs/metrics.jsonl"]
    before = {path: path.read_bytes() for path in kept}
    assert train("--resume", "latest").code == 0
    assert {path: path.read_bytes() for path in kept} == before
    assert [*only_run().rglob("*.safetensors"), only_run() / "logs/metrics.jsonl"] == kept
    assert final()["steps"] == 6


def test_metrics_of_a_resumed_run_have_every_row_once(start, train, monkeypatch):
    stop_at(3, monkeypatch, explode)
    with pytest.raises(Boom):
        start("--checkpoint-interval", 2)
    path = only_run() / "logs/metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 3, "loss/train_st')
    assert train("--resume", "latest").code == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss/train_step" in row] == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if "loss/val" in row] == [0, 2, 4, 6]


# --- damaged, missing, in use -------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_is_a_warning_and_the_older_one(a_run, train):
    a_run(*ALL_KEPT, into="whole")
    a_run(*ALL_KEPT, stop=4)
    damage(checkpoint(5))
    checkpoint(4).write_bytes(b"")
    result = train("--resume", "latest")
    assert result.code == 0
    warnings = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert [str(checkpoint(5)) in warnings[0], str(checkpoint(4)) in warnings[1]] == [True, True]
    assert all(line.endswith("; trying an older one") for line in warnings)
    assert_same_end()


def test_a_damaged_newer_checkpoint_costs_no_good_one(a_run, train, monkeypatch):
    a_run(*ALL_KEPT, stop=4)
    damage(checkpoint(5))
    damage(checkpoint(4))
    stop_at(3, monkeypatch, explode)
    with pytest.raises(Boom):
        train("--resume", checkpoint(2), "--keep-checkpoints", 1)
    assert steps()[-1] == 3
    assert newest_checkpoint(only_run(), pytest.fail).progress.step == 3


def test_only_damaged_checkpoints_are_an_error(a_run, train):
    a_run(*ALL_KEPT)
    for path in checkpoint_paths(only_run() / "artifacts/checkpoints"):
        damage(path)
    result = train("--resume", "latest")
    assert result.code == 2
    assert f"error: {only_run()}: none of its 7 checkpoints can be read\n" in result.err
    assert steps() == [0, 1, 2, 3, 4, 5, 6]


def test_a_run_without_a_checkpoint_cannot_go_on(a_run, train):
    a_run()
    shutil.rmtree(only_run() / "artifacts/checkpoints")
    result = train("--resume", "latest")
    assert result.code == 2
    assert f"error: {only_run()}: it has no checkpoint\n" in result.err
    words = ["--config", "meta/full_config.json", "--init-from", "artifacts/export/model.safetensors"]
    flags = " ".join(word if word.startswith("--") else f"{only_run()}/{word}" for word in words)
    assert f"hint: start a new run from its export: python train.py {flags}\n" in result.err
    assert train(*flags.split(), "--quiet").code == 0


@pytest.mark.parametrize("name", ["latest", "2020-01-01_001", "nowhere/at/all"])
def test_a_run_that_is_not_there_cannot_go_on(name, train, text_file):
    result = train("--resume", name)
    assert result.code == 2
    assert result.err.startswith("error: ") and "Traceback" not in result.err
    assert not Path("runs").exists()


def test_a_run_in_use_cannot_go_on(a_run, train):
    a_run()
    before = metrics()
    with FileLock(only_run() / ".lock"):
        result = train("--resume", "latest", "--max-iters", 9)
    assert result.code == 2
    assert f"error: {only_run()} is in use by another process\n" in result.err
    assert metrics() == before
    assert train("--resume", "latest", "--max-iters", 9).code == 0


def test_a_refused_resume_leaves_the_run_free(a_run, train):
    a_run()
    assert train("--resume", "latest", "--n-embd", 32).code == 2
    assert train("--resume", "latest").code == 0


def test_temporary_files_of_a_killed_process_are_removed(a_run, train):
    a_run()
    left = [
        only_run() / name
        for name in ("artifacts/checkpoints/.step.1.tmp", "artifacts/export/.m.2.tmp", "meta/.x.3.tmp")
    ]
    for path in left:
        path.touch()
    assert train("--resume", "latest").code == 0
    assert temporary_files() == []


# --- what may change ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, value, shown",
    [
        ("--n-embd", 32, "n_embd: 16 -> 32"),
        ("--n-layer", 2, "n_layer: 1 -> 2"),
        ("--block-size", 4, "block_size: 8 -> 4"),
        ("--dropout", 0.5, "dropout: 0.0 -> 0.5"),
        ("--positions", "rotary", "positions: 'learned' -> 'rotary'"),
        ("--batch-size", 3, "batch_size: 2 -> 3"),
        ("--grad-accum-steps", 2, "grad_accum_steps: 1 -> 2"),
        ("--learning-rate", 0.5, "learning_rate: 0.001 -> 0.5"),
        ("--lr-schedule", "cosine", "lr_schedule: 'constant' -> 'cosine'"),
        ("--optimizer", "sgd", "optimizer: 'adamw' -> 'sgd'"),
        ("--weight-decay", 0.3, "weight_decay: 0.01 -> 0.3"),
        ("--grad-clip", 1, "grad_clip: 0.0 -> 1.0"),
        ("--seed", 7, "seed: 1337 -> 7"),
        ("--train-split", 0.8, "train_split: 0.9 -> 0.8"),
    ],
)
def test_what_shaped_the_past_may_not_change(flag, value, shown, a_run, train):
    a_run()
    before = {path: path.read_bytes() for path in only_run().rglob("*") if path.is_file()}
    result = train("--resume", "latest", flag, value)
    assert result.code == 2
    assert f"error: the run cannot be resumed with other values: {shown}\n" in result.err
    assert {path: path.read_bytes() for path in only_run().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "flags, spelled_out",
    [
        ((), ("--dtype", "float32")),
        ((), ("--compile", "off")),
        ((), ("--compile", "auto", "--threads", "auto", "--device", "auto", "--dtype", "auto")),
        ((), ("--device", "cpu", "--threads", 1)),
        ((), ("--vocab-size", VOCAB_SIZE)),
        (("--dtype", "bfloat16"), ("--dtype", "auto")),
        (("--vocab-size", VOCAB_SIZE), ()),
    ],
)
def test_the_value_that_a_run_has_chosen_may_be_spelled_out(flags, spelled_out, a_run, train):
    a_run(*flags, into="whole")
    a_run(*flags, stop=2)
    result = train("--resume", "latest", *spelled_out)
    assert (result.code, result.err) == (0, "")
    assert_same_end()
    assert train("--resume", "latest", "--max-iters", 7).code == 0  # it is no change afterwards, either


@pytest.mark.parametrize(
    "flags, changed, shown",
    [
        ((), ("--dtype", "bfloat16"), "dtype: 'float32' -> 'bfloat16'"),
        (("--dtype", "bfloat16"), ("--dtype", "float32"), "dtype: 'bfloat16' -> 'float32'"),
        ((), ("--vocab-size", VOCAB_SIZE + 1), f"vocab_size: {VOCAB_SIZE} -> {VOCAB_SIZE + 1}"),
    ],
)
def test_another_value_than_a_run_has_chosen_is_refused(flags, changed, shown, a_run, train):
    a_run(*flags, stop=2)
    result = train("--resume", "latest", *changed)
    assert result.code == 2
    assert f"error: the run cannot be resumed with other values: {shown}\n" in result.err


def test_a_resume_has_the_threads_of_the_run_whatever_the_default_is(
    train, text_file, monkeypatch, one_thread
):
    """They decide how sums are split: with another number a run ends with other bytes."""
    monkeypatch.setattr(runtime_module, "SMALL_STEP_FLOPS", 0)  # so that PyTorch's default is taken
    flags = [*TINY, *QUIET_TRACKERS, "--data", text_file, "--threads", "auto"]
    torch.set_num_threads(2)
    assert train(*flags, "--runs-dir", "whole").code == 0
    stop_at(2, monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
    assert train(*flags).code == 130
    for spelled_out in ((), ("--threads", "auto"), ("--threads", 0)):
        torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 does
        shutil.copytree("runs", "copy")
        result = train("--resume", "latest", "--runs-dir", "copy", *spelled_out)
        assert (result.code, result.err) == (0, "") and "2 threads" in result.out
        assert_same_end("whole", "copy")
        assert read_checkpoint(checkpoint(6, "copy")).metadata["arithmetic"]["threads"] == 2
        shutil.rmtree("copy")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    torch.set_num_threads(1)
    result = train("--resume", "latest")
    assert result.code == 0 and result.err == (
        "warning: the run was computed with 2 threads, and continues with 1 thread:"
        " it may not end with the same bytes\n"
    )


def test_every_refused_change_is_shown_at_once(a_run, train):
    a_run()
    result = train("--resume", "latest", "--seed", 7, "--batch-size", 3)
    assert "other values: batch_size: 2 -> 3; seed: 1337 -> 7\n" in result.err


def test_a_constant_run_may_become_longer(a_run, train):
    a_run("--max-iters", 9, into="whole")
    a_run()
    assert train("--resume", "latest", "--max-iters", 9).code == 0
    assert_same_tensors(checkpoint(9, "whole"), checkpoint(9))
    assert final()["steps"] == 9


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step", "wsd"])
def test_a_decayed_run_may_not_become_longer(schedule, a_run, train):
    a_run("--lr-schedule", schedule, "--max-iters", 10)
    result = train("--resume", "latest", "--max-iters", 30)
    assert result.code == 2
    moved = f"max_iters: 10 -> 30 (it moves the {schedule} schedule of the steps already taken)"
    assert moved in result.err
    if schedule == "cosine":
        run = only_run()
        assert result.err.splitlines()[-1] == (
            "hint: leave it out, or start a new run from its weights (optimizer, schedule and steps start"
            f" again): python train.py --config {run}/meta/full_config.json"
            f" --init-from {run}/artifacts/export/model.safetensors --max-iters=30"
        )


def obey(hint: str, train) -> dict:
    """Paste the command that a hint ends with; return the record and the final figures of the new run."""
    program, script, *words = shlex.split(hint.rpartition(": ")[2])
    assert (program, script) == ("python", "train.py")
    result = train(*words)
    assert result.code == 0, result.err
    run = max(Path("runs").iterdir())
    record = json.loads((run / "meta/full_config.json").read_text())
    return record | record["parameters"] | json.loads((run / "eval/final.json").read_text())


@pytest.mark.parametrize(
    ("flags", "given", "outcome"),
    [
        (
            ["--lr-schedule", "cosine"],
            ["--max-iters", 9],
            {"max_iters": 9, "lr_schedule": "cosine", "steps": 9},
        ),
        ([], ["--learning-rate", 0.01, "--eval-interval", 3], {"learning_rate": 0.01, "eval_interval": 3}),
        ([], ["--grad-accum-steps", 2, "--run-tag=-a b", "--aim"], {"grad_accum_steps": 2, "aim": True}),
        ([], ["--n-layer", 2], {"n_layer": 2, "n_embd": 16, "steps": 6}),
        ([], ["--data", "other.txt"], {"data_path": "other.txt", "n_embd": 16, "steps": 6}),
    ],
    ids=["longer", "rate", "flags", "size", "text"],
)
def test_a_change_that_a_resumed_run_refuses_can_be_had_by_the_command_in_the_hint(
    flags, given, outcome, a_run, train, text_file
):
    a_run(*flags)
    Path("other.txt").write_text(TEXT[::-1], encoding="utf-8")
    result = train("--resume", "latest", *given)
    assert result.code == 2
    reached = obey(result.err.splitlines()[-1], train)
    assert reached | outcome == reached
    assert (reached["origins"]["n_embd"] == "--init-from") == ("--n-layer" not in given)


def test_a_run_without_an_export_hands_on_the_weights_of_its_newest_checkpoint(a_run, train, text_file):
    a_run("--lr-schedule", "linear", stop=3)
    result = train("--resume", "latest", "--max-iters", 7)
    assert f"--init-from {checkpoint(4)} --max-iters=7\n" in result.err
    assert obey(result.err.splitlines()[-1], train)["steps"] == 7


def test_a_wsd_run_may_become_longer_while_it_is_stable(a_run, train):
    flags = ["--lr-schedule", "wsd", "--learning-rate", 0.01]
    a_run(*flags, "--max-iters", 10, into="whole")
    a_run(*flags, stop=2)
    assert train("--resume", "latest", "--max-iters", 10).code == 0
    assert_same_tensors(checkpoint(10, "whole"), checkpoint(10))


def test_a_run_cannot_end_before_where_it_is(a_run, train):
    a_run()
    result = train("--resume", "latest", "--max-iters", 5)
    assert result.code == 2
    assert "error: the run is at step 6 already, past max_iters = 5\n" in result.err
    assert "use --max-iters 6 or more" in result.err


def test_another_text_is_refused_and_the_same_text_elsewhere_is_not(a_run, train, text_file):
    a_run()
    text_file.rename("moved.txt")
    Path("other.txt").write_text(TEXT.upper(), encoding="utf-8")
    result = train("--resume", "latest", "--data", "other.txt")
    assert result.code == 2
    assert "error: other.txt: this is not the text that the run was trained on\n" in result.err
    assert train("--resume", "latest", "--data", "moved.txt").code == 0


# --- starting from weights ----------------------------------------------------------------------------


def test_initial_weights_bring_their_sizes(a_run, train, text_file):
    a_run("--export", "last")
    source = shutil.copy(export_of(), "model.safetensors")
    flags = ["--dropout", 0.3, "--max-iters", 1, "--runs-dir", "new", *QUIET_TRACKERS]
    result = train("--data", text_file, "--init-from", source, *flags)
    assert result.code == 0, result.err
    first = read_checkpoint(checkpoint(0, "new"))
    assert_same_weights(load_model_file(first.path, print), BigramLanguageModel().load_safetensors(source))
    sizes = {
        name: first.metadata["parameters"][name] for name in ("n_embd", "n_head", "n_layer", "block_size")
    }
    assert sizes == {"n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 8}
    assert first.metadata["parameters"]["dropout"] == 0.3  # no size: the weights fit any


def test_a_checkpoint_serves_as_initial_weights(a_run, train, text_file):
    a_run()
    source = checkpoint(6)
    result = train(
        "--data", text_file, "--init-from", source, "--max-iters", 1, "--runs-dir", "new", *QUIET_TRACKERS
    )
    assert result.code == 0, result.err
    ours, theirs = read_checkpoint(checkpoint(0, "new")), read_checkpoint(source)
    assert_same_weights(load_model_file(ours.path, print), load_model_file(theirs.path, print))
    assert ours.progress.step == 0
    assert not any(t.any() for name, t in ours.tensors.items() if name.startswith("optimizer."))


def assert_same_weights(a: BigramLanguageModel, b: BigramLanguageModel) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_other_sizes_than_the_initial_weights_are_refused(a_run, train, text_file):
    a_run()
    source = shutil.copy(export_of(), "model.safetensors")
    result = train("--data", text_file, "--init-from", source, "--n-embd", 32, "--runs-dir", "new")
    assert result.code == 2
    assert f"error: {source}: its n_embd is 16, not 32\nhint: leave n_embd out\n" in result.err
    assert not Path("new").exists()


def test_initial_weights_bring_their_options_and_others_are_refused(a_run, train, text_file):
    a_run(*OPTIONS, "--export", "last")
    source = shutil.copy(export_of(), "model.safetensors")
    flags = [
        "--data",
        text_file,
        "--init-from",
        source,
        "--max-iters",
        1,
        "--runs-dir",
        "new",
        *QUIET_TRACKERS,
    ]

    for flag, value, complaint in (
        ("--positions", "learned", "its positions is rotary, not learned"),
        ("--no-qk-norm", None, "its qk_norm is True, not False"),
    ):
        refused = train(*flags, flag, *([] if value is None else [value]))
        assert refused.code == 2
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        assert f"error: {source}: {complaint}\nhint: leave {name} out\n" in refused.err

    assert train(*flags).code == 0
    first = read_checkpoint(checkpoint(0, "new"))
    assert_same_weights(load_model_file(first.path, print), BigramLanguageModel().load_safetensors(source))
    options = {name: first.metadata["parameters"][name] for name in MODEL_OPTIONS}
    assert options == {"positions": "rotary", "qk_norm": True, "zero_init": False}


def test_damaged_initial_weights_are_refused(a_run, train, text_file):
    a_run()
    source = shutil.copy(export_of(), "model.safetensors")
    damage(Path(source))
    result = train("--data", text_file, "--init-from", source, "--runs-dir", "new")
    assert result.code == 2
    assert f"error: {source}: damaged: its bytes do not match its SHA-256\n" in result.err


# --- the end of a run ---------------------------------------------------------------------------------


@pytest.fixture
def val_losses(monkeypatch):
    """Let evaluations find these losses, by step."""

    def script(losses: dict[int, float]) -> None:
        monkeypatch.setattr(Trainer, "_mean_losses", lambda self: (3.0, losses[self.step]))

    return script


def test_lost_patience_ends_the_run_and_exports_the_best(start, val_losses):
    val_losses({0: 4.0, 2: 1.0, 4: 1.5, 6: 1.0, 8: 0.1})
    assert start("--max-iters", 20, "--patience", 2, *ALL_KEPT).code == 0
    assert (final()["steps"], final()["best_step"], steps()[-1]) == (6, 2, 6)
    provenance = read_tensors(export_of())[1]["provenance"]
    assert provenance == {"run_id": only_run().name, "weights": "best", "step": 2, "val_loss": 1.0}
    exported = BigramLanguageModel().load_safetensors(export_of())
    assert_same_weights(exported, load_model_file(checkpoint(2), print))


@pytest.mark.parametrize("which, step, loss", [("best", 2, 1.0), ("last", 6, 2.0)])
def test_the_export_is_what_was_asked_for_and_says_so(which, step, loss, start, val_losses):
    val_losses({0: 4.0, 2: 1.0, 4: 1.5, 6: 2.0})
    result = start("--export", which)
    assert result.code == 0
    about = {"weights": which, "step": step}
    assert final()["export"] == about
    about |= {"run_id": only_run().name, "val_loss": loss}
    assert read_tensors(export_of())[1]["provenance"] == about
    assert f"{export_of()} ({which} weights, of step {step})" in result.out
    exported = BigramLanguageModel().load_safetensors(export_of())
    assert_same_weights(exported, load_model_file(checkpoint(step), print))


def test_without_its_best_checkpoint_a_run_exports_the_last_weights(start, val_losses, monkeypatch):
    val_losses({0: 4.0, 2: 1.0, 4: 1.5, 6: 2.0})
    stop_at(4, monkeypatch, lambda: damage(checkpoint(2)))
    result = start()
    assert result.code == 0
    assert "warning: " in result.err and "exporting the last weights instead of the best" in result.err
    assert final()["export"] == {"weights": "last", "step": 6}
    exported = BigramLanguageModel().load_safetensors(export_of())
    assert_same_weights(exported, load_model_file(checkpoint(6), print))


def test_a_missing_best_checkpoint_is_sought_anew_after_a_resume(start, train, val_losses):
    val_losses({0: 4.0, 2: 1.0, 4: 1.5, 6: 2.0, 8: 1.9})
    start(*ALL_KEPT)
    checkpoint(2).unlink()
    tensors, metadata = read_tensors(checkpoint(6))
    metadata["progress"]["seconds"] = 1000.0
    write_tensors(checkpoint(6), tensors, metadata)
    result = train("--resume", "latest", "--max-iters", 8)
    assert (result.code, result.err) == (0, "")
    assert final()["export"] == {"weights": "best", "step": 8}
    assert final()["seconds_in_loop"] > 1000  # the time until then still counts


def test_output_gets_a_copy_of_the_export(start):
    assert start("--output", "mine.safetensors").code == 0
    assert Path("mine.safetensors").read_bytes() == export_of().read_bytes()


@pytest.mark.parametrize(
    "output, message",
    [("no/folder/x", "there is no folder no/folder"), (".", "this is a folder")],
)
def test_an_output_that_cannot_be_is_refused_before_the_run(output, message, start):
    result = start("--output", output)
    assert result.code == 2
    assert f"error: --output {output}: {message}\n" in result.err
    assert not Path("runs").exists()


# --- the disk -----------------------------------------------------------------------------------------


def test_a_file_is_written_synced_renamed_and_its_folder_synced(tmp_path, monkeypatch):
    calls = []
    names = {}
    plain = {name: getattr(os, name) for name in ("open", "write", "fsync", "rename", "close")}

    def open_(path, flags, *mode):
        descriptor = plain["open"](path, flags, *mode)
        names[descriptor] = Path(path)
        calls.append(("open", Path(path), flags))
        return descriptor

    def write(descriptor, data):
        calls.append(("write", names[descriptor], bytes(data)))
        return plain["write"](descriptor, data)

    def fsync(descriptor):
        calls.append(("fsync", names[descriptor]))
        plain["fsync"](descriptor)

    def rename(a, b):
        calls.append(("rename", Path(a), Path(b)))
        plain["rename"](a, b)

    for name, function in {"open": open_, "write": write, "fsync": fsync, "rename": rename}.items():
        monkeypatch.setattr(files.os, name, function)
    target = tmp_path / "file"
    write_atomically(target, b"content")
    temporary = calls[0][1]
    assert temporary.parent == tmp_path and temporary != target
    assert calls == [
        ("open", temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL),
        ("write", temporary, b"content"),
        ("fsync", temporary),
        ("rename", temporary, target),
        ("open", tmp_path, os.O_RDONLY),
        ("fsync", tmp_path),
    ]


def test_a_system_that_takes_few_bytes_at_a_time_gets_them_all(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    write_atomically(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def fail_to_sync_folders(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def syncing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", syncing)
    files._warn_of_power_loss.cache_clear()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_a_folder_costs_one_warning(code, start, monkeypatch, a_run):
    a_run(into="whole")
    fail_to_sync_folders(code, monkeypatch)
    result = start()
    reason = os.strerror(code)
    assert result.code == 0
    assert result.err == (
        f"warning: the file system cannot fsync folders ({reason}): a power loss may undo the newest files\n"
    )
    assert_same_end()


def test_a_folder_that_fails_to_sync_is_an_error(start, monkeypatch):
    fail_to_sync_folders(errno.EIO, monkeypatch)
    result = start()
    assert result.code == 4
    assert f"{os.strerror(errno.EIO)}\n" in result.err


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(Boom), atomic_file(path) as descriptor:
        os.write(descriptor, b"half")
        raise Boom
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def fail_for(name: str, call: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a system call fail when it is about the file called `name`; a write is half done first."""
    open_, write, fsync, rename = os.open, os.write, os.fsync, os.rename
    descriptors = set()
    error = OSError(code, os.strerror(code))

    def opening(path, *arguments, **options):
        if call == "open" and name in str(path):
            raise error
        descriptor = open_(path, *arguments, **options)
        (descriptors.add if name in str(path) else descriptors.discard)(descriptor)
        return descriptor

    def writing(descriptor, data):
        if call == "write" and descriptor in descriptors:
            if len(data) < 1000:
                raise error
            data = data[: len(data) // 2]
        return write(descriptor, data)

    def syncing(descriptor):
        if call == "fsync" and descriptor in descriptors:
            raise error
        fsync(descriptor)

    def renaming(a, b, **options):
        if call == "rename" and name in str(b):
            raise error
        rename(a, b, **options)

    for system_call, function in (
        ("open", opening),
        ("write", writing),
        ("fsync", syncing),
        ("rename", renaming),
    ):
        monkeypatch.setattr(files.os, system_call, function)


@pytest.mark.parametrize(
    "call, code",
    [
        ("open", errno.EACCES),
        ("write", errno.ENOSPC),
        ("write", errno.EFBIG),
        ("fsync", errno.ENOSPC),
        ("fsync", errno.EIO),
        ("rename", errno.ENOSPC),
        ("rename", errno.EROFS),
    ],
)
def test_a_disk_that_refuses_a_checkpoint_costs_no_older_one(call, code, start, train, monkeypatch, a_run):
    a_run(*ALL_KEPT, into="whole")
    with monkeypatch.context() as patch:
        fail_for("step_000000004", call, code, patch)
        result = start(*ALL_KEPT)
    assert result.code == 4
    assert f"error: cannot write {checkpoint(4)}: {os.strerror(code)}\n" in result.err
    assert f"then continue: python train.py --resume {only_run()}\n" in result.err
    assert steps() == [0, 1, 2, 3]
    for step in steps():
        assert_same_tensors(checkpoint(step), checkpoint(step, "whole"))
    assert temporary_files() == []
    assert train("--resume", "latest").code == 0
    assert_same_end()


@pytest.mark.parametrize("name", ["model.safetensors", "final.json", "samples.txt"])
def test_a_disk_that_refuses_a_result_leaves_a_run_that_can_be_resumed(
    name, start, train, monkeypatch, a_run
):
    a_run(into="whole")
    with monkeypatch.context() as patch:
        fail_for(name, "fsync", errno.ENOSPC, patch)
        result = start()
    assert result.code == 4
    assert f"{name}: {os.strerror(errno.ENOSPC)}\n" in result.err
    assert temporary_files() == []
    assert train("--resume", "latest").code == 0
    assert_same_end()


def test_an_old_checkpoint_that_cannot_be_removed_costs_nothing(tmp_path, monkeypatch):
    def unlink(self, missing_ok=False):
        raise PermissionError(errno.EACCES, "no")

    store = CheckpointStore(tmp_path, 1)
    store.path(1).touch()
    store.path(2).touch()
    monkeypatch.setattr(Path, "unlink", unlink)
    store.prune(None)
    assert store.path(1).exists()


# --- checkpoints that a stranger made ------------------------------------------------------------------

HOSTILE = {
    "step is text": lambda m: m["progress"].update(step="5"),
    "step below zero": lambda m: m["progress"].update(step=-1),
    "step is a fraction": lambda m: m["progress"].update(step=0.5),
    "progress is a list": lambda m: m.update(progress=[]),
    "progress has more": lambda m: m["progress"].update(more=1),
    "best value is text": lambda m: m["progress"].update(best_val="low"),
    "evaluation is short": lambda m: m["progress"].update(evaluation={"step": 1}),
    "no progress": lambda m: m.pop("progress"),
    "no model": lambda m: m.pop("model"),
    "huge model": lambda m: m["model"].update(n_embd=2**30),
    "more layers": lambda m: m["model"].update(n_layer=10**6),
    "rotary positions with a table": lambda m: m["model"].update(positions="rotary"),
    "unknown option": lambda m: m["model"].update(relu="squared"),
    "heads do not divide": lambda m: m["model"].update(n_head=3),
    "vocabulary of numbers": lambda m: m.update(vocabulary=[1, 2, 3, 4, 5]),
    "vocabulary too short": lambda m: m.update(vocabulary=list("abc")),
    "vocabulary unsorted": lambda m: m.update(vocabulary=list("edcba")),
    "no vocabulary": lambda m: m.update(vocabulary=None),
    "parameters of wrong types": lambda m: m.update(parameters={"batch_size": "many"}),
    "unknown parameters": lambda m: m.update(parameters={"exec": "import os"}),
    "parameters are a list": lambda m: m.update(parameters=[1]),
    "trackers are text": lambda m: m.update(trackers="aim"),
    "tracker without its step": lambda m: m.update(trackers={"aim": {"run": "x"}}),
    "tracker's run is a number": lambda m: m.update(trackers={"aim": {"run": 5, "synced": 0}}),
    "digest is a number": lambda m: m.update(corpus_sha256=5),
    "best step is a fraction": lambda m: m["progress"].update(best_step=1.5),
    "seconds are huge": lambda m: m["progress"].update(seconds=10**400),
    "evaluation step is a float": lambda m: m["progress"].update(
        evaluation={"step": 0.0, "train_loss": 1, "val_loss": 1, "learning_rate": 1}
    ),
    "loss is huge": lambda m: m["progress"].update(
        evaluation={"step": 0, "train_loss": 10**400, "val_loss": 1, "learning_rate": 1}
    ),
    "another step than its name says": lambda m: m["progress"].update(step=7),
    "scaler is text": lambda m: m.update(scaler="x"),
    "arithmetic is text": lambda m: m.update(arithmetic="x"),
    "unknown arithmetic": lambda m: m["arithmetic"].update(rounding="up"),
    "unknown library": lambda m: m["arithmetic"].update(products="blas"),
    "unknown gradient": lambda m: m["arithmetic"].update(gradient="none"),
    "unknown data type": lambda m: m["arithmetic"].update(dtype="int8"),
    "device is a number": lambda m: m["arithmetic"].update(device=1),
    "threads are text": lambda m: m["arithmetic"].update(threads="two"),
    "compiled is text": lambda m: m["arithmetic"].update(compiled="x"),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_checkpoint_with_a_good_digest_and_bad_values_is_refused(how, tmp_path):
    path = saved_in(tmp_path, make_trainer(), Progress(), ABOUT)
    tensors, metadata = read_tensors(path)
    assert read_checkpoint(path).metadata == metadata
    HOSTILE[how](metadata)
    write_tensors(path, tensors, metadata)
    with pytest.raises(Alg1Error) as caught:
        read_checkpoint(path)
    assert caught.value.message.startswith(f"{path}: this checkpoint makes no sense (")
    assert caught.value.exit_code == 2


HOSTILE_TO_SAMPLING = [
    *("no model", "huge model", "more layers", "rotary positions with a table", "unknown option"),
    *("heads do not divide", "vocabulary of numbers", "vocabulary too short", "vocabulary unsorted"),
    "no vocabulary",
]


@pytest.mark.parametrize("how", HOSTILE_TO_SAMPLING)
def test_from_such_a_checkpoint_nothing_is_sampled(how, tmp_path):
    path = saved_in(tmp_path, make_trainer(), Progress(), ABOUT)
    tensors, metadata = read_tensors(path)
    HOSTILE[how](metadata)
    write_tensors(path, tensors, metadata)
    with pytest.raises(Alg1Error) as caught:
        load_model_file(path, print)
    assert caught.value.message == f"{path}: this checkpoint makes no sense (weights)"
    assert caught.value.exit_code == 2


WEIGHT = "ln_f.weight"
HOSTILE_STATES = {
    "a scalar moment": lambda t: t.update({f"optimizer.exp_avg.{WEIGHT}": torch.tensor(1.0)}),
    "a moment too many": lambda t: t.update({f"optimizer.zz.{WEIGHT}": torch.ones(8)}),
    "a name without parts": lambda t: t.update({"optimizer.foo": torch.ones(8)}),
    "a moment is missing": lambda t: t.pop(f"optimizer.exp_avg.{WEIGHT}"),
    "a step is missing": lambda t: t.pop(f"optimizer.step.{WEIGHT}"),
    "a step with a shape": lambda t: t.update({f"optimizer.step.{WEIGHT}": torch.ones(8)}),
    "whole numbers": lambda t: t.update({f"optimizer.exp_avg.{WEIGHT}": torch.ones(8, dtype=torch.int64)}),
    "double precision": lambda t: t.update({f"optimizer.exp_avg.{WEIGHT}": torch.ones(8).double()}),
    "nothing at all": lambda t: [t.pop(name) for name in list(t) if name.startswith("optimizer.")],
}


@pytest.mark.parametrize("how", HOSTILE_STATES)
def test_optimizer_state_that_does_not_fit_is_refused(how, tmp_path):
    trainer = make_trainer()
    take_steps(trainer, 0, 1)
    path = saved_in(tmp_path, trainer, Progress(step=2), ABOUT)
    tensors, metadata = read_tensors(path)
    read_checkpoint(path).load_trainer(make_trainer())
    HOSTILE_STATES[how](tensors)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}  # write_tensors takes float32 only
    about = {"metadata": metadata, "sha256": digest(arrays, metadata)}
    path.write_bytes(save(arrays, {METADATA_KEY: json.dumps(about)}))
    with pytest.raises(Alg1Error, match="does not fit this model or optimizer") as caught:
        read_checkpoint(path).load_trainer(make_trainer())
    assert caught.value.exit_code == 2


def test_a_first_checkpoint_of_an_earlier_release_has_no_optimizer_state(tmp_path):
    path = saved_in(tmp_path, make_trainer(), Progress(), ABOUT)
    tensors, metadata = read_tensors(path)
    write_tensors(path, {n: t for n, t in tensors.items() if not n.startswith("optimizer.")}, metadata)
    read_checkpoint(path).load_trainer(trainer := make_trainer())
    assert torch.equal(trainer.model.lm_head.weight, tensors["model.lm_head.weight"])


DAMAGED_LINES = [b"\0" * 60, b"null\n", b"5\n", b'{"a": 1}\n', b"\xff\xfe\n", b'{"step": "3"}\n']


@pytest.mark.parametrize("line", DAMAGED_LINES)
def test_a_damaged_metrics_file_costs_a_warning_and_its_rows(line, a_run, train):
    a_run()
    (run_dir,) = Path("runs").glob("2*")
    path = run_dir / "logs" / "metrics.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(rows[:3]) + line + b"".join(rows[3:]))
    result = train("--resume", "latest", "--max-iters", 8)
    assert result.code == 0, result.err
    assert result.err.startswith(f"warning: {path} is damaged: its rows of steps ")
    steps = [json.loads(row)["step"] for row in path.read_bytes().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 8


def test_a_checkpoint_outside_a_run_is_refused_and_nothing_is_made(a_run, train):
    a_run()
    Path("elsewhere/a").mkdir(parents=True)
    name = checkpoint(6).name
    copy = shutil.copy(checkpoint(6), f"elsewhere/a/{name}")
    result = train("--resume", copy)
    first_line = f"error: {copy}: this checkpoint is not in a run directory"
    assert (result.code, result.err.splitlines()[0]) == (2, first_line)
    assert sorted(path.name for path in Path("elsewhere").rglob("*")) == ["a", name]


def test_folders_that_were_deleted_by_hand_are_made_again(a_run, train):
    a_run()
    (run_dir,) = Path("runs").glob("2*")
    for name in ("eval", "artifacts/export", "meta"):
        shutil.rmtree(run_dir / name)
    assert train("--resume", "latest", "--max-iters", 8).code == 0
    assert (run_dir / "eval" / "final.json").is_file()
