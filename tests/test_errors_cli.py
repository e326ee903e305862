"""Mistakes of users: each ends in one error line, a hint and an exit code, and changes no file."""

from __future__ import annotations

import ast
import contextlib
import errno
import functools
import importlib
import io
import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from conftest import PROJECT, QUIET_TRACKERS, TEXT, TINY, printed_config, run_process, runner

from compare import RESULTS
from model import BigramLanguageModel
from parameters import ModelConfig, TrainConfig
from utils_alg1.base.errors import Alg1Error, disk_error
from utils_alg1.base.guard import Guard
from utils_alg1.base.text import format_loss
from utils_alg1.console.script import run_script
from utils_alg1.network.tensor_file import CONVERSION, WHERE_WEIGHTS_ARE
from utils_alg1.network.weights import OTHER_WEIGHTS
from utils_alg1.report import page as page_module
from utils_alg1.report import results as results_module
from utils_alg1.run_directory import LOCK_NAME, NO_RUN_HINT, lock_run
from utils_alg1.search.space import SPACE_HINT
from utils_alg1.search.storage import STORAGE_HINT
from utils_alg1.training import resume as resume_module
from utils_alg1.training.trainer import stability_hint
from utils_alg1.utils_config_loader import PATH_HINT, YAML_HINT
from utils_alg1.utils_output import LOGGER, Console
from utils_alg1.utils_run_manager import RunDirectoryCreator, RunIDGenerator, create_run

SHOWS = "python train.py --help explains every value"
NAMES_WEIGHTS = "weights are named with inference.py --model, or train.py --init-from"
COLUMNS = f"{', '.join(RESULTS)}, or any parameter of train.py"
ORDER_HINT = "it orders the table, and --send-to prints none; python compare.py --help lists every flag"
NOT_WHOLE = "it may be truncated or of another format; use another file"
CHECK_DATA = "check the path of --data; --data python-docs is there without a file or a network"
DEVICES = "use cuda for a GPU of NVIDIA or AMD, mps of Apple, xpu of Intel; or cpu, or leave it out"
OF_GPT2 = (
    "gpt2.safetensors: another layout, that of GPT-2 and nanoGPT (transformer.wte.weight, ...), and another"
    " network",
    "sample them with the program that trained them, or train anew: python train.py --data TEXT",
)
HAS_WEIGHTS = "train one: python train.py, or name a --model"


