"""train.py as a whole: what a run leaves, what it says, and how it ends when something goes wrong."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import faults
import pytest
import safetensors.torch
import torch
from conftest import PROJECT, QUIET_TRACKERS, TEXT, TINY, lasting_metrics, printed_config, with_changes
from safetensors.torch import save_file

import train as train_script
from model import BigramLanguageModel
from parameters import ModelConfig, specs
from utils_alg1 import utils_run_manager
from utils_alg1.base.errors import Alg1Error
from utils_alg1.network.tensor_file import read_tensors
from utils_alg1.report import results as results_module
from utils_alg1.run import run as run_module
from utils_alg1.run_directory import checkpoint_paths, list_runs
from utils_alg1.tracking.observer import draw_texts
from utils_alg1.training.arithmetic import Arithmetic, Processor, environment
from utils_alg1.training.backward import ManualBackward
from utils_alg1.training.checkpoint import CheckpointStore
from utils_alg1.training.trainer import Trainer
from utils_alg1.utils_run_manager import MetadataCapture

EVALUATION = re.compile(
    r"step +(\d+)  train loss (\d\.\d{4})  val loss (\d\.\d{4})  (best|    )  lr (\d\.\de[+-]\d\d)"
    r"(  [\d,]+ tok/s)?"
)


def shorten_end(monkeypatch):
    monkeypatch.setattr("utils_alg1.report.pictures.draw_loss_curve", lambda *_: None)
    monkeypatch.setattr("utils_alg1.report.pictures.draw_attention", lambda *_: b"")
    monkeypatch.setattr(results_module, "SAMPLE_LENGTH", 4)


@pytest.fixture
def fast_end(monkeypatch):
    """No picture and short samples, where a test is not about them."""
    shorten_end(monkeypatch)


@pytest.fixture
def start(train, text_file, fast_end):
    return lambda *flags: train("--data", text_file, *TINY, *QUIET_TRACKERS, *flags)


@dataclass
class Finished:
    """A run that several tests read, and what it printed."""

    folder: Path
    out: str

    @property
    def run(self) -> Path:
        (run,) = list_runs(str(self.folder / "runs"))
        return run


def finished_run(folder: Path, *flags: str) -> Finished:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        shorten_end(patch)
        said = {"rev-parse HEAD": "c0ffee", "rev-parse --abbrev-ref HEAD": "trunk", "status --porcelain": ""}
        patch.setattr(MetadataCapture, "_git", staticmethod(lambda *words: said[" ".join(words)]))
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        Path("config.json").write_text('{"beta1": 0.8}')
        flags = with_changes(["--data", "text.txt", *TINY, *QUIET_TRACKERS, *flags])
        assert train_script.main(flags) == 0
    return Finished(folder, out.getvalue())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    flags = "--max-iters 7 --eval-interval 3 --lr-schedule linear --gradient-norm-interval 4"
    flags += " --speed-interval 3 --dropout 0.25 --grad-accum-steps 3"
    return finished_run(tmp_path_factory.mktemp("finished"), *flags.split())


@pytest.fixture(scope="module")
def verbose(tmp_path_factory):
    flags = "--verbose --eval-interval 1 --learning-rate 0.1 --checkpoint-interval 1 --keep-checkpoints 1"
    return finished_run(tmp_path_factory.mktemp("verbose"), *flags.split())


def only_run(runs_dir: str = "runs") -> Path:
    (run,) = list_runs(runs_dir)
    return run


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "logs/metrics.jsonl").read_text().splitlines()]


def evaluations(run: Path) -> list[dict[str, float]]:
    return [row for row in rows(run) if "loss/val" in row]


def files_in(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


# --- the run directory --------------------------------------------------------------------------------

RUN_FILES = {
    "meta/full_config.json",
    "meta/git.txt",
    "meta/env.txt",
    "meta/notes.md",
    "logs/metrics.jsonl",
    "logs/samples.jsonl",
    "logs/train.log",
    "artifacts/checkpoints/step_000000000.safetensors",
    "artifacts/checkpoints/step_000000004.safetensors",
    "artifacts/checkpoints/step_000000006.safetensors",
    "artifacts/export/model.safetensors",
    "artifacts/export/config.json",
    "eval/final.json",
    "eval/samples.txt",
    "eval/loss.png",
    "eval/attention.png",
    "eval/report.html",
}


def test_a_run_leaves_its_files_and_no_others(train, text_file):
    Path("configs").mkdir()
    Path("configs/train.yaml").write_text("seed: 7  # mine\n")
    Path("configs/model.json").write_text('{"n_layer": 2}')
    flags = ["--keep-checkpoints", 9, "--checkpoint-interval", 4, "--run-tag", "my try"]
    result = train("--data", text_file, *TINY, "--no-aim", "--learning-rate", 1e-9, *flags)
    assert result.code == 0, result.err
    run = only_run()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_001_my-try", run.name)
    copies = {"meta/configs/train.yaml", "meta/configs/model.json"}
    found = files_in(run) - {".lock"}
    of_tensorboard = ("logs/tensorboard/events.out.tfevents.", "logs/tensorboard/projector")
    shown = {name for name in found if name.startswith(of_tensorboard)}
    steps = {name for name in found if name.startswith("artifacts/checkpoints/")}
    expected_steps = {name for name in RUN_FILES if name.startswith("artifacts/checkpoints/")}
    assert found - shown - steps == (RUN_FILES | copies) - expected_steps
    assert len(shown) == 6 and steps >= expected_steps
    assert (run / "meta/configs/train.yaml").read_text() == "seed: 7  # mine\n"
    assert (run / "meta/configs/model.json").read_text() == '{"n_layer": 2}'
    sizes = struct.unpack(">II", (run / "eval/loss.png").read_bytes()[16:24])
    assert (run / "eval/loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sizes == (960, 540)


def test_full_config_holds_every_value_and_its_origin(finished):
    record = json.loads((finished.run / "meta/full_config.json").read_text())
    parameters, origins = record["parameters"], record["origins"]
    assert parameters.keys() == origins.keys() == specs().keys()
    expected = {
        "dropout": (0.25, "--dropout"),
        "n_embd": (16, "--n-embd"),
        "data_path": ("text.txt", "--data"),
        "aim": (False, "--aim"),
        "beta1": (0.8, "config.json"),
        "beta2": (0.999, "default"),
        "vocab_size": (None, "default"),
    }
    assert {name: (parameters[name], origins[name]) for name in expected} == expected
    assert record["corpus"]["characters"] == len(TEXT)
    assert record["corpus"]["vocab_size"] == len(set(TEXT))
    of_machine = environment(torch.device("cpu"), Processor.read())
    assert record["runtime"] == {**vars(Arithmetic()), **of_machine, "threads": 1}


def test_origin_files_name_commit_and_versions(finished):
    meta = finished.run / "meta"
    assert (meta / "git.txt").read_text() == "commit: c0ffee\nbranch: trunk\ndirty: no\n"
    environment = dict(line.split(": ", 1) for line in (meta / "env.txt").read_text().splitlines())
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_notes_are_kept_by_a_resume(verbose, train, fast_end, workdir):
    shutil.copytree(verbose.folder, workdir, dirs_exist_ok=True)
    notes = only_run() / "meta/notes.md"
    assert notes.read_text().startswith(f"# {only_run().name}\n")
    notes.write_text("mine")
    assert train("--resume", "latest", "--max-iters", 7).code == 0
    assert notes.read_text() == "mine"


def test_metrics_have_a_row_for_each_step_and_each_evaluation(finished):
    train_rows = [row for row in rows(finished.run) if "loss/train_step" in row]
    assert [row["step"] for row in train_rows] == list(range(7))
    assert [row["step"] for row in train_rows if row.get("gradient_norm", 0) > 0] == [0, 4]
    assert all(row.keys() - {"gradient_norm"} == {"step", "loss/train_step"} for row in train_rows)
    speeds = [row for row in rows(finished.run) if "tokens_per_second" in row]
    assert [(row["step"], row.keys()) for row in speeds] == [
        (step, {"step", "tokens_per_second"}) for step in (3, 6)
    ]
    assert all(row["tokens_per_second"] > 0 for row in speeds)
    assert [row["step"] for row in evaluations(finished.run)] == [0, 3, 6, 7]
    assert [row["learning_rate"] for row in evaluations(finished.run)] == pytest.approx(
        [1e-3, 1e-3 * 4 / 7, 1e-3 / 7, 0]
    )
    assert all(
        row.keys() == {"step", "loss/train", "loss/val", "learning_rate", "tokens"}
        for row in evaluations(finished.run)
    )
    assert [row["tokens"] for row in evaluations(finished.run)] == [step * 48 for step in (0, 3, 6, 7)]


@pytest.mark.parametrize("name, steps, sequences", [("finished", 7, 6), ("verbose", 6, 2)])
def test_final_figures_are_those_of_the_metrics(name, steps, sequences, request):
    run = request.getfixturevalue(name).run
    final = json.loads((run / "eval/final.json").read_text())
    last = evaluations(run)[-1]
    best = min(evaluations(run), key=lambda row: row["loss/val"])
    assert (final["steps"], final["run_id"]) == (steps, run.name)
    assert (final["train_loss"], final["val_loss"]) == (last["loss/train"], last["loss/val"])
    assert (final["best_val_loss"], final["best_step"]) == (best["loss/val"], best["step"])
    assert final["best_perplexity"] == pytest.approx(math.exp(best["loss/val"]))
    assert final["best_bits_per_character"] == pytest.approx(best["loss/val"] / math.log(2))
    assert final["tokens"] == steps * sequences * 8
    assert final["seconds_in_loop"] > 0
    assert final["export"] == {"weights": "best", "step": best["step"]}


def test_the_export_is_a_model_and_its_configuration(finished):
    folder = finished.run / "artifacts/export"
    config = ModelConfig.from_json(folder / "config.json")
    assert config == ModelConfig(16, 2, 1, 8, 0.25, len(set(TEXT)))
    model = BigramLanguageModel().load_safetensors(folder / "model.safetensors")
    assert (model.config, model.vocabulary) == (config, sorted(set(TEXT)))


def test_samples_are_drawn_from_the_exported_weights(finished, fast_end):
    folder = finished.run
    model = BigramLanguageModel().load_safetensors(folder / "artifacts/export/model.safetensors")
    samples = draw_texts(model, 1337, 3, 4)
    expected = "\n\n".join(f"--- sample {i}\n{sample}" for i, sample in enumerate(samples, 1)) + "\n"
    assert (folder / "eval/samples.txt").read_text(encoding="utf-8") == expected
    assert f"a sample:\n{samples[0]}\n\nsample    python inference.py" in finished.out


def test_a_picture_that_cannot_be_drawn_costs_one_line(start, monkeypatch):
    def fail(*_):
        raise ImportError("no matplotlib")

    monkeypatch.setattr("utils_alg1.report.pictures.draw_loss_curve", fail)
    result = start()
    assert (result.code, result.err) == (
        0,
        f"warning: {only_run()}/eval/loss.png was not written: no matplotlib\n",
    )
    assert (only_run() / "eval/final.json").exists()


def test_the_loss_falls_on_a_text(train, text_file, fast_end):
    text_file.write_text("To be, or not to be, that is the question:\n" * 80)
    result = train(
        "--data",
        text_file,
        *TINY,
        *QUIET_TRACKERS,
        *("--max-iters", 200, "--eval-interval", 50, "--learning-rate", 0.005, "--batch-size", 8),
    )
    assert result.code == 0
    for subset in ("loss/train", "loss/val"):
        losses = [row[subset] for row in evaluations(only_run())]
        assert losses[0] == pytest.approx(math.log(16), abs=0.2)
        assert losses == sorted(losses, reverse=True) and losses[-1] < 1.0


# --- what it says -------------------------------------------------------------------------------------


def test_printed_losses_are_those_of_the_metrics(verbose):
    printed = [match for line in verbose.out.splitlines() if (match := EVALUATION.fullmatch(line))]
    figures = [(int(match[1]), match[2], match[3], match[5]) for match in printed]
    assert figures == [
        (
            row["step"],
            f"{row['loss/train']:.4f}",
            f"{row['loss/val']:.4f}",
            f"{row['learning_rate']:.1e}",
        )
        for row in evaluations(verbose.run)
    ]
    losses = [row["loss/val"] for row in evaluations(verbose.run)]
    better = [loss < min(losses[:i], default=math.inf) for i, loss in enumerate(losses)]
    assert [match[4] == "best" for match in printed] == better
    assert set(better) == {True, False}


def test_the_log_is_a_copy_of_the_verbose_console(verbose):
    log = (verbose.run / "logs/train.log").read_text(encoding="utf-8")
    logged = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in log.splitlines()]
    assert logged == verbose.out.splitlines()


def test_verbose_names_the_checkpoints_that_are_written_and_removed(verbose):
    lines = verbose.out.splitlines()
    saved = {line.split()[1] for line in lines if line.startswith("wrote ") and "/checkpoints/" in line}
    removed = {line.split()[1] for line in lines if line.startswith("removed ")}
    left = checkpoint_paths(verbose.run / "artifacts/checkpoints")
    assert removed and saved - removed == {str(path.relative_to(verbose.folder)) for path in left}


def test_quiet_prints_nothing_and_logs_everything(start):
    result = start("--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")
    log = (only_run() / "logs/train.log").read_text(encoding="utf-8")
    assert log.count("val loss") >= 4


def test_print_config_of_a_resumed_run_shows_its_values_and_changes_nothing(finished, train, monkeypatch):
    monkeypatch.chdir(finished.folder)
    before = {path: path.read_bytes() for path in only_run().rglob("*") if path.is_file()}
    result = train("--resume", "latest", "--print-config", "--max-iters", 9)
    assert result.code == 0
    shown = printed_config(result.out)
    assert shown["dropout"] == (0.25, "resumed run")
    assert shown["n_embd"] == (16, "resumed run")
    assert shown["max_iters"] == (9, "--max-iters")
    assert {path: path.read_bytes() for path in only_run().rglob("*") if path.is_file()} == before


# --- how it ends --------------------------------------------------------------------------------------


def fail_in(target, name, error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(target, name, fail)


PHASES = [
    (MetadataCapture, "capture_git_info"),
    (utils_run_manager, "write_json"),
    (utils_run_manager, "lock_run"),
    (BigramLanguageModel, "__init__"),
    (Trainer, "__init__"),
    (CheckpointStore, "__init__"),
]


@pytest.mark.parametrize("target, name", PHASES)
def test_a_failure_before_the_first_step_leaves_nothing(target, name, start, train, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        fail_in(target, name, ZeroDivisionError(), patch)
        start()
    assert list_runs("runs") == []
    assert start().code == 0
    assert only_run().name.endswith("_001")


@pytest.mark.parametrize("target, name", PHASES)
def test_an_interrupt_before_the_first_step_leaves_nothing(target, name, start, monkeypatch):
    fail_in(target, name, KeyboardInterrupt(), monkeypatch)
    result = start()
    assert (result.code, result.err) == (130, "interrupted\n")
    assert list_runs("runs") == []


@pytest.mark.parametrize("folder", ["meta", "logs/tensorboard", "artifacts/export", "eval"])
def test_a_disk_that_refuses_the_run_directory_leaves_nothing(folder, start, monkeypatch):
    mkdir = Path.mkdir

    def refusing(self, *arguments, **options):
        if self.as_posix().endswith(f"/{folder}"):
            raise OSError(28, os.strerror(28))
        return mkdir(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refusing)
        result = start()
    assert result.code == 4
    assert f"{folder}: {os.strerror(28)}\n" in result.err
    assert list_runs("runs") == []


HALF_THE_BATCH = "hint: try --batch-size 1 --grad-accum-steps 2, which sees about as much text in a step"
HALF_THE_MODEL = "hint: try --n-embd 8, or a --block-size below 8"


@pytest.mark.parametrize(
    "target, name, where, advice",
    [
        (ManualBackward, "__call__", "in a training step", HALF_THE_BATCH),
        (Trainer, "optimizer_step", "for the model", HALF_THE_MODEL),
        (BigramLanguageModel, "__init__", "for the model", HALF_THE_MODEL),
        (BigramLanguageModel, "forward", "in an evaluation", HALF_THE_MODEL),
    ],
)
def test_out_of_memory_ends_with_3_and_settings_that_fit(target, name, where, advice, start, monkeypatch):
    fail_in(target, name, torch.OutOfMemoryError("Tried to allocate 20 GiB"), monkeypatch)
    result = start()
    assert result.code == 3
    error, hint = result.err.splitlines()
    assert error == f"error: out of memory {where}"
    assert hint.startswith(advice)
    assert "--resume" not in hint
    assert len(list_runs("runs")) == (name != "__init__")


def test_a_bug_is_not_hidden(start, monkeypatch):
    fail_in(Trainer, "optimizer_step", AttributeError("a bug"), monkeypatch)
    with pytest.raises(AttributeError, match="a bug"):
        start()
    log = (only_run() / "logs/train.log").read_text(encoding="utf-8")
    assert "Traceback" in log and log.endswith("AttributeError: a bug\n")


def test_no_arguments_and_no_network_train_on_the_python_documentation(train, workdir, fast_end):
    quick = {"max_iters": 2, "eval_iters": 1, "aim": False, "tensorboard": False}
    Path("config.json").write_text(json.dumps(quick))
    result = train()
    assert result.code == 0, result.err
    assert "training on the Python documentation (python-docs) instead\n" in result.out
    assert not Path("data/input.txt").exists()
    record = json.loads((only_run() / "meta/full_config.json").read_text())
    assert record["corpus"]["path"] == str(Path("data/python-docs.txt"))
    assert record["corpus"]["characters"] == len(Path("data/python-docs.txt").read_text(encoding="utf-8"))
    final = json.loads((only_run() / "eval/final.json").read_text())
    assert final["steps"] == 2
    config = ModelConfig.from_json(only_run() / "artifacts/export/config.json")
    assert (config.n_embd, config.n_head, config.n_layer, config.block_size) == (64, 4, 4, 32)


def test_a_process_told_to_stop_goes_on_with_the_command_it_printed(train, text_file, fast_end):
    flags = ["--data", text_file, *TINY, *QUIET_TRACKERS, "--max-iters", 120, "--eval-interval", 1]
    flags += ["--dropout", 0.2, "--checkpoint-interval", 0]
    ours, theirs = os.pipe()
    # The pipe is small and not read on: the process cannot come to its end before the signal.
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)

    def work() -> int:
        sys.stdout = os.fdopen(theirs, "w", buffering=1)
        return faults.train_here(list(map(str, flags)))

    pid = faults.start_child(work)
    os.close(theirs)
    with open(ours, "rb", buffering=0) as pipe:
        seen = b""
        while b"step      3" not in seen:
            byte = pipe.read(1)
            assert byte, Path("output.txt").read_text()
            seen += byte
        os.kill(pid, signal.SIGTERM)
        out = pipe.readall()
    assert faults.wait(pid) == 143
    assert Path("output.txt").read_text() == "\nstopping after this step; a second signal exits at once\n"
    assert not (only_run() / "eval/final.json").exists()

    command = shlex.split(out.decode().splitlines()[-2].split("; continue with: ")[1])
    assert command == ["python", "train.py", "--resume", str(only_run())]
    result = train(*command[2:])
    assert (result.code, result.err) == (0, "")
    assert train(*flags, "--runs-dir", "whole").code == 0
    whole, ours = only_run("whole"), only_run()
    for name in ("artifacts/checkpoints/step_000000120.safetensors", "artifacts/export/model.safetensors"):
        a, b = read_tensors(whole / name)[0], read_tensors(ours / name)[0]
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert lasting_metrics(whole / "logs/metrics.jsonl") == lasting_metrics(ours / "logs/metrics.jsonl")


# --- streams, signals and files that others own -------------------------------------------------------


class ClosedPipe(io.StringIO):
    """A stdout whose reader goes away after some lines."""

    def write(self, text):
        if self.getvalue().count("\n") > 3:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


def test_a_reader_that_goes_away_does_not_stop_the_training(text_file, fast_end, monkeypatch):
    from utils_alg1.console.script import run_script

    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    arguments = ["--data", str(text_file), *TINY, *QUIET_TRACKERS]
    with pytest.raises(SystemExit) as end:
        run_script(lambda: train_script.main(arguments))
    assert end.value.code == 0
    assert (list_runs("runs")[0] / "artifacts" / "export" / "model.safetensors").is_file()


def test_a_program_started_without_streams_trains(text_file):
    def without_streams() -> int:
        sys.stdout = sys.stderr = None  # as Python does for closed descriptors
        os.closerange(1, 3)
        faults.leave_out_pictures()
        return faults.train_here([str(word) for word in ("--data", text_file, *TINY, *QUIET_TRACKERS)])

    assert faults.wait(faults.start_child(without_streams)) == 0
    assert (list_runs("runs")[0] / "eval" / "final.json").is_file()


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]
)
def test_a_signal_that_python_loses_before_the_loop_still_ends_the_run(
    number, code, train, text_file, monkeypatch
):
    write_records = run_module.write_records

    def interrupted(*arguments):
        with contextlib.suppress(BaseException):  # as a callback of the import system does
            os.kill(os.getpid(), number)
        return write_records(*arguments)

    monkeypatch.setattr(run_module, "write_records", interrupted)
    assert train("--data", text_file, *TINY, *QUIET_TRACKERS).code == code
    assert list_runs("runs") == []


@pytest.mark.parametrize("name", ["text.txt", "notes.md"])
def test_an_output_never_takes_the_place_of_another_file(name, train, text_file):
    Path("notes.md").write_text("mine")
    before = Path(name).read_bytes()
    result = train("--data", text_file, *TINY, *QUIET_TRACKERS, "--output", name)
    assert result.code == 2
    assert result.err.splitlines()[0] == f"error: --output {name}: this file is not an export"
    assert Path(name).read_bytes() == before
    assert not Path("runs").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that takes no file: /proc")
@pytest.mark.parametrize("flags", [["--output", "/proc/m.safetensors"], ["--runs-dir", "/proc"]])
def test_a_place_that_takes_no_file_is_found_before_training(flags, train, text_file):
    result = train("--data", text_file, *TINY, *QUIET_TRACKERS, *flags)
    assert (result.code, result.out) == (4, "")
    assert result.err.startswith("error: cannot ") and result.err.count("\nhint: ") == 1
    assert list_runs("runs") == []


def test_an_output_that_fails_after_training_costs_only_itself(train, text_file, fast_end, monkeypatch):
    write = results_module.write_atomically

    def refusing(path, data):
        if path == "m.safetensors":
            raise Alg1Error("cannot write m.safetensors: no", "choose another folder", 4)
        write(path, data)

    monkeypatch.setattr(results_module, "write_atomically", refusing)
    result = train("--data", text_file, *TINY, *QUIET_TRACKERS, "--output", "m.safetensors")
    export = only_run() / "artifacts/export/model.safetensors"
    assert result.code == 4
    assert result.err == f"error: cannot write m.safetensors: no\nhint: the same file is {export}\n"
    assert (only_run() / "eval/final.json").is_file() and (only_run() / "eval/report.html").is_file()


def test_a_resumed_run_whose_text_has_gone_asks_for_it(train, text_file, fast_end):
    flags = ["--data", "moved.txt", *TINY, *QUIET_TRACKERS]
    Path("moved.txt").write_bytes(Path(text_file).read_bytes())
    assert train(*flags).code == 0
    Path("moved.txt").rename("elsewhere.txt")
    result = train("--resume", "latest", "--max-iters", 8)
    assert result.code == 2
    assert result.err == (
        "error: moved.txt: no such text file\n"
        "hint: put the text of the run there, or name where it lies now: --data PATH\n"
    )
    assert train("--resume", "latest", "--max-iters", 8, "--data", "elsewhere.txt").code == 0


@pytest.mark.parametrize("kind", ["foreign", "checkpoint", "of a run"])
def test_an_output_never_takes_the_place_of_other_weights(kind, train, text_file, fast_end):
    flags = ["--data", text_file, *TINY, *QUIET_TRACKERS]
    assert train(*flags).code == 0
    checkpoint = checkpoint_paths(only_run() / "artifacts/checkpoints")[-1]
    path, why = Path("weights.safetensors"), "this file is not an export"
    if kind == "foreign":
        path.write_bytes(safetensors.torch.save({"w": torch.zeros(3)}))
    elif kind == "checkpoint":
        path.write_bytes(checkpoint.read_bytes())
    else:
        path, why = only_run() / "artifacts/export/model.safetensors", "this is in the directory of a run"
    before = path.read_bytes()
    result = train(*flags, "--output", path)
    assert result.code == 2 and len(list_runs("runs")) == 1
    assert result.err == (
        f"error: --output {path}: {why}\nhint: name another file: an export would take its place\n"
    )
    assert path.read_bytes() == before


def test_the_commands_at_the_end_find_a_run_wherever_it_is(train, text_file, fast_end):
    out = train("--data", text_file, *TINY, *QUIET_TRACKERS).out
    assert f"\nsample    python inference.py --run {only_run()}\n" in out
    assert f"\ncontinue  python train.py --resume {only_run()} " in out


def test_a_run_with_the_parameters_of_another_leaves_its_output_alone(train, text_file, fast_end):
    flags = ["--data", text_file, *TINY, *QUIET_TRACKERS, "--output", "mine.safetensors"]
    assert train(*flags).code == 0
    before = Path("mine.safetensors").read_bytes()
    record = only_run() / "meta/full_config.json"
    assert train("--config", record, "--seed", 5).code == 0
    assert Path("mine.safetensors").read_bytes() == before
    parameters = json.loads((list_runs("runs")[1] / "meta/full_config.json").read_text())["parameters"]
    assert (parameters["output"], parameters["seed"], parameters["data_path"]) == (None, 5, str(text_file))


def test_an_output_takes_the_place_of_an_older_export(train, text_file, fast_end):
    for seed in (1, 2):
        flags = ["--data", text_file, *TINY, *QUIET_TRACKERS, "--output", "m.safetensors", "--seed", seed]
        assert train(*flags).code == 0
    (last,) = list_runs("runs")[1:]
    assert Path("m.safetensors").read_bytes() == (last / "artifacts/export/model.safetensors").read_bytes()


def test_a_text_that_is_too_short_leaves_nothing(train, workdir):
    Path("short.txt").write_text("abc")
    assert train("--data", "short.txt", *TINY, *QUIET_TRACKERS).code == 2
    assert [path.name for path in workdir.iterdir()] == ["short.txt"]


def test_the_commands_at_the_end_name_where_the_run_lies_now(train, text_file, fast_end):
    assert train("--data", text_file, *TINY, *QUIET_TRACKERS).code == 0
    shutil.move("runs", "my runs")
    (run_dir,) = list_runs("my runs")
    flags = ["--max-iters", "7", "--tensorboard"]
    result = train("--resume", run_dir, *flags)
    assert result.code == 0, result.err
    assert f"python inference.py --run '{run_dir}'\n" in result.out
    assert "tensorboard --logdir='my runs' --port=6006" in result.out


def test_weights_of_another_program_take_the_vocabulary_of_a_text(train, sample, text_file, fast_end):
    assert train("--data", text_file, *TINY, *QUIET_TRACKERS).code == 0
    export = list_runs("runs")[0] / "artifacts" / "export" / "model.safetensors"
    save_file(read_tensors(export)[0], "other.safetensors")
    refused = sample("--model", "other.safetensors")
    assert refused.code == 2 and "--vocabulary PATH" in refused.err
    drawn = [
        sample("--model", model, "--max-new-tokens", 20, *flags).out
        for model, flags in ((export, []), ("other.safetensors", ["--vocabulary", text_file]))
    ]
    assert drawn[0] == drawn[1]
    flags = ["--data", text_file, *TINY[4:], *QUIET_TRACKERS, "--init-from", "other.safetensors"]
    assert train(*flags).code == 0
    Path("more.txt").write_text(text_file.read_text() + "§")
    flags[1] = "more.txt"
    result = train(*flags)
    assert result.code == 2 and "is for 48 characters; the text has 49" in result.err


def test_the_garbage_collector_rests_while_the_heavy_packages_come(tmp_path):
    """In a process of its own: here they were imported long ago."""
    program = """
import gc, sys
from utils_alg1.console.script import importing
with importing():
    print(gc.isenabled())
    import numpy
print(gc.isenabled(), gc.get_freeze_count() > 0)
sys.modules["torch"] = numpy
with importing():
    print(gc.isenabled())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\nTrue True\nTrue\n", "")
