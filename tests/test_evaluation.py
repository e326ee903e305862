"""What an evaluation reads: the same characters for every batch size, seed and number of processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import QUIET_TRACKERS, TINY
from hypothesis import given
from hypothesis import strategies as st

from model import BigramLanguageModel
from parameters import ModelConfig, TrainConfig
from utils_alg1.base.errors import CANNOT_TRAIN, Alg1Error
from utils_alg1.data.corpus import open_corpus
from utils_alg1.report import page as page_module
from utils_alg1.report import results as results_module
from utils_alg1.report.summary import describe_part
from utils_alg1.run_directory import list_runs
from utils_alg1.training import evaluation as evaluation_module
from utils_alg1.training.arithmetic import Arithmetic
from utils_alg1.training.distributed import Distributed
from utils_alg1.training.evaluation import (
    PASS_CHARACTERS,
    PASS_LOGITS,
    Measurement,
    mean_loss,
    measure,
    sequence_starts,
)
from utils_alg1.training.runtime import Runtime
from utils_alg1.training.trainer import Trainer

T, V = 8, 11
TOKENS = np.random.default_rng(0).integers(0, V, 400).astype(np.uint8)


@pytest.fixture(autouse=True)
def short_end(monkeypatch):
    monkeypatch.setattr(page_module, "write_report", lambda *_: None)
    monkeypatch.setattr(results_module, "SAMPLE_LENGTH", 4)


def make_model(vocab_size: int = V) -> BigramLanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(n_embd=16, n_head=2, n_layer=1, block_size=T, vocab_size=vocab_size)
    model = BigramLanguageModel(config)
    for parameter in model.parameters():  # at their initial size all losses would be about log(V)
        parameter.data *= 20
    return model


def make_trainer(**settings) -> Trainer:
    return Trainer(
        make_model(), (TOKENS[:300], TOKENS[300:]), TrainConfig(**settings), Runtime(), pytest.fail
    )


def loss_of(model: BigramLanguageModel, tokens: np.ndarray, start: int) -> float:
    """Of one sequence."""
    text = torch.from_numpy(tokens[start : start + T + 1].astype(np.int64))
    return model(text[None, :-1], text[None, 1:])[1].item()


def final_of(run: Path) -> dict:
    return json.loads((run / "eval/final.json").read_text())


# --- what is read -------------------------------------------------------------------------------------


@given(n_tokens=st.integers(2, 5000), block_size=st.integers(1, 64), most=st.integers(1, 300))
def test_the_sequences_lie_side_by_side_or_evenly_spread(n_tokens, block_size, most):
    if n_tokens <= block_size:
        return
    starts = sequence_starts(n_tokens, block_size, most)
    n_all = (n_tokens - 1) // block_size
    assert len(starts) == min(n_all, most)
    assert starts[0] == 0 and starts[-1] + block_size + 1 <= n_tokens
    assert not (starts % block_size).any()
    gaps = np.diff(starts) // block_size
    assert all(n_all // len(starts) <= gap <= -(-n_all // len(starts)) for gap in gaps)
    assert n_all - starts[-1] // block_size <= -(-n_all // len(starts))  # also behind the last one


def test_an_evaluation_is_the_mean_over_four_sequences_for_each_iteration():
    trainer = make_trainer(eval_iters=2)
    evaluation = trainer.evaluate()
    for tokens, found in zip(trainer.data, (evaluation.train_loss, evaluation.val_loss), strict=True):
        n_all = (len(tokens) - 1) // T
        losses = [loss_of(trainer.model, tokens, i * n_all // 8 * T) for i in range(8)]
        assert found == pytest.approx(sum(losses) / 8, rel=1e-6)
    assert evaluation.sequences == 8 and evaluation.train_loss != evaluation.val_loss


def test_equal_weights_have_one_loss_whatever_the_batch_size_and_the_seed():
    settings = [{"batch_size": B, "seed": seed} for B in (1, 4, 16, 64) for seed in (1, 2, 3)]
    found = [make_trainer(eval_iters=2, **chosen).evaluate() for chosen in settings]
    assert all(evaluation == found[0] for evaluation in found)


def test_what_is_looked_at_is_the_beginning_of_what_an_evaluation_reads():
    trainer = make_trainer(eval_iters=2)
    expected = [TOKENS[300 + start : 300 + start + T].tolist() for start in (0, 8, 24, 32)]
    assert trainer.validation_batch().tolist() == expected


# --- passes and processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size, per_pass", [(V, PASS_CHARACTERS // T), (40_000, 3), (3_000_000, 1)])
def test_a_pass_is_bounded_by_its_characters_and_its_logits(vocab_size, per_pass, monkeypatch):
    tokens, seen = np.zeros(PASS_CHARACTERS + 9 * T + 1, np.uint32), []
    model = SimpleNamespace(config=SimpleNamespace(block_size=T, vocab_size=vocab_size))
    monkeypatch.setattr(evaluation_module, "eval_mode", lambda _: torch.no_grad())

    class Model(SimpleNamespace):
        def __call__(self, x, y):
            seen.append(len(x))
            return None, torch.tensor(2.0)

    starts = sequence_starts(len(tokens), T, 1 << 20)
    assert mean_loss(Model(**vars(model)), tokens, starts, Runtime()) == 2.0
    assert sum(seen) == len(starts) and set(seen[:-1]) == {per_pass}
    assert per_pass == 1 or per_pass * T * vocab_size <= PASS_LOGITS


@pytest.mark.parametrize("characters", [1, 3 * T, 1 << 20])
def test_the_loss_does_not_depend_on_the_passes(characters, monkeypatch):
    model, starts = make_model(), sequence_starts(len(TOKENS), T, 20)
    expected = mean_loss(model, TOKENS, starts, Runtime())
    monkeypatch.setattr(evaluation_module, "PASS_CHARACTERS", characters)
    assert mean_loss(model, TOKENS, starts, Runtime()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [2, 3, 64])
def test_processes_share_the_sequences(n, monkeypatch):
    model, starts = make_model(), sequence_starts(len(TOKENS), T, 20)
    monkeypatch.setattr(Distributed, "all_reduce_sum", lambda self, values: values)
    parts = [mean_loss(model, TOKENS, starts, Runtime(dist=Distributed(rank, rank, n))) for rank in range(n)]
    assert sum(parts) == pytest.approx(mean_loss(model, TOKENS, starts, Runtime()), rel=1e-6)


# --- the export ---------------------------------------------------------------------------------------


def test_the_export_is_measured_on_all_sequences():
    model = make_model()
    measured = measure(model, TOKENS, Runtime())
    losses = [loss_of(model, TOKENS, start) for start in range(0, 392, T)]
    last = loss_of(model, TOKENS, 392)  # of 7 characters
    assert (measured.characters, measured.available) == (399, 399)
    assert measured.loss == pytest.approx((8 * sum(losses) + 7 * last) / 399, rel=1e-6)
    assert describe_part(measured) == "all of the val part: 399 characters"


@pytest.mark.parametrize("n_tokens", [T + 1, 2 * T, 2 * T + 1, 2 * T + 2])
def test_an_export_is_measured_to_the_last_character(n_tokens):
    measured = measure(make_model(), TOKENS[:n_tokens], Runtime())
    assert measured.characters == measured.available == n_tokens - 1


def test_of_a_long_text_a_part_is_measured_and_that_is_said(monkeypatch):
    monkeypatch.setattr(evaluation_module, "MEASURED_CHARACTERS", 100)
    model = make_model()
    measured = measure(model, TOKENS, Runtime())
    losses = [loss_of(model, TOKENS, i * 49 // 12 * T) for i in range(12)]
    assert measured == Measurement(pytest.approx(sum(losses) / 12, rel=1e-6), 96, 399)
    assert describe_part(measured) == "96 of the val part's 399 characters, spread evenly"


def test_the_export_is_measured_in_float32():
    model, seen = make_model(), []
    model.lm_head.register_forward_hook(lambda *arguments: seen.append(arguments[2].dtype))
    runtime = Runtime(arithmetic=Arithmetic(dtype="bfloat16"))
    found = measure(model, TOKENS, runtime)
    assert set(seen) == {torch.float32} and found == measure(model, TOKENS, Runtime())
    mean_loss(model, TOKENS, sequence_starts(len(TOKENS), T, 4), runtime)
    assert seen[-1] is torch.bfloat16  # an evaluation computes as the training steps do


def test_the_results_hold_the_loss_of_the_exported_weights(train, text_file):
    result = train("--data", text_file, *TINY, *QUIET_TRACKERS, "--learning-rate", 0.5)
    (run,) = list_runs("runs")
    final = final_of(run)
    assert final["export"]["step"] == final["best_step"] < final["steps"]  # so the last weights are others
    model = BigramLanguageModel().load_safetensors(run / "artifacts/export/model.safetensors").eval()
    tokens = open_corpus(text_file).split()[1]
    n = len(tokens) - 1
    sums = [loss_of(model, tokens, start) * min(T, n - start) for start in range(0, n, T)]
    assert final["export_val_loss"] == pytest.approx(sum(sums) / n, rel=1e-5)
    assert final["export_perplexity"] == pytest.approx(math.exp(final["export_val_loss"]), rel=1e-12)
    assert final["export_bits_per_character"] == pytest.approx(final["export_val_loss"] / math.log(2))
    assert final["export_val_characters"] == final["val_characters"] == n
    line = f"val loss {final['export_val_loss']:.4f} (perplexity {final['export_perplexity']:.2f}"
    assert f"\nmeasured  {line}, " in result.out
    assert f" of the export, over all of the val part: {n} characters\n" in result.out


def test_an_export_whose_loss_is_not_finite_ends_with_3():
    trainer = make_trainer()
    trainer.model.lm_head.bias.data[0] = math.nan
    with pytest.raises(Alg1Error, match="the loss of the exported weights is not finite") as caught:
        trainer.measure()
    assert caught.value.exit_code == CANNOT_TRAIN


def test_runs_from_one_export_begin_with_one_loss(train, text_file):
    flags = ["--data", text_file, *QUIET_TRACKERS, "--threads", 1, "--max-iters", 1]
    assert train(*flags, *TINY).code == 0
    (first,) = list_runs("runs")
    export = first / "artifacts/export/model.safetensors"
    for batch_size, seed in ((1, 1), (16, 2), (64, 3)):
        values = ["--batch-size", batch_size, "--seed", seed, "--runs-dir", "others"]
        assert train(*flags, "--init-from", export, *values).code == 0
    rows = [json.loads((run / "logs/metrics.jsonl").open().readline()) for run in list_runs("others")]
    assert len(rows) == 3 and all(row == rows[0] for row in rows)
    assert (rows[0]["step"], rows[0]["tokens"]) == (0, 0)


# --- what a user is told ------------------------------------------------------------------------------


UNTRAINED = (
    "no evaluation was better than that of step 0: the exported weights are those from before the first"
)


def test_a_run_that_only_got_worse_says_that_its_export_is_untrained(train, text_file):
    result = train("--data", text_file, *TINY, *QUIET_TRACKERS, "--learning-rate", 30)
    (run,) = list_runs("runs")
    assert result.code == 0 and final_of(run)["export"]["step"] == 0
    assert (
        UNTRAINED in result.err and "try another --learning-rate than 30, or more --max-iters\n" in result.err
    )
    result = train("--resume", "latest", "--export", "last")
    assert result.code == 0 and UNTRAINED not in result.err


def test_a_resume_with_another_size_of_evaluation_says_that_its_losses_do_not_compare(train, text_file):
    flags = ["--data", text_file, *TINY, *QUIET_TRACKERS]
    assert train(*flags).code == 0
    assert train("--resume", "latest", "--max-iters", 8).err == ""
    assert train("--resume", "latest", "--eval-iters", 3).err == ""  # at its end: it evaluates no more
    best = final_of(list_runs("runs")[0])
    result = train("--resume", "latest", "--max-iters", 10, "--eval-iters", 3)
    assert (result.code, result.err) == (
        0,
        "warning: the evaluations from here on read other sequences than those before: their losses do not"
        f" compare with the best so far, val loss {best['best_val_loss']:.4f} at step {best['best_step']}\n",
    )


# --- memory -------------------------------------------------------------------------------------------


def test_the_hint_fits_where_memory_ended(monkeypatch):
    error = torch.OutOfMemoryError("Tried to allocate 20 GiB")
    trainer = make_trainer(batch_size=16)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(trainer, "backward", fail)
    with pytest.raises(Alg1Error, match=r"^out of memory in a training step$") as caught:
        trainer.forward_backward()
    assert caught.value.hint.startswith("try --batch-size 8 --grad-accum-steps 2,")
    monkeypatch.setattr(BigramLanguageModel, "forward", fail)
    for compute in (trainer.evaluate, trainer.measure):
        with pytest.raises(Alg1Error, match=r"^out of memory in an evaluation$") as caught:
            compute()
        assert caught.value.hint.startswith("try --n-embd 8, or a --block-size below 8; or if other programs")
        assert caught.value.exit_code == CANNOT_TRAIN