def pickled(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def flip_last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


# (command line, error, hint); text.txt is a text, folder/ is empty, notes.txt is no configuration or model.
TRAIN_MISTAKES = [
    # values
    ("--max-iters five", "--max-iters: max_iters = 'five' must be a whole number", SHOWS),
    ("--learning-rate nan", "learning_rate = NaN must be finite (learning_rate from --learning-rate)", SHOWS),
    ("--n-embd 30 --n-head 0", "n_head = 0 must be above 0 (n_head from --n-head)", SHOWS),
    (
        "--warmup-iters 7 --max-iters 6",
        "warmup_iters = 7 is longer than the run, max_iters = 6"
        " (warmup_iters from --warmup-iters, max_iters from --max-iters)",
        SHOWS,
    ),
    (
        "--serve-tensorboard --no-tensorboard",
        "--serve-tensorboard has nothing to show: tensorboard is off (--tensorboard)",
        SHOWS,
    ),
    # flags
    # options of the model
    # the habits of nanoGPT
    (
        "--init-from=resume",
        "--init-from resume: must be a file of weights",
        "to continue a run: --resume latest",
    ),
    (
        "--init-from scratch",
        "--init-from scratch: must be a file of weights",
        "leave --init-from out: a run starts from scratch",
    ),
    (
        "--config nano.yaml",
        "3 problems:"
        "\n  - nano.yaml: unknown name 'gradient_accumulation_steps': use grad_accum_steps, which counts"
        " those of one process"
        "\n  - nano.yaml: unknown name 'init_from': it is a flag, for the command line: --resume latest"
        "\n  - nano.yaml: unknown name 'N_EMBD'; did you mean n_embd?",
        SHOWS,
    ),
    (
        "--config nested.yaml",
        "nested.yaml: unknown name 'train'; there are no sections: move its names to the top level",
        SHOWS,
    ),
    # files
    (
        "--config nowhere",
        "--config nowhere: no such file or folder",
        PATH_HINT,
    ),
    ("--config notes.txt", "notes.txt: not JSON: Expecting value: line 1 column 1 (char 0)", PATH_HINT),
    ("--resume latest", "there is no run in runs: no such folder", NO_RUN_HINT),
    (
        "--resume 2026-01-01_001 --runs-dir folder",
        "2026-01-01_001: no such run in folder, and no run directory",
        NO_RUN_HINT,
    ),
    (
        "--resume folder",
        "folder: no such run in runs, and no run directory",
        NO_RUN_HINT,
    ),
    ("--init-from nowhere.safetensors", "nowhere.safetensors: no such file", WHERE_WEIGHTS_ARE),
    ("--init-from folder", "folder: this is a folder, not a file of weights", WHERE_WEIGHTS_ARE),
    ("--init-from gpt2.safetensors", *OF_GPT2),
    (
        "--init-from few.safetensors",
        "few.safetensors: characters of the text are not in the model's vocabulary: 'é' (U+00E9)",
        "--new-characters add gives them weights of their own; or leave them out of the text",
    ),
    (
        "--init-from few.safetensors --new-characters keep",
        "new_characters = 'keep' must be one of refuse, add (new_characters from --new-characters)",
        SHOWS,
    ),
    (
        "--init-from few.safetensors --new-characters add --vocab-size 3",
        "vocab_size = 3, but the vocabulary has 48 characters",
        "leave vocab_size out: it is read from the text, or from the model of --init-from",
    ),
    (
        "--config folder",
        "--config folder: none of model.json, train.yaml, data.yaml, tensorboard.json is in this folder",
        PATH_HINT,
    ),
    ("--config misspelt.json", "misspelt.json: unknown name 'n_embed'; did you mean n_embd?", SHOWS),
    (
        "--config model.safetensors",
        "--config model.safetensors: these are weights",
        "to start from them: --init-from model.safetensors",
    ),
    ("--resume notes.txt", "notes.txt: this is a file, not a run", NAMES_WEIGHTS),
    ("--resume latest --runs-dir nowhere", "there is no run in nowhere: no such folder", NO_RUN_HINT),
    (
        "--data https://example.com/a.txt",
        "--data https://example.com/a.txt: must be a file on this machine",
        "download it first: curl -o input.txt https://example.com/a.txt; then --data input.txt",
    ),
    ("--data nowhere.txt", "nowhere.txt: no such text file", CHECK_DATA),
    (
        "--data folder",
        "folder: this folder has no .txt or .txt.gz file",
        "put a text there, or name another: --data PATH",
    ),
    ("--val-data nowhere.txt", "nowhere.txt: no such text file", CHECK_DATA.replace("--data", "--val-data")),
    (
        "--output nowhere/m.safetensors",
        "--output nowhere/m.safetensors: there is no folder nowhere",
        "create it",
    ),
    ("--output folder", "--output folder: this is a folder", "name a file in it"),
    # machine
    ("--device nonsense", "--device nonsense: not one of auto, cpu, cuda, cuda:N, mps, xpu, xpu:N", DEVICES),
    (
        "--device cuda:77",
        "--device cuda:77: this machine has no such device",
        "use --device auto or --device cpu",
    ),
    (
        "--device cpu --dtype float16",
        "--dtype float16 needs CUDA, and the device is cpu",
        "use --dtype float32 or --dtype bfloat16",
    ),
]

# (script, command line, error): mistakes that do not depend on a file.
FLAG_MISTAKES = [
    ("train", "--max-iter 5", "unknown flag --max-iter; did you mean --max-iters?"),
    ("train", "--batch_sise=5", "unknown flag --batch_sise; did you mean --batch-size?"),
    ("train", "--no-data", "unknown flag --no-data\n"),
    ("train", "--qqqqqqq -5", "unknown flag --qqqqqqq"),
    (
        "train",
        "--out_dir=out",
        "unknown flag --out_dir: use --runs-dir: every run gets a folder of its own in it",
    ),
    (
        "train",
        "--wandb_log=True",
        "unknown flag --wandb_log: leave it out: Aim and TensorBoard log every run",
    ),
    ("train", "--lr 1", "unknown flag --lr; did you mean --learning-rate?"),
    ("train", "--wd 1 --lr 1 5", "2 problems:\n  - unknown flag --wd; did you mean --weight-decay?\n"),
    ("train", "stray 'words - too' -1 --", "belongs to no flag: 'stray' 'words - too' '-1'"),
    ("train", "config/train_shakespeare_char.py", "belongs to no flag: 'config/train_shakespeare_char.py'"),
    ("train", "--aim false", "belongs to no flag: 'false'"),
    ("train", "--print-config=yes", "--print-config: takes no value, and was given 'yes'"),
    ("train", "-help", "-h/--help: takes no value, and was given 'elp'"),
    ("train", "--max-iters", "--max-iters: needs a value"),
    ("train", "-- --batch-size 8", "belongs to no flag: '--batch-size' '8'"),
    ("train", "--run-tag --aim", "--run-tag: needs a value"),
    ("train", "--run-tag -x", "--run-tag: needs a value"),
    ("train", "--resume latest --init-from x", "--init-from: not allowed with argument --resume"),
    ("train", "--quiet --verbose", "--verbose: not allowed with argument --quiet"),
    ("train", "--resume=", "--resume: must not be empty"),
    ("train", "--init-from=", "--init-from: must not be empty"),
    ("train", "--config=", "--config: must not be empty"),
    ("inference", "--start hello", "unknown flag --start; did you mean --prompt?"),
    ("inference", "-- ROMEO", "belongs to no flag: 'ROMEO'"),
    ("inference", "--run x --model y", "--model: not allowed with argument --run"),
    ("inference", "--interactive --prompt x", "--prompt: not allowed with argument --interactive"),
    ("inference", "--interactive --prompt-file x", "--prompt-file: not allowed with argument --interactive"),
    ("inference", "--prompt x --prompt-file y", "--prompt-file: not allowed with argument --prompt"),
    ("inference", "--prompt-file=", "--prompt-file: must not be empty"),
    ("inference", "--score=", "--score: must not be empty"),
    ("inference", "--score x --prompt y", "--prompt: not allowed with argument --score"),
    ("inference", "--score x --interactive", "--interactive: not allowed with argument --score"),
    (
        "inference",
        "--score x --unknown skip --seed=1337 --device cpu --temperature 1",
        "--score draws no text: leave --seed, --temperature out",
    ),
    (
        "inference",
        "--stop . --score x --num-samples 1",
        "--score draws no text: leave --stop, --num-samples out",
    ),
    ("inference", "--interactive --num-samples 3", "--interactive draws one text for each prompt"),
    ("inference", "--model=", "--model: must not be empty"),
    ("inference", "--max-new-tokens=", "--max-new-tokens: '' must be a whole number"),
    ("inference", "--max-new-tokens 1.5", "--max-new-tokens: '1.5' must be a whole number"),
    ("inference", "--max-new-tokens 10_", "--max-new-tokens: '10_' must be a whole number"),
    ("inference", "--max-new-tokens -1", "--max-new-tokens: -1 must be at least 0"),
    ("inference", "--num-samples 1e10", "--num-samples: 10000000000 must be at most 2147483647"),
    ("inference", "--temperature hot", "--temperature: 'hot' must be a number"),
    ("inference", "--temperature -1e-3", "--temperature: -0.001 must be at least 0"),
    ("inference", "--temperature nan", "--temperature: nan must be finite"),
    ("inference", "--top-k 0", "--top-k: 0 must be at least 1"),
    ("inference", "--top-p 0", "--top-p: 0.0 must be above 0"),
    ("inference", "--top-p 1.5", "--top-p: 1.5 must be at most 1"),
    ("inference", f"--seed {2**63}", f"--seed: {2**63} must be at most {2**63 - 1}"),
    ("inference", "--unknown z", "--unknown: invalid choice: 'z' (choose from "),
    ("compare", "--srot run", "unknown flag --srot; did you mean --sort?"),
    ("compare", "--runs-dir=", "--runs-dir: must not be empty"),
    ("train", "--seed 1 --seed=2", "--seed is given 2 times: --seed 1, --seed 2"),
    ("train", "--quiet --quiet", "--quiet is given 2 times: --quiet, --quiet"),
    ("train", "--aim --no-aim", "--aim is given 2 times: --aim, --no-aim"),
    ("train", "--data a.txt b.txt", "--data takes one value, and was given 2: 'a.txt' 'b.txt'"),
    ("train", "a.txt --data b.txt", "belongs to no flag: 'a.txt'"),
    ("inference", "--top-k 5 --top-k 9", "--top-k is given 2 times: --top-k 5, --top-k 9"),
    ("inference", "--score a.txt b.txt", "--score takes one value, and was given 2: 'a.txt' 'b.txt'"),
    ("inference", "--prompt To be --seed 1", "--prompt takes one value, and was given 2: 'To' 'be'"),
    ("inference", "--run a --run b --run c", "--run is given 3 times: --run a, --run b, --run c"),
    ("compare", "--tag a --tag 'b c'", "--tag is given 2 times: --tag a, --tag 'b c'"),
    ("search", "--trials 3 --trials 4", "--trials is given 2 times: --trials 3, --trials 4"),
    ("search", "--config a --seed 1 --config b", "--config is given 2 times: --config a, --config b"),
    ("compare", "--csv out.csv", "belongs to no flag: 'out.csv'"),
    ("compare", "--csv --json", "--json: not allowed with argument --csv"),
    ("search", "--n-trials 3", "unknown flag --n-trials; did you mean --trials?"),
    ("search", "--trials many", "--trials: 'many' must be a whole number"),
    ("search", "--storage=", "--storage: must not be empty"),
]

SAMPLING_MISTAKES = [
    ("", "there is no run in runs: no such folder", NO_RUN_HINT),
    ("--runs-dir notes.txt", "there is no run in notes.txt: no such folder", NO_RUN_HINT),
    ("--runs-dir folder", "there is no run in folder", NO_RUN_HINT),
    (
        "--run 2026-01-01_001",
        "2026-01-01_001: no such run in runs, and no run directory",
        NO_RUN_HINT,
    ),
    ("--run folder", "folder: no such run in runs, and no run directory", NO_RUN_HINT),
    ("--run latest", "there is no run in runs: no such folder", NO_RUN_HINT),
    ("--model nowhere", "nowhere: no such file", WHERE_WEIGHTS_ARE),
    ("--model folder", "folder: this is a folder, not a file of weights", WHERE_WEIGHTS_ARE),
    ("--model gpt2.safetensors", *OF_GPT2),
    ("--prompt-file nowhere", "nowhere: no such file", "check its path"),
    (
        "--prompt FILE:notes.txt",
        "--prompt FILE:notes.txt: a prompt is not read from a file this way",
        "the content of the file: --prompt-file notes.txt;"
        " these very characters: printf %s FILE:notes.txt | python inference.py --prompt-file -",
    ),
    ("--prompt=--", "there is no run in runs: no such folder", NO_RUN_HINT),
    ("--run notes.txt", "notes.txt: this is a file, not a run", NAMES_WEIGHTS),
    (
        "--model https://example.com/m.safetensors",
        "https://example.com/m.safetensors: must be a file on this machine",
        "download it first",
    ),
    ("--runs-dir nowhere", "there is no run in nowhere: no such folder", NO_RUN_HINT),
    ("--device gpu", "--device gpu: not one of auto, cpu, cuda, cuda:N, mps, xpu, xpu:N", DEVICES),
    ("--device nonsense", "--device nonsense: not one of auto, cpu, cuda, cuda:N, mps, xpu, xpu:N", DEVICES),
    (
        "--device cuda:77",
        "--device cuda:77: this machine has no such device",
        "use --device auto or --device cpu",
    ),
]

COMPARING_MISTAKES = [
    ("", "there is no run in runs: no such folder", NO_RUN_HINT),
    (
        "--runs-dir notes.txt",
        "there is no run in notes.txt: no such folder",
        NO_RUN_HINT,
    ),
    ("--runs-dir nowhere", "there is no run in nowhere: no such folder", NO_RUN_HINT),
    ("--sort n_embed", "--sort n_embed: no such column; did you mean n_embd?", COLUMNS),
    ("--sort qk-norm", "--sort qk-norm: no such column; did you mean qk_norm?", COLUMNS),
    ("--sort tok/sec", "--sort tok/sec: no such column; did you mean tok/s?", COLUMNS),
    ("--sort 'best val los'", "--sort best val los: no such column; did you mean best_val_loss?", COLUMNS),
    ("--sort tok/s --send-to aim", "--sort: not allowed with --send-to", ORDER_HINT),
    ("--reverse --send-to aim", "--reverse: not allowed with --send-to", ORDER_HINT),
]

OTHER_SPACE = ", or name another --space"

SEARCHING_MISTAKES = [
    ("--space nowhere.yaml", "nowhere.yaml: no such file", f"check its path{OTHER_SPACE}"),
    (
        "--space notes.txt",
        "notes.txt: not JSON: Expecting value: line 1 column 1 (char 0)",
        f"{PATH_HINT}{OTHER_SPACE}",
    ),
    (
        "--space tab.yaml",
        "tab.yaml: line 2, column 1: not YAML: found character '\\t' that cannot start any token",
        f"{YAML_HINT}{OTHER_SPACE}",
    ),
    (
        "--space minimum.yaml",
        'minimum.yaml: n_embd: {"min": 4, "high": 8} must have low and high, and may have step, or log: true',
        SPACE_HINT,
    ),
    ("--runs-dir notes.txt", "--runs-dir notes.txt: this is a file", "name a folder"),
    ("--device gpu", "--device gpu: not one of auto, cpu, cuda, cuda:N, mps, xpu, xpu:N", DEVICES),
    ("--data nowhere.txt", "nowhere.txt: no such text file", CHECK_DATA),
    (
        "--storage notes.txt",
        "the storage notes.txt cannot be used: Could not parse SQLAlchemy URL from given URL string",
        STORAGE_HINT,
    ),
    (
        "--storage sqlite:///notes.txt",
        "the storage sqlite:///notes.txt cannot be used: (sqlite3.DatabaseError) file is not a database",
        STORAGE_HINT,
    ),
    (
        "--storage sqlite:///nowhere/a.db",
        "the storage sqlite:///nowhere/a.db cannot be used:"
        " (sqlite3.OperationalError) unable to open database file",
        STORAGE_HINT,
    ),
]

# (what is done to the weights of a run, error, hint): the same whether they are sampled or trained on.
DAMAGE = {
    "cut": (lambda data: data[:-9], "not a whole safetensors file (", NOT_WHOLE),
    "empty": (lambda data: b"", "not a whole safetensors file (", NOT_WHOLE),
    "a text": (lambda data: b"remember the milk", "not a whole safetensors file (", NOT_WHOLE),
    "a flipped bit": (flip_last_bit, "damaged: its bytes do not match its SHA-256", "use another copy of it"),
    "a pickle": (
        lambda data: pickled(torch.zeros(2)),
        "this is a PyTorch pickle file (.pt), which could run code when it is read",
        f'convert it: python -c "{CONVERSION}" {{path}} {{path}}.safetensors',
    ),
    "another model": (
        lambda data: safetensors.numpy.save({"x": np.zeros(2)}),
        "there is no token_embedding_table.weight in it; its names are x",
        OTHER_WEIGHTS,
    ),
}

TOO_LONG = "x" * 300


def snapshot(folder: Path, *ignored: str) -> dict[str, bytes | None]:
    """Return every path in a folder with the content of the file, or None for a folder."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {
        name: path.read_bytes() if path.is_file() else None
        for name, path in paths.items()
        if not name.startswith(ignored)
    }


@pytest.fixture
def place(text_file: Path) -> Path:
    """A working folder with a text, an empty folder and invalid files of every kind."""
    folder = text_file.parent
    (folder / "folder").mkdir()
    (folder / "notes.txt").write_text("remember the milk\n", encoding="utf-8")
    (folder / "misspelt.json").write_text('{"n_embed": 32}')
    (folder / "list.json").write_text("[32]")
    (folder / "broken.json").write_text('{"batch_size": 4,}')
    (folder / "list.yaml").write_text("- 32\n")
    (folder / "tab.yaml").write_text("a:\n\tb: 3\n")
    (folder / "nested.yaml").write_text("train: {batch_size: 3}\n")
    (folder / "nano.yaml").write_text("gradient_accumulation_steps: 5\ninit_from: resume\nN_EMBD: 32\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    gpt2 = {"transformer.wte.weight": np.zeros(2)}
    (folder / "gpt2.safetensors").write_bytes(safetensors.numpy.save(gpt2))
    few = BigramLanguageModel(ModelConfig(n_embd=8, n_head=1, n_layer=1, block_size=8, vocab_size=47))
    few.vocabulary = sorted(set(TEXT) - {"é"})
    few.save_safetensors(folder / "few.safetensors")
    (folder / "space.yaml").write_text("n_layer: [1, 2]\n")
    (folder / "minimum.yaml").write_text("n_embd: {min: 4, high: 8}\n")
    return folder


def report(error: str, hint: str | None) -> str:
    return f"error: {error}\n" + (f"hint: {hint}\n" if hint else "")


# --- mistakes ---


@pytest.mark.parametrize(
    ("command", "error", "hint"), TRAIN_MISTAKES, ids=[mistake[0] for mistake in TRAIN_MISTAKES]
)
def test_a_mistake_in_training_is_reported_and_changes_nothing(place, train, command, error, hint):
    before = snapshot(place)
    data = [] if "--data" in command else ["--data", "text.txt"]
    result = train(*data, *shlex.split(command))
    assert result.err == report(error, hint)
    assert (result.code, result.out) == (2, "")
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("command", "error", "hint"), SAMPLING_MISTAKES, ids=[mistake[0] for mistake in SAMPLING_MISTAKES]
)
def test_a_mistake_in_sampling_is_reported_and_changes_nothing(place, sample, command, error, hint):
    before = snapshot(place)
    result = sample(*shlex.split(command))
    assert result.err == report(error, hint)
    assert (result.code, result.out) == (2, "")
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("command", "error", "hint"), COMPARING_MISTAKES, ids=[mistake[0] for mistake in COMPARING_MISTAKES]
)
def test_a_mistake_in_comparing_is_reported_and_changes_nothing(place, capsys, command, error, hint):
    import compare as script

    before = snapshot(place)
    result = runner(script.main, capsys)(*shlex.split(command))
    assert result.err == report(error, hint)
    assert (result.code, result.out) == (2, "")
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("command", "error", "hint"), SEARCHING_MISTAKES, ids=[mistake[0] for mistake in SEARCHING_MISTAKES]
)
def test_a_mistake_in_searching_is_reported_and_changes_nothing(place, capsys, command, error, hint):
    pytest.importorskip("optuna", reason="searching is optional")
    import search as script

    before = snapshot(place, ".tokens")  # the text is read before a storage is opened
    space = [] if "--space" in command else ["--space", "space.yaml"]
    data = [] if "--data" in command else ["--data", "text.txt"]
    result = runner(script.main, capsys)(*space, *data, *shlex.split(command))
    assert result.err == report(error, hint)
    assert (result.code, result.out) == (2, "")
    assert snapshot(place, ".tokens") == before


@pytest.mark.parametrize(
    ("script", "command", "error"), FLAG_MISTAKES, ids=[" ".join(mistake[:2]) for mistake in FLAG_MISTAKES]
)
def test_a_mistake_on_a_command_line_is_one_error_with_a_hint(place, capsys, script, command, error):
    before = snapshot(place)
    result = runner(importlib.import_module(script).main, capsys)(*shlex.split(command), as_typed=True)
    assert result.err.startswith(f"error: {error}")
    *_, hint = result.err.splitlines()
    assert hint.startswith("hint: ") and hint.endswith(f"python {script}.py --help lists every flag")
    assert ("--flag=VALUE" in hint) == ("needs a value" in error)
    assert (result.code, result.out) == (2, "")
    assert snapshot(place) == before


def test_every_error_in_the_sources_has_a_hint():
    """Checks every Alg1Error that the sources raise."""
    without = []
    for path in [*PROJECT.glob("*.py"), *PROJECT.glob("utils_*/**/*.py")]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Alg1Error":
                hints = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "hint")]
                parts = [part for hint in hints for part in ast.walk(hint)]
                if not parts or any(isinstance(part, ast.Constant) and part.value is None for part in parts):
                    without.append(f"{path.name}: {ast.unparse(call.args[0])}")
    assert without == []


def short_end(patch: pytest.MonkeyPatch) -> None:
    """Let runs end without pictures, page and long samples, which take most of the time."""
    patch.setattr(page_module, "write_report", lambda *_: None)
    patch.setattr(results_module, "SAMPLE_LENGTH", 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """A folder with a text, a configuration and a finished run; what training with --quiet said."""
    import train as script

    folder, said = tmp_path_factory.mktemp("run"), io.StringIO()
    flags = ["--data", "text.txt", *TINY, *QUIET_TRACKERS, "--dropout", "0.25", "--output", "my: model"]
    flags[(i := flags.index("--batch-size")) : i + 2] = []  # it is in configs/train.yaml
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        patch.chdir(folder)
        short_end(patch)
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        Path("configs").mkdir()
        Path("configs/train.yaml").write_text("batch_size: 2\n")
        assert script.main([*flags, "--quiet"]) == 0
    return folder, said.getvalue()


@pytest.fixture
def run(trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of that run, in a copy of the folder that is the working folder."""
    short_end(monkeypatch)
    shutil.copytree(trained[0], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    (path,) = Path("runs").glob("*_001")
    return path


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_reported_and_left_as_they_are(run, train, sample, damage):
    change, error, hint = DAMAGE[damage]
    weights = run / "artifacts/export/model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    before = snapshot(Path())
    commands = (sample,), (sample, "--model", weights), (train, "--data", "text.txt", "--init-from", weights)
    for script, *flags in commands:
        result = script(*flags)
        assert (result.code, result.out) == (2, "")
        first, second = result.err.splitlines()
        assert first.startswith(f"error: {weights}: {error}")
        assert second == "hint: " + hint.replace("{path}", str(weights))
    assert snapshot(Path()) == before


def test_a_run_with_damaged_checkpoints_only_says_what_is_left(run, train):
    checkpoints = sorted((run / "artifacts/checkpoints").iterdir())
    for path in checkpoints:
        path.write_bytes(flip_last_bit(path.read_bytes()))
    result = train("--resume", run)
    assert (result.code, result.out) == (2, "")
    *warnings, error, hint = result.err.splitlines()
    assert warnings == [
        f"warning: {path}: damaged: its bytes do not match its SHA-256; trying an older one"
        for path in reversed(checkpoints)
    ]
    assert error == f"error: {run}: none of its {len(checkpoints)} checkpoints can be read"
    assert hint.startswith("hint: put a copy of one there, or start a new run from its export: python ")


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ("--positions rotary", "positions: 'learned' -> 'rotary'"),
        ("--qk-norm --zero-init", "qk_norm: false -> true; zero_init: false -> true"),
    ],
)
def test_the_options_of_a_model_stay_with_it(run, train, flags, changes):
    before = snapshot(Path())
    result = train("--resume", run, *flags.split())
    command = f"python train.py --config {run}/meta/full_config.json {flags.replace(' rotary', '=rotary')}"
    hint = f"leave {'them' if ';' in changes else 'it'} out, or train another model: {command}"
    expected = report(f"the run cannot be resumed with other values: {changes}", hint)
    assert (result.code, result.out, result.err) == (2, "", expected)
    assert snapshot(Path()) == before


