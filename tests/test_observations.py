"""What is seen of a model, that it is what the model does, and that looking changes nothing."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, TINY, at, lasting_metrics, with_changes

import train as script
from model import BigramLanguageModel
from parameters import ModelConfig, TensorBoardConfig, TrainConfig, due
from utils_aim.pictures import draw_embedding, in_font, principal_components
from utils_alg1.base.pictures import GAP, LINE_HEIGHT, draw_grid
from utils_alg1.base.settings import field_names
from utils_alg1.base.summaries import HISTOGRAM_BINS, Embedding, Image
from utils_alg1.network.tensor_file import read_tensors
from utils_alg1.run_directory import list_runs
from utils_alg1.tracking import observer as observer_module
from utils_alg1.tracking.observer import (
    SAMPLE_LENGTH,
    Observer,
    activation_histograms,
    attention_picture,
    character_label,
    sample,
    token_embedding,
)
from utils_alg1.training.progress import Clock, Progress
from utils_alg1.training.runtime import Runtime
from utils_alg1.training.trainer import Trainer

VOCABULARY = sorted("\n\t \\abcé日")
LAYERS, HEADS, WIDTH, T = 2, 4, 16, 8
INTERVALS = [name for name in field_names(TensorBoardConfig) if name.endswith("_interval")]


@pytest.fixture
def model() -> BigramLanguageModel:
    torch.manual_seed(1)
    sizes = {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "block_size": T}
    model = BigramLanguageModel(ModelConfig(**sizes, dropout=0.5, vocab_size=len(VOCABULARY)))
    for parameter in model.parameters():  # as after some training: attention that is not uniform
        torch.nn.init.normal_(parameter, std=0.3)
    model.vocabulary = VOCABULARY
    return model


@pytest.fixture
def idx() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(len(VOCABULARY), (3, T), generator=generator)


def inner_values(model, idx) -> dict[str, torch.Tensor]:
    """What each block does to tokens, written out: its attention's input, and what its parts put out."""
    values = {}
    x = model.token_embedding_table(idx) + model.position_embedding_table.weight[: idx.shape[1]]
    for layer, block in enumerate(model.blocks):
        values[f"input {layer}"] = block.ln1(x)
        joined = torch.cat([head(block.ln1(x)) for head in block.sa.heads], dim=-1)
        values[f"blocks.{layer}.sa"] = block.sa.proj(joined)
        x = x + values[f"blocks.{layer}.sa"]
        values[f"blocks.{layer}.ffwd.net.1"] = block.ffwd.net[0](block.ln2(x)).relu()
        x = x + block.ffwd.net[2](values[f"blocks.{layer}.ffwd.net.1"])
        values[f"blocks.{layer}"] = x
    return values


# --- what is seen -------------------------------------------------------------------------------------


def test_activations_are_those_of_every_attention_relu_and_block(model, idx):
    with torch.no_grad():
        expected = inner_values(model, idx)
    histograms = {h.name: h for h in activation_histograms(model, idx)}
    assert histograms.keys() == {name for name in expected if not name.startswith("input")}
    for name, histogram in histograms.items():
        values = expected[name].double().numpy()
        assert histogram.kind == "activation"
        assert histogram.counts.shape == (HISTOGRAM_BINS,)
        assert histogram.counts.sum() == values.size
        np.testing.assert_allclose(histogram.edges[[0, -1]], (values.min(), values.max()), atol=1e-5)
    assert histograms["blocks.0.ffwd.net.1"].edges[0] == 0
    assert histograms["blocks.0.ffwd.net.1"].counts.sum() == idx.numel() * 4 * WIDTH


def test_attention_is_that_of_each_head_on_what_its_block_is_given(model, idx):
    (picture,) = attention_picture(model, idx)
    weights = picture.weights
    assert weights.shape == (LAYERS, HEADS, T, T)
    assert (picture.row_name, picture.column_name) == ("layer", "head")
    with torch.no_grad():
        values = inner_values(model, idx)
        for layer, block in enumerate(model.blocks):
            for h, head in enumerate(block.sa.heads):
                expected = head.weights(values[f"input {layer}"])[0].numpy()
                np.testing.assert_allclose(weights[layer, h], expected, atol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)
    assert (np.triu(weights, 1) == 0).all()
    assert np.ptp(weights[:, :, -1]) > 0.1


