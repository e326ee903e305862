"""The parts of a training step: learning rate, optimizer, gradients, evaluation, seeds, compilation."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUIET_TRACKERS, TINY, at, compile_with
from hypothesis import given
from hypothesis import strategies as st

from data import get_batch
from model import BigramLanguageModel
from parameters import ModelConfig, TrainConfig
from utils_alg1.base.errors import CANNOT_TRAIN, Alg1Error
from utils_alg1.report import results as results_module
from utils_alg1.run_directory import checkpoint_paths
from utils_alg1.training import optimizers as optimizers_module
from utils_alg1.training.arithmetic import Arithmetic
from utils_alg1.training.backward import Backward
from utils_alg1.training.checkpoint import newest_checkpoint
from utils_alg1.training.flat import FlatParameters
from utils_alg1.training.optimizers import create_optimizer, orthogonalize, sgd
from utils_alg1.training.progress import Evaluation, Progress
from utils_alg1.training.runtime import Compiled, Runtime
from utils_alg1.training.schedule import learning_rate
from utils_alg1.training.seeds import generator, seed_initial_weights
from utils_alg1.training.trainer import Trainer

SCHEDULES = ("constant", "cosine", "linear", "step", "wsd")
BLOCK_SIZE, VOCAB_SIZE = 8, 11
DATA = np.random.default_rng(0).integers(0, VOCAB_SIZE, 400).astype(np.uint8)
CPU = Runtime()

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def no_picture_and_short_samples(monkeypatch):
    monkeypatch.setattr("utils_alg1.report.pictures.draw_loss_curve", lambda *_: None)
    monkeypatch.setattr("utils_alg1.report.pictures.draw_attention", lambda *_: b"")
    monkeypatch.setattr(results_module, "SAMPLE_LENGTH", 4)


def make_trainer(dropout: float = 0.0, runtime: Runtime | None = None, **settings) -> Trainer:
    config = TrainConfig(**{"batch_size": 2, "eval_iters": 5, **settings})
    seed_initial_weights(config.seed)
    sizes = ModelConfig(
        n_embd=16, n_head=2, n_layer=1, block_size=BLOCK_SIZE, dropout=dropout, vocab_size=VOCAB_SIZE
    )
    model = BigramLanguageModel(sizes)
    return Trainer(model, (DATA[:300], DATA[300:]), config, runtime or CPU, pytest.fail)


def gradients(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in list(trainer.model.parameters())])


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in list(trainer.model.parameters())])


def last_state(runs_dir: Path | str) -> dict[str, torch.Tensor]:
    """Weights and optimizer state at the end of the only run in a folder."""
    (run,) = (path for path in Path(runs_dir).iterdir() if path.is_dir())
    return newest_checkpoint(run, pytest.fail).tensors


def assert_same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def losses_of(runs_dir: str) -> list[float]:
    """Of every training step of the only run in a folder."""
    (path,) = Path(runs_dir).glob("*/logs/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["loss/train_step"] for row in rows if "loss/train_step" in row]


# --- learning rate ------------------------------------------------------------------------------------

QUARTER_COSINE = 0.5 * (1 + math.cos(math.pi / 4))


@pytest.mark.parametrize(
    "schedule, step, expected",
    [
        *((schedule, 0, 0.1) for schedule in SCHEDULES),
        *((schedule, 4, 0.5) for schedule in SCHEDULES),
        *((schedule, 9, 1.0) for schedule in SCHEDULES),
        *((schedule, 10, 1.0) for schedule in SCHEDULES),
        ("constant", 60, 1.0),
        ("constant", 109, 1.0),
        ("constant", 110, 1.0),
        ("cosine", 35, 0.02 + 0.98 * QUARTER_COSINE),
        ("cosine", 60, 0.51),
        ("cosine", 109, 0.02 + 0.98 * 0.5 * (1 + math.cos(0.99 * math.pi))),
        ("cosine", 110, 0.02),
        ("cosine", 500, 0.02),
        ("linear", 35, 0.755),
        ("linear", 60, 0.51),
        ("linear", 109, 0.0298),
        ("linear", 110, 0.02),
        ("step", 43, 1.0),
        ("step", 44, 0.1),
        ("step", 76, 0.1),
        ("step", 77, 0.02),
        ("step", 110, 0.02),
        ("wsd", 88, 1.0),
        ("wsd", 99, 0.51),
        ("wsd", 109, 0.02 + 0.98 / 22),
        ("wsd", 110, 0.02),
    ],
)
def test_learning_rate_at_the_boundaries(schedule, step, expected):
    config = TrainConfig(learning_rate=1.0, min_lr=0.02, warmup_iters=10, max_iters=110, lr_schedule=schedule)
    assert learning_rate(config, step) == pytest.approx(expected, abs=1e-12)


def test_a_long_warm_up_leaves_wsd_a_shorter_decay_and_no_jump():
    config = TrainConfig(
        learning_rate=1.0, min_lr=0.5, warmup_iters=9, max_iters=10, eval_interval=1, lr_schedule="wsd"
    )
    rates = [learning_rate(config, step) for step in (7, 8, 9, 10)]
    assert rates == pytest.approx([8 / 9, 1.0, 1.0, 0.5])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warmup_the_first_step_has_the_peak(schedule):
    config = TrainConfig(learning_rate=0.3, max_iters=10, lr_schedule=schedule)
    assert learning_rate(config, 0) == 0.3


@pytest.mark.parametrize("step, expected", [(0, 1.0), (2, 1.0), (3, 0.1), (5, 0.1), (6, 0.01), (8, 0.01)])
def test_the_step_schedule_falls_exactly_at_each_third(step, expected):
    config = TrainConfig(learning_rate=1.0, max_iters=9, lr_schedule="step")
    assert learning_rate(config, step) == pytest.approx(expected)


@given(
    schedule=st.sampled_from(SCHEDULES),
    peak=st.floats(1e-6, 10),
    floor_share=st.floats(0, 1),
    max_iters=st.integers(1, 60),
    warmup_share=st.floats(0, 1),
)
def test_learning_rate_rises_to_the_peak_and_falls_to_the_floor(
    schedule, peak, floor_share, max_iters, warmup_share
):
    warmup = int(warmup_share * max_iters)
    config = TrainConfig(
        learning_rate=peak,
        min_lr=peak * floor_share,
        max_iters=max_iters,
        warmup_iters=warmup,
        lr_schedule=schedule,
    )
    rates = [learning_rate(config, step) for step in range(max_iters)]
    nearly = 1 + 1e-9
    assert all(0 < rate <= peak * nearly for rate in rates)
    assert all(rate * nearly >= config.min_lr for rate in rates[warmup:])
    assert all(a < b for a, b in itertools.pairwise(rates[:warmup]))
    assert all(a * nearly >= b for a, b in itertools.pairwise(rates[warmup:]))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_update_uses_the_learning_rate_of_its_step(optimizer):
    trainer = make_trainer(optimizer=optimizer, learning_rate=0.1, lr_schedule="linear", max_iters=10)
    for step in (0, 5, 9):
        at(trainer, step).forward_backward()
        trainer.optimizer_step()
        assert {g["lr"] for g in trainer.optimizer.param_groups} == {learning_rate(trainer.config, step)}


# --- optimizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_shrinks_matrices_and_nothing_else(name):
    trainer = make_trainer()
    config = TrainConfig(optimizer=name, learning_rate=0.1, weight_decay=0.5)
    optimizer = create_optimizer(trainer.model, config, Arithmetic())
    for parameter in list(trainer.model.parameters()):
        parameter.data += 1.0
        parameter.grad.zero_()
    before = [parameter.detach().clone() for parameter in list(trainer.model.parameters())]
    optimizer.step()
    for old, new in zip(before, list(trainer.model.parameters()), strict=True):
        torch.testing.assert_close(new.detach(), old * 0.95 if old.dim() >= 2 else old)


def test_the_optimizer_gets_every_parameter_once_and_its_settings():
    trainer = make_trainer(beta1=0.8, beta2=0.7)
    groups = trainer.optimizer.param_groups
    given = [name for group in groups for name in group["flat"].names]
    assert sorted(given) == sorted(name for name, _ in trainer.model.named_parameters())
    assert {group["betas"] for group in groups} == {(0.8, 0.7)}
    groups = make_trainer(optimizer="sgd", beta1=0.6).optimizer.param_groups
    assert {(group["update"], group["momentum"]) for group in groups} == {(sgd, 0.6)}


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("name", ["adamw", "sgd", "sgd without momentum"])
def test_the_updates_are_those_of_torch_optim_to_the_byte(name, joined):
    """torch.optim gets the joined tensors of both groups, or, as in earlier versions, each parameter."""
    beta1 = 0.0 if "without" in name else 0.9
    runtime = Runtime(arithmetic=Arithmetic(joined=joined))
    settings = {"optimizer": name.split()[0], "learning_rate": 0.01, "weight_decay": 0.1, "beta1": beta1}
    ours = make_trainer(runtime=runtime, **settings)
    form = "joined" if joined else "each"
    pairs = [
        [(mine, mine.detach().clone()) for mine in flat.views(flat.tensor, form)]
        for flat in ours.optimizer.flats
    ]
    groups = [
        {"params": [other for _, other in pair], "weight_decay": decay}
        for pair, decay in zip(pairs, (0.1, 0.0), strict=True)
    ]
    if name == "adamw":
        reference = torch.optim.AdamW(groups, lr=0.01, betas=(beta1, ours.config.beta2), fused=True)
    else:
        reference = torch.optim.SGD(groups, lr=0.01, momentum=beta1)
    for step in range(4):
        at(ours, step).forward_backward()
        for flat, group in zip(ours.optimizer.flats, groups, strict=True):
            for other, gradient in zip(group["params"], flat.views(flat.gradient, form), strict=True):
                other.grad = gradient.clone()
        ours.optimizer_step()
        reference.step()
    for flat, pair in zip(ours.optimizer.flats, pairs, strict=True):
        kept = {key: flat.views(t, form) for key, t in ours.optimizer.state[flat.tensor].items() if t.dim()}
        for i, (mine, other) in enumerate(pair):
            assert torch.equal(mine, other)
            state = {k: v for k, v in reference.state[other].items() if v is not None and k != "step"}
            assert_same_bytes({key: views[i] for key, views in kept.items()}, state)
    steps = [state["step"].item() for state in ours.optimizer.state.values() if "step" in state]
    assert steps == ([4.0, 4.0] if name == "adamw" else [])


def test_joined_parameters_are_views_of_one_tensor_aligned_as_pytorch_aligns():
    named = {name: torch.nn.Parameter(torch.randn(3, 5)) for name in "ab"}
    before = {name: p.detach().clone() for name, p in named.items()}
    flat = FlatParameters(named)
    for name, p in named.items():
        assert torch.equal(p, before[name]) and p.is_contiguous()
        assert p.data_ptr() % 64 == 0 and p.grad.data_ptr() % 64 == 0
    assert flat.tensor.shape == (32,) and not flat.tensor[[15, 31]].any()  # zeros between them
    flat.tensor.add_(1.0)
    flat.gradient.fill_(2.0)
    assert torch.equal(named["b"], before["b"] + 1) and (named["b"].grad == 2).all()
    (stack,) = flat.views(flat.tensor, "stacked")
    assert torch.equal(stack, torch.stack([named["a"], named["b"]]))
    assert torch.equal(flat.join(flat.split(flat.gradient))[:15], flat.gradient[:15])
    count = torch.tensor(7.0)
    assert flat.split(count) == {"a": count, "b": count}


# --- gradients ----------------------------------------------------------------------------------------


def test_accumulated_micro_batches_equal_one_batch_of_the_same_data():
    trainer = make_trainer(grad_accum_steps=4, optimizer="sgd", learning_rate=0.5)
    twin = make_trainer(optimizer="sgd", learning_rate=0.5)
    draws = [generator(1337, "batch", 3, i) for i in range(4)]
    batches = [get_batch("train", *twin.data, BLOCK_SIZE, 2, "cpu", draw) for draw in draws]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss = twin.model(x, y)[1]
    loss.backward()

    assert at(trainer, 3).forward_backward() == pytest.approx(loss.item(), abs=1e-6)
    torch.testing.assert_close(gradients(trainer), gradients(twin), atol=1e-6, rtol=0)
    trainer.optimizer_step()
    at(twin, 3).optimizer_step()
    torch.testing.assert_close(weights(trainer), weights(twin), atol=1e-6, rtol=0)
    assert trainer.tokens_per_step == 4 * 2 * BLOCK_SIZE


def test_gradients_of_one_step_do_not_leak_into_the_next():
    trainer, fresh = make_trainer(), make_trainer()
    at(trainer, 0).forward_backward()
    at(trainer, 1).forward_backward()
    at(fresh, 1).forward_backward()
    assert torch.equal(gradients(trainer), gradients(fresh))


def test_clipping_bounds_the_norm_and_keeps_the_direction():
    free, clipped, loose = make_trainer(), make_trainer(grad_clip=0.01), make_trainer(grad_clip=1e6)
    losses = {at(trainer, 0).forward_backward() for trainer in (free, clipped, loose)}
    assert len(losses) == 1
    norm = gradients(free).norm().item()
    assert norm > 0.1
    assert gradients(clipped).norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(gradients(clipped) / 0.01, gradients(free) / norm, atol=1e-3, rtol=1e-3)
    assert torch.equal(gradients(loose), gradients(free))


def test_a_loss_scaler_scales_checks_and_takes_our_step():
    """On a GPU it serves float16; here on the CPU, with a scale that rounds nothing."""
    scaled, plain = make_trainer(), make_trainer()
    scaled.backward = Backward(scaled.model, scaled.optimizer.flats, CPU)
    plain.backward = Backward(plain.model, plain.optimizer.flats, CPU)
    scaled.scaler = scaled.backward.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(3):
        assert at(scaled, step).forward_backward() == at(plain, step).forward_backward()
        for trainer in (scaled, plain):
            trainer.optimizer_step()
    assert_same_bytes(scaled.model.state_dict(), plain.model.state_dict())

    before = weights(scaled).clone()
    at(scaled, 3).forward_backward()
    next(scaled.model.parameters()).grad.fill_(math.inf)
    scaled.scaler._per_optimizer_states.clear()  # it has looked for overflows already
    scaled.scaler.unscale_(scaled.optimizer)
    scaled.optimizer_step()
    assert torch.equal(weights(scaled), before)
    assert scaled.scaler.get_scale() == 2.0**7


def break_loss(trainer: Trainer) -> None:
    model = trainer.model
    trainer.backward = Backward(lambda x, y: (None, model(x, y)[1] * math.nan), trainer.optimizer.flats, CPU)


def break_gradient(trainer: Trainer) -> None:
    average = trainer.backward.average_gradients

    def broken():
        average()
        trainer.model.lm_head.bias.grad *= math.inf

    trainer.backward.average_gradients = broken


@pytest.mark.parametrize("sabotage, what", [(break_loss, "loss"), (break_gradient, "gradient")])
def test_what_is_not_finite_stops_before_the_update(sabotage, what):
    trainer = make_trainer()
    before = weights(trainer).clone()
    sabotage(trainer)
    with pytest.raises(Alg1Error, match=f"the {what} is not finite at step 7") as caught:
        at(trainer, 7).forward_backward()
    assert caught.value.exit_code == CANNOT_TRAIN
    assert "--learning-rate" in caught.value.hint and "--grad-clip" in caught.value.hint
    assert torch.equal(weights(trainer), before)
    assert not any(t.any() for state in trainer.optimizer.state.values() for t in state.values())


@pytest.mark.parametrize("sabotage, what", [(break_loss, "loss"), (break_gradient, "gradient")])
def test_a_run_that_diverges_ends_with_3_and_a_good_checkpoint(sabotage, what, train, text_file, monkeypatch):
    forward_backward = Trainer.forward_backward

    def diverging(self):
        if self.step == 3:
            sabotage(self)
        return forward_backward(self)

    monkeypatch.setattr(Trainer, "forward_backward", diverging)
    result = train("--data", text_file, *TINY, *QUIET_TRACKERS)
    assert result.code == 3
    assert f"error: the {what} is not finite at step 3; the weights were not updated\n" in result.err
    (run,) = (path for path in Path("runs").iterdir() if path.is_dir())
    newest = newest_checkpoint(run, pytest.fail)
    assert newest.progress.step == 2
    assert all(tensor.isfinite().all() for tensor in newest.tensors.values())
    finish = f"python train.py --resume {run} --finish"
    assert f"its newest weights, for --init-from: {newest.path}; to export its best: {finish}\n" in result.err
    rows = [json.loads(line) for line in (run / "logs/metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 2
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert train(*finish.split()[2:]).code == 0  # which takes no step
    assert json.loads((run / "eval/final.json").read_text())["steps"] == 2


def test_an_evaluation_that_is_not_finite_ends_with_3():
    trainer = make_trainer()
    trainer.model.lm_head.bias.data[0] = math.nan
    with pytest.raises(Alg1Error, match="the evaluation loss is not finite after step 4") as caught:
        at(trainer, 4).evaluate()
    assert caught.value.exit_code == CANNOT_TRAIN


# --- evaluation ---------------------------------------------------------------------------------------


def test_an_evaluation_draws_nothing_and_is_the_same_every_time():
    trainer = make_trainer(learning_rate=0.1, lr_schedule="linear", max_iters=10)
    first = at(trainer, 4).evaluate()
    assert (first.step, first.learning_rate, first.sequences) == (4, pytest.approx(0.06), 12)
    state = torch.get_rng_state()
    trainer.forward_backward()
    trainer.progress = Progress(step=4)
    again = trainer.evaluate()
    assert again == first and again is not first
    assert torch.equal(torch.get_rng_state(), state)


def test_an_evaluation_is_without_dropout_and_leaves_the_model_training():
    assert at(make_trainer(dropout=0.5), 0).evaluate() == at(make_trainer(), 0).evaluate()
    trainer = make_trainer(dropout=0.5)
    at(trainer, 0).evaluate()
    assert trainer.model.training
    assert not gradients(trainer).any()


@pytest.mark.parametrize(
    "intervals",
    [
        ["--eval-interval", 1, "--eval-iters", 5],
        ["--eval-interval", 100],
        ["--checkpoint-interval", 1, "--keep-checkpoints", 1],
        ["--checkpoint-interval", 0, "--histogram-interval", 1],
    ],
)
def test_what_a_run_reports_changes_nothing_in_its_training(intervals, train, text_file):
    flags = ["--data", text_file, *TINY, *QUIET_TRACKERS, "--dropout", 0.2]
    assert train(*flags, "--runs-dir", "plain").code == 0
    assert train(*flags, "--runs-dir", "other", *intervals).code == 0
    assert_same_bytes(last_state("plain"), last_state("other"))


# --- seeds and arithmetic -----------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(train, text_file):
    flags = ["--data", text_file, *TINY, *QUIET_TRACKERS, "--dropout", 0.3]
    for runs_dir, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(1)
        assert train(*flags, "--runs-dir", runs_dir, "--seed", seed).code == 0
    a, b, c = (last_state(name) for name in "abc")
    assert_same_bytes(a, b)
    assert not torch.equal(a["model.lm_head.weight"], c["model.lm_head.weight"])


def test_the_seed_decides_weights_batches_and_dropout_each():
    def loss(dropout: float, weights_seed: int, seed: int) -> float:
        trainer = make_trainer(dropout, seed=seed)
        seed_initial_weights(weights_seed)
        twin = BigramLanguageModel(trainer.model.config)
        trainer.model.load_state_dict(twin.state_dict())
        return at(trainer, 0).forward_backward()

    assert loss(0.0, 1, 1) == loss(0.0, 1, 1)
    assert loss(0.0, 1, 1) != loss(0.0, 2, 1)
    assert loss(0.0, 1, 1) != loss(0.0, 1, 2)
    assert loss(0.5, 1, 1) == loss(0.5, 1, 1)
    assert loss(0.5, 1, 1) != loss(0.0, 1, 1)


def test_every_micro_batch_has_its_own_dropout(monkeypatch):
    trainer = make_trainer(dropout=0.5, grad_accum_steps=3)
    x, y = trainer._batch(0)
    monkeypatch.setattr(Trainer, "_batch", lambda *_: (x, y))
    losses = []
    model = trainer.model

    def forward(x, y):
        losses.append(model(x, y)[1].item())
        return model(x, y)

    trainer.backward = Backward(forward, trainer.optimizer.flats, CPU)
    at(trainer, 0).forward_backward()
    at(trainer, 1).forward_backward()
    assert len(set(losses)) == 6


def test_bfloat16_trains_on_a_cpu_with_weights_in_float32(train, text_file):
    flags = ["--data", text_file, *TINY, *QUIET_TRACKERS, "--max-iters", 40, "--learning-rate", 0.01]
    for dtype in ("float32", "bfloat16"):
        assert train(*flags, "--runs-dir", dtype, "--dtype", dtype).code == 0
    losses = losses_of("bfloat16")
    assert losses[-1] < losses[0] - 0.5
    plain, half = last_state("float32"), last_state("bfloat16")
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}
    assert not torch.equal(plain["model.lm_head.weight"], half["model.lm_head.weight"])


# --- progress -----------------------------------------------------------------------------------------


def test_progress_keeps_the_best_and_counts_what_is_not_better():
    progress = Progress()
    trail = []
    for step, loss in enumerate([3.0, 2.0, 2.0, 2.5, 1.0]):
        progress.add(Evaluation(step, loss, loss, 0.1))
        trail.append((progress.best_step, progress.best_val, progress.evaluations_since_best))
    assert trail == [(0, 3.0, 0), (1, 2.0, 0), (1, 2.0, 1), (1, 2.0, 2), (4, 1.0, 0)]


@pytest.mark.parametrize(
    "since_best, patience, out", [(9, 0, False), (1, 2, False), (2, 2, True), (3, 2, True)]
)
def test_patience_is_lost_after_that_many_evaluations(since_best, patience, out):
    assert Progress(evaluations_since_best=since_best).out_of_patience(patience) is out


# --- Muon ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_an_orthogonalised_matrix_is_as_strong_in_every_direction(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.6 and values.max() < 1.3
    # The directions stay: every matrix times its own transpose is symmetric and positive.
    product = orthogonalize(matrices) @ matrices.mT
    assert torch.allclose(product, product.mT, atol=1e-3)
    assert torch.linalg.eigvalsh(product).min() > -1e-3


def test_bfloat16_is_precise_enough_to_orthogonalise():
    matrices = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(1))
    exact, rounded = orthogonalize(matrices), orthogonalize(matrices, torch.bfloat16)
    assert rounded.dtype is torch.float32
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()


def test_muon_computes_its_products_as_the_arithmetic_says(monkeypatch):
    seen = []

    def spy(matrices, dtype):
        seen.append(dtype)
        return matrices

    monkeypatch.setattr(optimizers_module, "orthogonalize", spy)
    for muon in ("float32", "bfloat16"):
        trainer = make_trainer(optimizer="muon", runtime=Runtime(arithmetic=Arithmetic(muon=muon)))
        at(trainer, 0).forward_backward()
        trainer.optimizer_step()
    # One call for each shape: fused query, key and value, projection, and the two of the feed-forward.
    assert seen == [torch.float32] * 4 + [torch.bfloat16] * 4


def test_muon_steps_hidden_matrices_by_their_orthogonalised_momentum():
    trainer = make_trainer(optimizer="muon", learning_rate=0.01, beta1=0.8, weight_decay=0.1)
    weight = dict(trainer.model.named_parameters())["blocks.0.sa.qkv.weight"]  # (3 C, C)
    before, C = weight.detach().clone(), weight.shape[1]
    momentum = torch.zeros_like(weight)
    expected = before
    for step in range(2):
        at(trainer, step).forward_backward()
        momentum = 0.8 * momentum + 0.2 * weight.grad
        nesterov = 0.2 * weight.grad + 0.8 * momentum
        rows = orthogonalize(nesterov.view(3, C, C)).reshape(3 * C, C)  # query, key and value by themselves
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.2 * C**0.5 * rows
        trainer.optimizer_step()
    assert torch.allclose(weight, expected, atol=1e-6)
    assert (weight - before).abs().max() > 1e-3


def test_muon_leaves_all_that_is_no_hidden_matrix_to_adamw():
    """With the hidden matrices' gradients taken away, both optimizers do the same."""
    states = []
    for optimizer in ("muon", "adamw"):
        trainer = make_trainer(optimizer=optimizer, learning_rate=0.01, weight_decay=0.0)
        for step in range(3):
            at(trainer, step).forward_backward()
            for name, parameter in trainer.model.named_parameters():
                if name.startswith("blocks.") and parameter.dim() == 2:
                    parameter.grad.zero_()
            trainer.optimizer_step()
        states.append(trainer.model.state_dict())
    assert_same_bytes(*states)