def test_a_run_where_weights_are_wanted_is_told_from_them(run, train, sample):
    weights = run / "artifacts/export/model.safetensors"
    before = snapshot(Path())
    hint = f"name {weights}, or the run with --run (inference.py) or --resume (train.py)"
    expected = report(f"{run}: this is a run, not a file of weights", hint)
    for result in (sample("--model", run), train("--data", "text.txt", "--init-from", run)):
        assert (result.code, result.out, result.err) == (2, "", expected)
    for result in (sample("--run", weights), train("--data", "text.txt", "--resume", weights)):
        expected = report(f"{weights}: this is a file, not a run", NAMES_WEIGHTS)
        assert (result.code, result.out, result.err) == (2, "", expected)
    assert snapshot(Path()) == before
    weights.unlink()  # while a run has no export, its newest checkpoint serves
    newest = run / "artifacts/checkpoints/step_000000006.safetensors"
    assert f"hint: name {newest}, or " in sample("--model", run).err


def test_a_run_serves_as_configuration_by_its_record(run, train):
    """The values are those of the run, and their origin is the record of the run."""
    record = run / "meta/full_config.json"
    result = train("--config", run)
    assert result.code == 2
    assert result.err.splitlines()[1] == f"hint: for the parameters of this run: --config {record}"
    shown = printed_config(train("--config", record, "--seed", 7, "--print-config").out)
    assert shown["n_embd"] == (16, str(record))
    assert shown["dropout"] == (0.25, str(record))
    assert shown["seed"] == (7, "--seed")
    assert train("--resume", "latest", "--config", record, "--max-iters", 7, *QUIET_TRACKERS).code == 0