def squares(pixels: np.ndarray, n_rows: int, n_columns: int, side: int) -> np.ndarray:
    """Cut the squares of so many pixels out of a grid: (rows, columns, side, side)."""
    top, right = LINE_HEIGHT, pixels.shape[1]
    lefts = [right - GAP - side - i * (side + GAP) for i in reversed(range(n_columns))]
    rows = [pixels[top + i * (side + GAP) :][:side] for i in range(n_rows)]
    return np.array([[row[:, left : left + side] for left in lefts] for row in rows])


def test_a_picture_shows_each_weight_as_a_square_with_its_root_as_brightness():
    weights = np.random.default_rng(0).random((2, 3, 5, 5))
    pixels = Image("attention", weights, "layer", "head").pixels()
    side = 800 // 3 // 5 * 5
    assert (pixels.dtype, pixels.ndim) == (np.uint8, 2)
    blocks = squares(pixels, 2, 3, side).reshape(2, 3, 5, side // 5, 5, side // 5)
    assert (blocks == blocks[:, :, :, :1, :, :1]).all()
    np.testing.assert_array_equal(blocks[:, :, :, 0, :, 0], np.rint(255 * np.sqrt(weights)))


def test_a_grid_is_labelled_above_and_at_its_left():
    plain = draw_grid(np.zeros((2, 2, 4, 4)), " ", " ")
    pixels = draw_grid(np.zeros((2, 2, 4, 4)), "layer", "head")
    above, side = pixels[:LINE_HEIGHT], 384
    left = pixels.shape[1] - 2 * (side + GAP)
    for i in range(2):
        assert (above[:, left + i * (side + GAP) :][:, :side] > 128).any()
        assert (pixels[LINE_HEIGHT + i * (side + GAP) :][:side, :left] > 128).any()
    assert (draw_grid(np.zeros((2, 2, 4, 4)), "layer", "head") == pixels).all()
    assert plain.shape[0] == pixels.shape[0] and plain.shape[1] < pixels.shape[1]


@pytest.mark.parametrize(
    ("n", "T", "side"), [(1, 1, 384), (1, 5, 380), (4, 32, 192), (4, 256, 128), (12, 256, 64)]
)
def test_a_square_is_enlarged_or_averaged_by_a_whole_factor_so_that_the_grid_fits_a_page(n, T, side):
    weights = np.random.default_rng(0).random((1, n, T, T))
    found = squares(draw_grid(weights, "layer", "head"), 1, n, side)
    factor = -(-T // side)
    expected = weights.reshape(1, n, T // factor, factor, T // factor, factor).mean(axis=(3, 5))
    step = side * factor // T
    np.testing.assert_array_equal(found[..., ::step, ::step], np.rint(255 * np.sqrt(expected)))


def test_a_weight_that_is_not_finite_is_black():
    pixels = draw_grid(np.array([[math.nan, 1.0], [0.0, 0.0]])[None, None], "layer", "head")
    assert squares(pixels, 1, 1, 384)[0, 0, 0, [0, -1]].tolist() == [0, 255]


def test_the_attention_of_a_long_context_is_cut_to_a_picture(idx):
    config = ModelConfig(n_embd=4, n_head=1, n_layer=1, block_size=300, vocab_size=9)
    long = torch.zeros(1, 300, dtype=torch.int64)
    (picture,) = attention_picture(BigramLanguageModel(config), long)
    assert picture.weights.shape == (1, 1, 256, 256)


def test_the_embedding_is_a_copy_of_the_table_with_a_label_for_each_character(model):
    embedding = token_embedding(model)
    table = model.token_embedding_table.weight.detach().numpy()
    assert embedding.vectors.dtype == np.float32
    np.testing.assert_array_equal(embedding.vectors, table)
    assert not np.shares_memory(embedding.vectors, table)
    assert embedding.labels == ["\\t", "\\n", "\\x20", "\\\\", "a", "b", "c", "é", "日"]


def test_no_label_breaks_a_table():
    for character in map(chr, [*range(0x3100), 0xFEFF, 0xD800, 0xE000, 0x1F642]):
        label = character_label(character)
        assert label.isprintable() and label.split() == label.splitlines() == [label]
        assert label == character or label.encode().decode("unicode_escape") == character


def test_labels_differ():
    characters = list(map(chr, range(0x3100)))
    assert len(set(map(character_label, characters))) == len(characters)


def test_a_sample_depends_on_the_weights_and_the_seed_alone(model, idx):
    text = sample(model, idx, 7)["samples"]
    assert len(text) == SAMPLE_LENGTH
    assert set(text) <= set(VOCABULARY)
    torch.manual_seed(99)
    assert sample(model, idx[:1], 7) == {"samples": text}
    assert sample(model, idx, 8) != {"samples": text}


def test_looking_leaves_model_gradients_and_random_state_as_they_were(model, idx):
    model(idx, idx)[1].backward()
    before = {name: (p.clone(), p.grad.clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    looks = [activation_histograms, attention_picture, lambda m, i: sample(m, i, 1)]
    for training in (True, False):
        model.train(training)
        for look in [*looks, lambda m, _: token_embedding(m)]:
            look(model, idx)
            assert all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not module._forward_hooks for module in model.modules())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and torch.equal(p.grad, before[name][1])


def test_a_look_that_fails_takes_its_hooks_along_and_restores_the_mode(model):
    model.train()
    with pytest.raises(IndexError):
        activation_histograms(model, torch.full((1, T), len(VOCABULARY)))
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())


# --- the picture of an embedding ----------------------------------------------------------------------


def test_principal_components_are_the_directions_of_most_variance():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 5)) * [1, 9, 0.1, 3, 0.5] + 7
    places = principal_components(vectors)
    covariance = np.cov(vectors.T)
    np.testing.assert_allclose(places.var(axis=0, ddof=1), np.linalg.eigvalsh(covariance)[:-3:-1])
    np.testing.assert_allclose(places.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(principal_components(vectors[:, ::-1]), places)
    assert (places.max(axis=0) == np.abs(places).max(axis=0)).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (5, 1), (2, 2), (600, 3)])