# --- compilation --------------------------------------------------------------------------------------


def assert_compiling_changes_little(train, text_file) -> None:
    flags = ["--data", text_file, *TINY, *QUIET_TRACKERS]
    for mode in ("off", "on"):
        result = train(*flags, "--compile", mode, "--runs-dir", mode)
        assert result.code == 0, result.err
        assert "torch.compile does not work here" not in result.err
    assert losses_of("on") == pytest.approx(losses_of("off"), abs=1e-4)


def test_a_captured_graph_trains_like_the_plain_model(train, text_file, monkeypatch):
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    compile_with(monkeypatch, backend)
    assert_compiling_changes_little(train, text_file)
    assert calls


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_a_compiled_run_on_a_cpu_has_the_losses_of_a_plain_one(train, text_file, campaign):
    if not campaign.whole:
        pytest.skip("takes a minute: pytest --campaign")
    assert_compiling_changes_little(train, text_file)


def raise_at_once(function, **_):
    raise RuntimeError("no compiler\nfor this machine")


def raise_when_called(function, **_):
    return lambda *_: raise_at_once(function)


@pytest.mark.parametrize("compiler", [raise_at_once, raise_when_called])
def test_a_compiler_that_fails_costs_one_line(compiler, train, text_file, monkeypatch):
    monkeypatch.setattr(torch, "compile", compiler)
    flags = ["--data", text_file, *TINY, *QUIET_TRACKERS]
    result = train(*flags, "--compile", "on", "--runs-dir", "on")
    assert result.code == 0
    assert result.err.splitlines() == [
        "warning: torch.compile does not work here (no compiler); going on without it, with other rounding"
    ]
    (run,) = Path("on").glob("2*")
    assert newest_checkpoint(run, pytest.fail).metadata["arithmetic"]["compiled"] is False
    assert train(*flags, "--compile", "off", "--runs-dir", "off").code == 0
    assert_same_bytes(last_state("on"), last_state("off"))