def test_the_listing_of_a_resumed_run_serves_as_configuration(run, train):
    printed = train("--resume", "latest", "--verbose", "--print-config", "--max-iters", 9)
    assert (printed.code, printed.err) == (0, "")
    Path("my.yaml").write_text(printed.out, encoding="utf-8")
    shown = printed_config(printed.out)
    assert shown["max_iters"] == (9, "--max-iters") and shown["dropout"] == (0.25, "resumed run")
    assert shown["output"] == ("my: model", "resumed run")
    again = printed_config(train("--config", "my.yaml", "--print-config").out)
    assert again == {name: (value, "my.yaml") for name, (value, _) in shown.items()}


def test_a_resumed_run_keeps_the_copies_of_the_files_that_it_read(run, train):
    Path("configs/train.yaml").write_text("batch_size: 7\n")
    Path("more").mkdir()
    Path("more/train.yaml").write_text("eval_iters: 1\n")
    for _ in range(2):  # the second time, nothing is copied
        result = train("--resume", "latest", "--max-iters", 7, "--config", "more")
        assert result.code == 0, result.err
        assert json.loads((run / "meta/full_config.json").read_text())["parameters"]["batch_size"] == 2
        copies = {path.name: path.read_text() for path in (run / "meta/configs").iterdir()}
        assert copies == {"train.yaml": "batch_size: 2\n", "train-2.yaml": "eval_iters: 1\n"}