def test_an_embedding_of_any_shape_can_be_drawn(shape):
    vectors = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    assert principal_components(vectors).shape == (shape[0], 2)
    assert draw_embedding(Embedding("e", vectors, ["x"] * shape[0])).shape == (600, 600, 3)


def test_each_label_is_drawn_at_its_place():
    vectors = np.array([[-1.0, 0.0], [0.0, 0.1], [1.0, 0.0]])
    pixels = draw_embedding(Embedding("e", vectors, ["m", "$", "日"]))
    columns = np.flatnonzero((pixels < 255).any(axis=(0, 2)))
    assert pixels.dtype == np.uint8
    assert columns.min() < 75 and columns.max() > 525
    assert ((columns > 285) & (columns < 315)).any()


@pytest.mark.parametrize(("n", "least", "most"), [(2, 0.025, 0.04), (65, 0.025, 0.04), (500, 0.01, 0.02)])
def test_labels_are_large_enough_for_a_list_of_small_pictures_and_smaller_where_there_are_many(
    n, least, most
):
    vectors = np.array([[x, 0.0] for x in np.linspace(-1, 1, n)])
    pixels = draw_embedding(Embedding("e", vectors, ["H"] * n))
    rows = np.flatnonzero((pixels < 128).any(axis=(1, 2)))
    assert least < len(rows) / len(pixels) < most  # the height of the H


def test_characters_that_the_font_lacks_are_escaped():
    assert [in_font(text) for text in ("a", "é", "\\n", "日")] == ["a", "é", "\\n", "\\u65e5"]


# --- when it is seen ----------------------------------------------------------------------------------


class Noting:
    """Trackers that note what is logged and when."""

    working_names = ("x",)

    def __init__(self):
        self.logged: list[tuple] = []
        self.rows: list[dict] = []

    def keeps(self, kind):
        return bool(self.working_names)

    def log(self, kind, payload, step):
        if kind == "scalars":
            self.rows.append({"step": step, **payload})
        summaries = {
            "scalars": lambda: tuple(payload),
            "histograms": lambda: tuple(sorted({h.kind for h in payload})),
            "images": lambda: (payload[0].name, len(payload)),
            "texts": lambda: tuple(payload),
            "embedding": lambda: (payload.name,),
        }
        self.logged.append((step, *summaries[kind]()))


def make_trainer(model) -> Trainer:
    data = (np.arange(200) % len(VOCABULARY)).astype(np.uint8)
    config = TrainConfig(batch_size=2, eval_iters=2, grad_clip=1e-3)
    runtime = Runtime()
    return Trainer(model, (data, data), config, runtime, pytest.fail)


def all_intervals(interval: int) -> TensorBoardConfig:
    return TensorBoardConfig(**dict.fromkeys(INTERVALS, interval))


