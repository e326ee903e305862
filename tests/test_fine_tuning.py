"""train.py --init-from on another text: the model keeps its vocabulary, and may get further characters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUIET_TRACKERS, TEXT, Result, runner
from safetensors.torch import load_file, save_file

from model import PER_CHARACTER, BigramLanguageModel
from parameters import ModelConfig
from utils_alg1.data.corpus import open_corpus
from utils_alg1.network.tensor_file import read_tensors
from utils_alg1.report import page as page_module
from utils_alg1.report import pictures as pictures_module
from utils_alg1.report import results as results_module
from utils_alg1.run_directory import list_runs
from utils_alg1.training.checkpoint import read_checkpoint
from utils_alg1.training.seeds import seed_initial_weights

MODEL = Path("base.safetensors")
SIZES: dict[str, Any] = {"n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 8}
VOCABULARY = sorted(set(TEXT) - set("é日"))
FLAGS = (
    "--batch-size 2 --max-iters 6 --eval-interval 2 --eval-iters 2 --checkpoint-interval 1"
    " --keep-checkpoints 9 --threads 1"
).split() + QUIET_TRACKERS
FEWER = "the lazy dog\n" * 40  # a text with fewer characters than the model's


@pytest.fixture
def base(workdir: Path) -> BigramLanguageModel:
    """A model that knows most characters of TEXT, in MODEL; texts: same.txt, fewer.txt, more.txt."""
    torch.manual_seed(2)
    model = BigramLanguageModel(ModelConfig(**SIZES, vocab_size=len(VOCABULARY)))
    torch.nn.init.normal_(model.lm_head.bias)
    model.vocabulary = VOCABULARY
    model.save_safetensors(MODEL)
    Path("same.txt").write_text("".join(c for c in TEXT if c in VOCABULARY), encoding="utf-8")
    Path("fewer.txt").write_text(FEWER, encoding="utf-8")
    Path("more.txt").write_text(TEXT, encoding="utf-8")
    return model


@pytest.fixture
def tune(base, train, monkeypatch) -> Callable[..., Result]:
    """Trains MODEL on a text: `tune("fewer.txt", "--seed", 3)`. The run ends without pictures."""
    monkeypatch.setattr(pictures_module, "draw_loss_curve", lambda *_: None)
    monkeypatch.setattr(pictures_module, "draw_attention", lambda *_: b"")
    monkeypatch.setattr(results_module, "SAMPLE_LENGTH", 4)
    return lambda text, *flags: train("--data", text, "--init-from", MODEL, *FLAGS, *flags)


def checkpoint(step: int, runs_dir: str = "runs") -> Path:
    return list_runs(runs_dir)[-1] / f"artifacts/checkpoints/step_{step:09d}.safetensors"


def start_of_run() -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights and the vocabulary of the latest run before its first step."""
    first = read_checkpoint(checkpoint(0))
    tensors = {n.removeprefix("model."): t for n, t in first.tensors.items() if n.startswith("model.")}
    return tensors, first.metadata["vocabulary"]


def cached() -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path(".tokens").iterdir()}


# --- the characters of the model ----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["same.txt", "fewer.txt"])
def test_a_model_keeps_its_vocabulary_on_a_text_that_uses_a_part_of_it(tune, base, sample, text):
    result = tune(text)
    assert result.code == 0, result.err
    tensors, vocabulary = start_of_run()
    assert vocabulary == VOCABULARY
    assert all(tensor.equal(tensors[name]) for name, tensor in base.state_dict().items())
    n = len(set(FEWER))
    kept = f"{MODEL}: its vocabulary of {len(VOCABULARY)} is kept; the text has {n} of them"
    assert (kept in result.out.splitlines()) == (text == "fewer.txt")
    assert f"characters, vocabulary of {len(VOCABULARY)}\n" in result.out
    drawn = sample("--prompt", "T🙂", "--max-new-tokens", 3)  # not in fewer.txt
    assert (drawn.code, len(drawn.out)) == (0, 6)