@pytest.mark.parametrize(
    ("flags", "way_out"),
    [
        ("", "try a --learning-rate below 1e+30, or --grad-clip 1.0"),
        ("--grad-clip 0.5", "try a --learning-rate below 1e+30"),
        ("--grad-clip 5", "try a --learning-rate below 1e+30, or --grad-clip 1.0"),
    ],
)
def test_what_helps_a_lost_loss_is_not_what_the_run_does_already(place, train, flags, way_out):
    loss = ["--learning-rate", "1e30", "--optimizer", "sgd", "--max-iters", 50, "--eval-interval", 50]
    result = train("--data", "text.txt", *TINY, *QUIET_TRACKERS, "--quiet", *loss, *flags.split())
    assert result.code == 3
    error, hint = result.err.splitlines()
    assert error.startswith("error: the loss is not finite at step ")
    assert hint.split("; ")[0] == f"hint: {way_out}"


def test_half_precision_is_named_where_a_loss_is_lost_to_it():
    config = TrainConfig(learning_rate=0.01, grad_clip=1.0)
    assert stability_hint(config, torch.float16) == "try a --learning-rate below 0.01, or --dtype float32"
    assert stability_hint(config, torch.bfloat16) == "try a --learning-rate below 0.01"


@pytest.mark.parametrize(("flag", "meant"), [("lapto", "configs/laptop"), ("configs/fsat", "configs/fast")])
def test_a_preset_that_is_meant_is_named(place, train, flag, meant):
    shutil.copytree(PROJECT / "configs", "configs")
    result = train("--config", flag)
    error = f"--config {flag}: no such file or folder; did you mean {meant}?"
    assert (result.code, result.err) == (2, report(error, PATH_HINT))