@pytest.fixture
def observe(model):
    """`observe(config, steps)`: trains that long; what the trackers got, and what was warned."""

    def run(config, steps, prepare=lambda trainer: None):
        trainer, trackers, warnings = make_trainer(model), Noting(), []
        prepare(trainer)
        observer = Observer(trainer, trackers, config, warnings.append)
        trainer.clock.start(Progress())
        for step in range(steps):
            observer.log_model(step)
            observer.log_step(at(trainer, step).forward_backward(), step)
            trainer.optimizer_step()
        observer.log_model(steps)
        return types.SimpleNamespace(logged=trackers.logged, rows=trackers.rows, warnings=warnings)

    return run


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("histogram_interval", ("gradient", "parameter")),
        ("activation_interval", ("activation",)),
        ("attention_interval", ("attention", 1)),
        ("embedding_interval", ("token_embeddings",)),
        ("sample_interval", ("samples",)),
        ("gradient_norm_interval", ("loss/train_step", "gradient_norm")),
        ("speed_interval", ("tokens_per_second",)),
    ],
)
def test_each_interval_decides_when_its_own_is_logged(observe, name, what):
    config = all_intervals(0)
    setattr(config, name, 2)
    result = observe(config, 5)
    first = 2 if name == "speed_interval" else 0  # there is no speed before a step
    last = 4
    others = [logged for logged in result.logged if logged[1:] not in (what, ("loss/train_step",))]
    assert [logged for logged in result.logged if logged[1:] == what] == [
        (step, *what) for step in range(first, last + 1, 2)
    ]
    assert others == result.warnings == []


def test_attention_and_embeddings_are_logged_at_the_end_of_a_run_too(observe):
    def end_at_3(trainer):
        trainer.config.max_iters = 3

    views = [("attention", 1), ("token_embeddings",)]
    logged = observe(all_intervals(100), 3, end_at_3).logged
    assert [entry for entry in logged if entry[1:] in views] == [(s, *view) for s in (0, 3) for view in views]
    assert [entry for entry in logged if entry[0] == 3 and entry[1:] not in views] == []
    logged = observe(all_intervals(1), 3, end_at_3).logged
    assert [entry[0] for entry in logged if entry[1:] == views[0]] == [0, 1, 2, 3]
    assert not any(entry[1:] in views for entry in observe(all_intervals(0), 3, end_at_3).logged)


def test_with_every_interval_at_0_there_is_nothing_but_the_loss(observe, monkeypatch):
    monkeypatch.setattr(Clock, "exclude_from_speed", lambda _: pytest.fail("looked"))
    result = observe(all_intervals(0), 3)
    assert result.logged == [(step, "loss/train_step") for step in range(3)]
    assert [row.keys() for row in result.rows] == [{"step", "loss/train_step"}] * 3


def test_without_a_tracker_the_model_is_not_logged_but_the_scalars_are_kept(observe, monkeypatch):
    monkeypatch.setattr(observer_module, "model_histograms", lambda _: pytest.fail("counted"))
    monkeypatch.setattr(Noting, "working_names", ())
    result = observe(
        all_intervals(1),
        2,
        lambda trainer: monkeypatch.setattr(trainer, "validation_batch", lambda: pytest.fail("looked")),
    )
    rows = [row.keys() for row in result.rows if "tokens_per_second" not in row]
    assert rows == [{"step", "loss/train_step", "gradient_norm"}] * 2