def test_the_tokens_of_a_text_are_those_of_the_model_and_a_new_run_has_its_own(tune, base, train):
    assert tune("fewer.txt").code == 0
    before = cached()
    assert tune("fewer.txt").code == 0
    assert cached() == before
    corpus = open_corpus("fewer.txt")
    assert corpus.tokenizer.vocabulary == sorted(set(FEWER))
    wider = corpus.with_vocabulary(VOCABULARY)
    assert wider.tokenizer.decode(wider.tokens.tolist()) == FEWER
    assert corpus.tokenizer.decode(corpus.tokens.tolist()) == FEWER
    assert cached().items() > before.items()
    before = cached()
    assert train("--data", "fewer.txt", "--n-embd", 16, "--block-size", 8, *FLAGS).code == 0
    assert read_checkpoint(checkpoint(0)).metadata["vocabulary"] == sorted(set(FEWER))
    assert cached() == before


def test_a_vocabulary_of_more_than_256_characters_keeps_its_tokens(workdir):
    Path("text.txt").write_text(FEWER, encoding="utf-8")
    characters = FEWER + "".join(map(chr, range(0x400, 0x600)))
    for _ in range(2):
        wider = open_corpus("text.txt").with_vocabulary(characters)
        assert wider.tokens.dtype == "uint16"
        assert wider.tokenizer.decode(wider.tokens.tolist()) == FEWER


@pytest.mark.parametrize("end", ["", "é"])
def test_what_the_model_has_learned_is_not_said_to_be_unlearnable(tune, workdir, end):
    late = "".join(sorted(set(VOCABULARY) - set("the lazy dog\n")))
    Path("late.txt").write_text(FEWER + late + end, encoding="utf-8")
    result = tune("late.txt", "--new-characters", "add")
    assert result.code == 0, result.err
    assert ("cannot learn" in result.err) is bool(end)


# --- further characters -------------------------------------------------------------------------------


def test_new_characters_are_refused_by_default(tune, workdir):
    before = sorted(workdir.iterdir())
    result = tune("more.txt")
    characters = "'é' (U+00E9), '日' (U+65E5)"
    error = f"error: {MODEL}: characters of the text are not in the model's vocabulary: {characters}"
    hint = "hint: --new-characters add gives them weights of their own; or leave them out of the text"
    assert (result.code, result.out, result.err.splitlines()) == (2, "", [error, hint])
    assert sorted(workdir.iterdir()) == before


@pytest.mark.parametrize("source", ["export", "checkpoint"])
def test_new_characters_get_rows_of_a_new_model_and_the_old_rows_are_not_touched(tune, base, train, source):
    if source == "checkpoint":
        assert tune("fewer.txt").code == 0
        shutil.copy(checkpoint(6), "newest.safetensors")
        state = read_checkpoint(checkpoint(6)).tensors
        base.load_state_dict({name: state[f"model.{name}"] for name in base.state_dict()})
        shutil.rmtree("runs")
    more = ["--new-characters", "add", "--seed", 5]
    model = MODEL if source == "export" else Path("newest.safetensors")
    result = train("--data", "more.txt", "--init-from", model, *FLAGS, *more)
    assert result.code == 0, result.err
    grows = f"{model}: its vocabulary grows by 2 characters: 'é' (U+00E9), '日' (U+65E5)"
    assert result.out.splitlines()[0] == grows
    tensors, vocabulary = start_of_run()
    assert vocabulary == sorted(set(TEXT))
    seed_initial_weights(5)
    fresh = BigramLanguageModel(ModelConfig(**SIZES, vocab_size=len(vocabulary))).state_dict()
    assert not fresh["lm_head.bias"].any() and fresh["lm_head.weight"].std() > 0.015
    for name, old in base.state_dict().items():
        if name not in PER_CHARACTER:
            assert tensors[name].numpy().tobytes() == old.numpy().tobytes(), name
            continue
        assert len(tensors[name]) == len(vocabulary)
        for token, character in enumerate(vocabulary):
            known = character in VOCABULARY
            row = old[VOCABULARY.index(character)] if known else fresh[name][token]
            assert tensors[name][token].numpy().tobytes() == row.numpy().tobytes(), (name, character)
    weights = read_tensors(checkpoint(6))[0]["model.token_embedding_table.weight"]
    new = vocabulary.index("日")
    assert not weights[new].equal(tensors["token_embedding_table.weight"][new])  # they are trained