@pytest.mark.parametrize(
    ("command", "error", "hint"),
    [
        (
            "--block-size 500",
            "text.txt: {n:,} characters are too few for block_size = 500: {n_val} of them are for validation",
            "use a longer text, or --block-size {largest} at most",
        ),
        ("--runs-dir notes.txt", "notes.txt: a file is in the way of this folder", "name another"),
        (
            "--runs-dir notes.txt/runs",
            "notes.txt/runs: a file is in the way of this folder",
            "name another",
        ),
    ],
)
def test_a_mistake_found_after_reading_the_text_leaves_only_its_tokens(place, train, command, error, hint):
    n = len((place / "text.txt").read_text(encoding="utf-8"))
    numbers = {"n": n, "n_val": round(0.1 * n), "largest": round(0.1 * n) - 1}
    before = snapshot(place)
    result = train("--data", "text.txt", *command.split())
    assert result.err == report(error, hint).format(**numbers)
    assert (result.code, result.out) == (2, "")
    assert snapshot(place, ".tokens") == before


@pytest.mark.parametrize("flag", ["--data", "--config", "--resume", "--init-from", "--output", "--device"])
def test_training_reports_a_name_that_is_too_long(place, train, flag):
    data = [] if flag == "--data" else ["--data", "text.txt"]
    check_too_long(place, lambda: train(*data, flag, TOO_LONG))


@pytest.mark.parametrize("flag", ["--model", "--run", "--runs-dir", "--device"])
def test_sampling_reports_a_name_that_is_too_long(place, sample, flag):
    check_too_long(place, lambda: sample(flag, TOO_LONG))


def check_too_long(place: Path, run) -> None:
    before = snapshot(place)
    result = run()
    assert (result.code, result.out) == (2, "")
    first, *further = result.err.splitlines()
    assert first.startswith("error: ")
    assert TOO_LONG in first
    assert [line[:6] for line in further] in ([], ["hint: "])
    assert snapshot(place) == before


def test_the_problems_of_the_values_come_together(place, train):
    command = "--n-embd 30 --dropout=2 --train-split 0.95 --seed -1"
    result = train(*command.split())
    assert result.code == 2
    assert result.err == (
        "error: 4 problems:\n"
        "  - dropout = 2.0 must be below 1 (dropout from --dropout)\n"
        "  - n_embd = 30 must be divisible by n_head = 4 (n_embd = 32 is) (n_embd from --n-embd)\n"
        "  - seed = -1 must be at least 0 (seed from --seed)\n"
        "  - train_split = 0.95 and val_split = 0.1 make 1.05, more than the whole text"
        " (train_split from --train-split)\n"
        f"hint: {SHOWS}\n"
    )


def test_print_config_reports_the_same_problems_as_training(place, train):
    command = ["--data", "text.txt", "--n-embd", 30, "--seed", -1]
    assert train(*command, "--print-config") == train(*command)


def test_a_script_ends_with_the_exit_code_and_without_a_traceback(workdir):
    result = run_process("inference.py", "--no-such-flag", cwd=workdir)
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[0] == "error: unknown flag --no-such-flag"
    assert len(result.err.splitlines()) == 2
    assert os.listdir(workdir) == []