def test_a_compiled_function_is_called(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda x: ("compiled", x))
    said: list[str] = []
    call = Compiled(lambda x: ("plain", x), said.append)
    assert [call(1), call(2)] == [("compiled", 1), ("compiled", 2)]
    assert said == ["compiling the training step, which can take a minute"] and not call.failed


# --- CUDA ---------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_cuda_trains_in_every_dtype(dtype, train, text_file):
    flags = ["--data", text_file, *TINY, *QUIET_TRACKERS, "--device", "cuda", "--compile", "off"]
    result = train(*flags, "--max-iters", 40, "--learning-rate", 0.01, "--dtype", dtype)
    assert result.code == 0, result.err
    losses = losses_of("runs")
    assert losses[-1] < losses[0] - 0.5
    (run,) = (path for path in Path("runs").iterdir() if path.is_dir())
    assert bool(newest_checkpoint(run, pytest.fail).metadata["scaler"]) is (dtype == "float16")


@needs_cuda
def test_cuda_compiled_has_the_losses_of_plain(train, text_file):
    flags = ["--data", text_file, *TINY, *QUIET_TRACKERS, "--device", "cuda", "--dtype", "float32"]
    for mode in ("off", "on"):
        assert train(*flags, "--compile", mode, "--runs-dir", mode).code == 0
    assert losses_of("on") == pytest.approx(losses_of("off"), abs=1e-3)


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_cuda_resumes_to_the_same_bytes(dtype, train, text_file):
    flags = ["--data", text_file, *TINY, *QUIET_TRACKERS, "--device", "cuda", "--dtype", dtype]
    flags += ["--compile", "off", "--checkpoint-interval", 1, "--keep-checkpoints", 9, "--dropout", 0.2]
    assert train(*flags).code == 0
    before = last_state("runs")
    (run,) = (path for path in Path("runs").iterdir() if path.is_dir())
    early = checkpoint_paths(run / "artifacts/checkpoints")[3]
    assert train("--resume", early).code == 0
    assert_same_bytes(before, last_state("runs"))