def test_the_gradient_norm_is_that_of_all_gradients_before_clipping(observe):
    trainers = []
    result = observe(all_intervals(1), 1, trainers.append)
    (row,) = (row for row in result.rows if "gradient_norm" in row)
    # The clipped gradients are still there; SGD and AdamW do not change them.
    norm = torch.cat([p.grad.flatten() for p in trainers[0].model.parameters()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert row["gradient_norm"] > 10 * norm
    assert row["gradient_norm"] == trainers[0].gradient_norm


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_no_point(model, norm):
    trainer, trackers = make_trainer(model), Noting()
    trainer.gradient_norm = norm
    Observer(trainer, trackers, all_intervals(1), pytest.fail).log_step(1.5, 0)
    assert trackers.rows == [{"step": 0, "loss/train_step": 1.5}]


def test_a_look_that_fails_is_one_warning(observe):
    def break_batch(trainer):
        trainer.validation_batch = lambda: 1 / 0

    result = observe(all_intervals(1), 3, break_batch)
    assert result.warnings == [
        "looking at the model is switched off, training continues: ZeroDivisionError: division by zero"
    ]
    assert [row["step"] for row in result.rows if "loss/train_step" in row] == [0, 1, 2]


def test_no_sample_is_drawn_from_a_model_that_is_not_finite(model):
    trackers = Noting()
    model.lm_head.bias.data[0] = math.nan
    Observer(make_trainer(model), trackers, all_intervals(1), pytest.fail).log_model(0)
    assert (0, "samples") not in trackers.logged
    assert (0, "activation") in trackers.logged


def test_of_a_large_batch_the_first_sequences_are_enough(observe, monkeypatch):
    monkeypatch.setattr(observer_module, "OBSERVED_TOKENS", 1)
    shapes = []
    monkeypatch.setattr(
        observer_module, "activation_histograms", lambda _, idx: shapes.append(idx.shape) or []
    )
    observe(all_intervals(1), 0)
    assert shapes == [(1, T)]


@pytest.mark.parametrize(
    ("step", "interval", "expected"), [(0, 0, False), (0, 5, True), (5, 5, True), (6, 5, False)]
)
def test_an_interval_of_0_is_never_due(step, interval, expected):
    assert due(step, interval) is expected


# --- the clock ----------------------------------------------------------------------------------------


def test_speed_leaves_out_evaluations_and_looks(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("utils_alg1.training.progress.running_time", lambda: now[0])
    synchronized = []
    clock = Clock(lambda: synchronized.append(now[0]), tokens_per_step=10)
    progress = Progress(step=3, seconds=20.0)

    def spend(seconds: float) -> None:
        now[0] += seconds

    clock.start(progress)
    assert clock.speed("metric", 3) is None
    with clock.exclude_from_speed():
        spend(7)
    for _ in range(4):
        spend(0.5)
        progress.step += 1
    assert clock.speed("evaluation", progress.step) == pytest.approx(20)
    with clock.exclude_from_speed():
        spend(50)
    assert clock.speed("evaluation", progress.step) is None
    spend(0.5)
    progress.step += 1
    assert clock.speed("metric", 8) == pytest.approx(50 / 2.5)
    spend(1)
    progress.step += 1
    assert clock.speed("metric", 9) == pytest.approx(10)
    assert clock.speed("evaluation", 9) == pytest.approx(20 / 1.5)
    for _ in range(2):
        clock.measure(progress)
        assert progress.seconds == pytest.approx(20 + now[0] - 100)
    assert synchronized[-1] == now[0]


# --- a run --------------------------------------------------------------------------------------------


def test_how_often_one_looks_changes_no_byte(workdir):
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    results = []
    for interval in (0, 1):
        flags = [text for name in INTERVALS for text in ("--" + name.replace("_", "-"), str(interval))]
        folder = f"runs-{interval}"
        arguments = ["--data", "text.txt", *TINY, "--dropout", "0.2", "--no-aim", "--runs-dir", folder]
        assert script.main(with_changes([*arguments, *flags, "--quiet"])) == 0
        (run,) = list_runs(folder)
        tensors, _ = read_tensors(run / "artifacts/checkpoints/step_000000006.safetensors")
        export, _ = read_tensors(run / "artifacts/export/model.safetensors")
        metrics = [json.loads(row) for row in lasting_metrics(run / "logs/metrics.jsonl").splitlines()]
        for row in metrics:
            row.pop("gradient_norm", None)
        state = {n: t.numpy().tobytes() for tensors_ in (tensors, export) for n, t in tensors_.items()}
        results.append((state, metrics, (run / "eval/samples.txt").read_bytes()))
    assert results[0] == results[1]
    assert len(results[0][0]) > 50


@pytest.mark.parametrize("name", INTERVALS)
@pytest.mark.parametrize("value", ["-1", "often", "0.5"])
def test_an_interval_that_is_none_ends_with_2(name, value, train, text_file):
    result = train("--data", "text.txt", *TINY, f"--{name.replace('_', '-')}={value}")
    assert result.code == 2
    assert result.err.startswith("error: ") and name.replace("_", "-") in result.err.replace("_", "-")
    assert not Path("runs").exists()


def test_an_interval_that_is_not_known_ends_with_2(train, text_file, workdir):
    (workdir / "configs").mkdir()
    (workdir / "configs/tensorboard.json").write_text('{"atention_interval": 3}')
    result = train("--data", "text.txt", *TINY)
    assert result.code == 2
    assert "unknown name 'atention_interval'; did you mean attention_interval?" in result.err