@pytest.mark.parametrize(
    ("script", "words", "missing"),
    [
        ("train.py", "--data text.txt", "numpy"),
        ("train.py", "--data text.txt --print-config", "yaml"),
        ("train.py", "--init-from text.txt", "numpy"),
        ("inference.py", "--model text.txt", "numpy"),
        ("compare.py", "--runs-dir old", "filelock"),
    ],
)
def test_a_python_without_the_libraries_is_told_apart(script, words, missing, workdir):
    """As before the environment is activated: -S leaves out what is installed, -E the variables."""
    Path("text.txt").write_text("some text " * 200)
    RunDirectoryCreator("old").create("2026-01-31_001").joinpath(".lock").touch()
    before = snapshot(workdir)
    command = [sys.executable, "-S", "-E", str(PROJECT / script), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    hint = "source .venv/bin/activate, or pip install -e ."
    assert done.stderr == report(f"{missing} is not installed in this Python", hint)
    assert (done.returncode, done.stdout) == (2, "")
    assert snapshot(workdir) == before


@pytest.mark.parametrize("name", ["utils_alg1.no_such_part", "_ctypes"])
def test_a_part_of_the_program_or_of_python_that_is_missing_is_no_library(name):
    def main() -> int:
        raise ModuleNotFoundError(name=name)

    with pytest.raises(ModuleNotFoundError):
        run_script(main)


# --- runs that are in use, and folders that cannot be written ---


def test_a_run_in_use_cannot_be_resumed(place, train, monkeypatch):
    monkeypatch.setattr(resume_module, "lock_run", functools.partial(lock_run, timeout=0))
    path = RunDirectoryCreator("runs").create("2026-01-31_001")
    with lock_run(path):
        before = snapshot(place)
        result = train("--data", "text.txt", "--resume", "latest")
        assert snapshot(place) == before
    assert result.code == 2
    assert result.err == report(f"{path} is in use by another process", "wait for it, or end it")


def refuse(monkeypatch: pytest.MonkeyPatch, function: str, ending: str, number: int) -> None:
    """Let an os function fail for paths with this ending."""
    real = getattr(os, function)

    def refusing(path, *arguments, **options):
        if isinstance(path, (str, Path)) and str(path).endswith(ending):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, function, refusing)


ELSEWHERE = "change its permissions, or choose another place"
READ_ONLY = "the file system is read-only; choose another place"
FULL = "free some space"


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.EROFS, READ_ONLY), (errno.EACCES, ELSEWHERE), (errno.EPERM, ELSEWHERE), (errno.ENOSPC, FULL)],
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else "",
)
def test_a_runs_folder_that_cannot_be_made_ends_with_4(place, train, monkeypatch, number, hint):
    refuse(monkeypatch, "mkdir", "runs", number)
    before = snapshot(place)
    result = train("--data", "text.txt", *TINY, *QUIET_TRACKERS)
    assert result.err == report(f"cannot create runs: {os.strerror(number)}", hint)
    assert result.code == 4
    assert snapshot(place, ".tokens") == before


@pytest.mark.parametrize(
    ("function", "ending", "action"),
    [
        ("mkdir", "_001", "create a run in runs"),
        ("mkdir", "eval", "create runs/{run_id}/eval"),
        ("mkdir", "checkpoints", "create runs/{run_id}/artifacts/checkpoints"),
        ("open", f"_001/{LOCK_NAME}", "lock runs/{run_id}"),
        ("open", f"runs/{LOCK_NAME}", "lock runs"),
    ],
)
def test_a_run_directory_is_whole_or_not_there(workdir, monkeypatch, function, ending, action):
    create_run("runs").__exit__()
    before = snapshot(workdir)
    monkeypatch.setattr(RunIDGenerator, "generate", lambda self, tag: "2026-01-31_001")
    refuse(monkeypatch, function, ending, errno.ENOSPC)
    with pytest.raises(Alg1Error) as caught:
        create_run("runs")
    reason = os.strerror(errno.ENOSPC)
    assert caught.value.message == f"cannot {action.format(run_id='2026-01-31_001')}: {reason}"
    assert (caught.value.hint, caught.value.exit_code) == (FULL, 4)
    assert snapshot(workdir) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_ends_with_4(place, train):
    locked = place / "folder"
    locked.chmod(0o500)
    try:
        result = train("--data", "text.txt", "--runs-dir", "folder/runs", *TINY, *QUIET_TRACKERS)
        assert os.listdir(locked) == []
    finally:
        locked.chmod(0o700)
    assert result.err == report("cannot create folder/runs: Permission denied", ELSEWHERE)
    assert result.code == 4


# --- how a script ends ---


def end_of(main, capsys) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def raising(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (Alg1Error("a is wrong"), 2, "error: a is wrong\n"),
        (Alg1Error("a is wrong", "mend a"), 2, "error: a is wrong\nhint: mend a\n"),
        (Alg1Error("the loss is not finite", None, 3), 3, "error: the loss is not finite\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "f"),
            4,
            f"error: cannot use f: No space left on device\nhint: {FULL}\n",
        ),
        (OSError("odd"), 4, "error: cannot continue: odd\nhint: check the disk, or choose another place\n"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "f"),
            2,
            "error: cannot use f: File name too long\nhint: choose a shorter name\n",
        ),
    ],
    ids=repr,
)
def test_a_failure_ends_in_lines_and_a_code(capsys, error, code, printed):
    assert end_of(raising(error), capsys) == (code, "", printed)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_a_signal_while_a_failed_run_closes_hides_no_error(capsys, stop):
    def main() -> int:
        try:
            raise Alg1Error("the disk is full", "make room", 4)
        finally:
            raise stop

    assert end_of(main, capsys) == (4, "", "error: the disk is full\nhint: make room\n")


@pytest.mark.parametrize(
    ("stop", "code", "printed"),
    [(KeyboardInterrupt(), 130, "interrupted\n"), (SystemExit(143), 143, "")],
    ids=repr,
)
def test_a_signal_after_an_error_was_handled_ends_as_usual(capsys, stop, code, printed):
    def main() -> int:
        with contextlib.suppress(Alg1Error):
            raise Alg1Error("tried something else")
        raise stop

    assert end_of(main, capsys) == (code, "", printed)


@pytest.mark.parametrize("code", [0, 130, 143])
def test_a_script_ends_with_the_code_of_its_main(capsys, code):
    assert end_of(lambda: code, capsys) == (code, "", "")


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(raising(ZeroDivisionError()))


def test_a_reader_that_goes_away_is_no_error(workdir):
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, str(PROJECT / "train.py"), "--print-config"]
    done = subprocess.run(command, cwd=workdir, stdout=write_end, stderr=subprocess.PIPE, timeout=120)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