def test_a_run_with_new_characters_resumes_to_the_same_bytes(tune, train):
    more = ["--new-characters", "add"]
    assert tune("more.txt", *more, "--runs-dir", "whole").code == 0
    assert tune("more.txt", *more, "--max-iters", 3).code == 0
    MODEL.unlink()
    shutil.rmtree(".tokens")
    result = train("--resume", "latest", "--max-iters", 6)
    assert result.code == 0, result.err
    whole, resumed = read_tensors(checkpoint(6, "whole")), read_tensors(checkpoint(6))
    assert resumed[1]["vocabulary"] == sorted(set(TEXT))
    for name, tensor in whole[0].items():
        assert tensor.numpy().tobytes() == resumed[0][name].numpy().tobytes(), name
    result = train("--resume", "latest", "--new-characters", "refuse")
    assert "the run cannot be resumed with other values: new_characters: 'add' -> 'refuse'" in result.err


def test_a_run_on_fewer_characters_resumes_to_the_same_bytes(tune, train):
    assert tune("fewer.txt", "--runs-dir", "whole").code == 0
    assert tune("fewer.txt", "--max-iters", 3).code == 0
    assert train("--resume", "latest", "--max-iters", 6).code == 0
    whole, resumed = read_tensors(checkpoint(6, "whole"))[0], read_tensors(checkpoint(6))[0]
    assert all(tensor.equal(resumed[name]) for name, tensor in whole.items())


def test_what_a_run_leaves_agrees_on_its_vocabulary(tune, sample, capsys):
    import compare

    assert tune("more.txt", "--new-characters", "add", "--max-iters", 1).code == 0
    (run,) = list_runs("runs")
    record = json.loads((run / "meta/full_config.json").read_text())
    assert record["parameters"]["new_characters"] == "add"
    assert record["corpus"]["vocab_size"] == len(set(TEXT))
    n_parameters = ModelConfig(**SIZES, vocab_size=len(set(TEXT))).n_parameters
    assert json.loads((run / "eval/final.json").read_text())["n_parameters"] == n_parameters
    (row,) = json.loads(runner(compare.main, capsys)("--json").out)
    assert row["n_parameters"] == n_parameters
    assert (run / "eval/report.html").is_file()
    drawn = sample("--prompt", "日é", "--max-new-tokens", 2)
    assert drawn.code == 0 and drawn.out.startswith("日é") and len(drawn.out) == 5


@pytest.mark.parametrize(("n", "code"), [(len(VOCABULARY), 0), (len(set(FEWER)), 2)])
def test_vocab_size_is_that_of_the_model(tune, n, code, monkeypatch):
    monkeypatch.setattr(page_module, "write_report", lambda *_: None)
    result = tune("fewer.txt", "--vocab-size", n)
    assert result.code == code
    if code:
        assert result.err.splitlines() == [
            f"error: vocab_size = {n}, but the vocabulary has {len(VOCABULARY)} characters",
            "hint: leave vocab_size out: it is read from the text, or from the model of --init-from",
        ]
        assert not Path("runs").exists()


def test_weights_without_a_vocabulary_have_that_of_the_text(tune, base):
    save_file(load_file(MODEL), MODEL)
    result = tune("same.txt", "--new-characters", "add")
    taken = f"{MODEL}: it does not hold its vocabulary, and is taken to have the characters of the text"
    assert (result.code, result.out.splitlines()[0]) == (0, taken)
    tensors, vocabulary = start_of_run()
    assert vocabulary == VOCABULARY
    assert all(tensor.equal(tensors[name]) for name, tensor in base.state_dict().items())