ASCII = {"PYTHONIOENCODING": "ascii"}


def test_a_terminal_without_the_character_gets_a_stand_in(workdir):
    ours, theirs = pty.openpty()
    command = [sys.executable, str(PROJECT / "train.py"), "--print-config", "--config", "café"]
    environment = os.environ | ASCII | {"TERM": "dumb"}
    done = subprocess.run(command, cwd=workdir, env=environment, stderr=theirs, timeout=120)
    os.close(theirs)
    assert done.returncode == 2
    assert os.read(ours, 4096).decode().startswith("error: --config caf?: no such file or folder\r\n")
    os.close(ours)


def test_a_file_or_a_pipe_gets_utf8_whatever_the_locale(workdir):
    environment = os.environ | ASCII
    result = run_process("train.py", "--print-config", "--config", "café", cwd=workdir, env=environment)
    assert (result.code, result.out) == (2, "")
    assert result.err == report("--config café: no such file or folder", PATH_HINT)
    assert os.listdir(workdir) == []
    result = run_process("train.py", "--print-config", "--data", "日本", cwd=workdir, env=environment)
    assert result.code == 0
    assert "\ndata_path: 日本 " in result.out


def test_names_that_are_no_utf8_are_escaped(workdir):
    result = run_process("train.py", "--print-config", "--config", "caf\udce9", cwd=workdir)
    assert result.err == report("--config caf\\udce9: no such file or folder", PATH_HINT)


def test_what_a_pipe_gives_is_utf8_whatever_the_locale(workdir):
    script = (
        "from utils_alg1.console.script import run_script; run_script(lambda: print(ascii(input())) or 0)"
    )
    environment = os.environ | ASCII | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="日本\n".encode(),
        env=environment,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, rb"'\u65e5\u672c'" + b"\n", b"")


@pytest.mark.parametrize(
    ("number", "hint", "code"),
    [
        (errno.ENOSPC, FULL, 4),
        (errno.EDQUOT, "free some of your quota", 4),
        (errno.EFBIG, "raise the file-size limit (ulimit -f)", 4),
        (errno.EROFS, READ_ONLY, 4),
        (errno.EIO, "check the disk, or choose another place", 4),
        (errno.ENAMETOOLONG, "choose a shorter name", 2),
    ],
)
def test_an_error_of_the_system_says_what_to_do(number, hint, code):
    error = disk_error("write runs/x", OSError(number, os.strerror(number)))
    assert error.message == f"cannot write runs/x: {os.strerror(number)}"
    assert (error.hint, error.exit_code) == (hint, code)


# --- what training can do without ---


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("first line\nsecond"), "RuntimeError: first line"),
        (KeyError(), "KeyError"),
        (SystemExit(1), "SystemExit: 1"),
        (ValueError("x" * 500), "ValueError: " + "x" * 188),
        (
            Alg1Error("cannot write x: No space left on device", "free some space"),
            "cannot write x: No space left on device",
        ),
        (FileNotFoundError(2, "No such file or directory", "x.tsv"), "No such file or directory: x.tsv"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("no number"), "OSError: no number"),
    ],
)
def test_a_guard_warns_once_and_then_does_nothing_more(error, reason):
    warnings: list[str] = []
    calls: list[int] = []
    guard = Guard("Aim", warnings.append)

    def track(value: int) -> int:
        calls.append(value)
        if value == 2:
            raise error
        return value

    assert [guard.attempt(track, value) for value in (1, 2, 3)] == [1, None, None]
    guard.fail("again")
    assert calls == [1, 2]
    assert warnings == [f"Aim is switched off, training continues: {reason}"]
    assert not guard.enabled


def test_a_guard_does_not_hold_back_an_interrupt():
    with pytest.raises(KeyboardInterrupt):
        Guard("Aim", print).attempt(raising(KeyboardInterrupt()))


# --- the console ---


@pytest.mark.parametrize(
    ("volume", "out"),
    [({}, "said\n"), ({"quiet": True}, ""), ({"verbose": True}, "said\ndetail\n")],
    ids=["normal", "quiet", "verbose"],
)
def test_the_console_prints_what_was_asked_for_and_logs_everything(workdir, capsys, volume, out):
    console = Console(**volume)
    console.log_to(Path("train.log"))
    console.say("said")
    LOGGER.debug("detail")
    console.warn("careful")
    console.close()
    assert capsys.readouterr() == (out, "warning: careful\n")
    lines = Path("train.log").read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in lines] == ["said", "detail", "warning: careful"]


def test_a_log_that_cannot_be_written_costs_only_the_log(workdir, capsys):
    console = Console()
    console.log_to(workdir)  # a folder
    console.say("said")
    console.close()
    assert capsys.readouterr().out == "said\n"


def test_a_log_is_continued(workdir):
    for word in ("one", "two"):
        console = Console(quiet=True)
        console.log_to(Path("train.log"))
        console.say(word)
        console.close()
    assert [line[20:] for line in Path("train.log").read_text().splitlines()] == ["one", "two"]


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (0.0, "0.0000 (perplexity 1.00, 0.000 bits per character)"),
        (1.5, "1.5000 (perplexity 4.48, 2.164 bits per character)"),
        (1000.0, "1000.0000 (perplexity -, 1442.695 bits per character)"),
    ],
)
def test_a_loss_is_formatted_with_perplexity_and_bits(loss, text):
    assert format_loss(loss) == text


def test_quiet_training_says_nothing(trained):
    _, said = trained
    assert said == ""


ON_WINDOWS = """
import os, runpy, signal, sys
sys.modules.update(dict.fromkeys(("fcntl", "grp", "pwd", "resource", "termios")))  # None: cannot be imported
for name in ("SIGHUP", "SIGUSR1", "pthread_sigmask"):
    delattr(signal, name)
del os.fork, os.nice
sys.platform = "win32"
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["train.py", "inference.py", "search.py", "compare.py"])
def test_windows_is_refused_in_one_line(script, workdir):
    command = [sys.executable, "-c", ON_WINDOWS, str(PROJECT / script), "--help"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    message = "error: ALG1 runs on Linux and macOS\nhint: on Windows use WSL, which is a Linux\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)
