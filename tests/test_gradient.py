"""The manual gradient equals that of autograd, for any sizes, and is used where it applies."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import BigramLanguageModel
from parameters import MODEL_OPTIONS, ModelConfig
from utils_alg1.network import gradient
from utils_alg1.network.gradient import OPTIONS, loss_and_gradients
from utils_alg1.training import backward as backward_module
from utils_alg1.training.backward import Backward, ManualBackward, create_backward
from utils_alg1.training.distributed import Distributed
from utils_alg1.training.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Runtime(torch.device("cpu"), torch.float32, 1)
SMALL = ModelConfig(vocab_size=7, n_embd=8, n_head=2, n_layer=2, block_size=6)


def make_model(config: ModelConfig = SMALL) -> BigramLanguageModel:
    """A model whose every number matters: biases and norms are drawn too."""
    torch.manual_seed(1)
    model = BigramLanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def draw_batch(config: ModelConfig, B: int = 3, T: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (B, T or config.block_size)
    draw = torch.Generator().manual_seed(2)
    return tuple(torch.randint(config.vocab_size, shape, generator=draw) for _ in range(2))


def assert_same_gradient_as_autograd(config: ModelConfig, B: int, T: int, tolerance: float = 1e-12) -> None:
    model = make_model(config).double()
    x, y = draw_batch(config, B, T)
    expected = model(x, y)[1]
    expected.backward()
    with torch.no_grad():
        loss, gradients = loss_and_gradients(dict(model.named_parameters()), config, x, y)
    assert loss.item() == pytest.approx(expected.item(), abs=tolerance)
    for (name, parameter), found in zip(model.named_parameters(), gradients, strict=True):
        assert found.shape == parameter.shape
        torch.testing.assert_close(found, parameter.grad, atol=tolerance, rtol=tolerance, msg=name)
        assert parameter.grad.abs().max() > 0, name


@settings(max_examples=60)
@given(
    plain=st.booleans(), n_head=st.integers(1, 4), head_size=st.integers(1, 5), n_layer=st.integers(1, 3),
    block_size=st.integers(2, 9), short=st.integers(0, 1), B=st.integers(1, 4), vocab_size=st.integers(2, 9),
    positions=st.sampled_from(["learned", "rotary"]), qk_norm=st.booleans(),
)  # fmt: skip
def test_the_gradient_is_that_of_autograd(
    plain, n_head, head_size, n_layer, block_size, short, B, vocab_size, positions, qk_norm
):
    # A norm over one number has no gradient, and rotary positions rotate pairs.
    n_embd = n_head * (2 * head_size if positions == "rotary" else head_size + 1)
    config = ModelConfig(
        n_embd, n_head, n_layer, block_size, 0.0, vocab_size, positions=positions, qk_norm=qk_norm
    )
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(gradient, "flash_attention", gradient.math_attention)
        assert_same_gradient_as_autograd(config, B, block_size - short)


@pytest.mark.parametrize("math_up_to", [0, 64])
@pytest.mark.parametrize("options", [{}, {"positions": "rotary", "qk_norm": True}])
def test_the_compiler_sees_one_graph_with_the_same_gradient(options, math_up_to, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.code))
        return graph.forward

    monkeypatch.setattr(gradient, "MATH_ATTENTION_MAX_T", math_up_to)
    torch.compiler.reset()
    function = torch.compile(loss_and_gradients, backend=backend, fullgraph=True)
    config = dataclasses.replace(SMALL, **options)
    model = make_model(config)
    x, y = draw_batch(config)
    expected = model(x, y)[1]
    expected.backward()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for _ in range(2):
            loss, gradients = function(weights, config, x, y)
    assert len(graphs) == 1
    assert ("softmax" in graphs[0].replace("log_softmax", "")) == (math_up_to > 0)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for parameter, found in zip(weights.values(), gradients, strict=True):
        torch.testing.assert_close(found, parameter.grad, atol=1e-6, rtol=1e-4)


def test_micro_batches_add_up_and_the_loss_is_their_share():
    config, parts = SMALL, 4
    ours, theirs = make_model(), make_model()
    written, autograd = ManualBackward(ours, CPU, pytest.fail), Backward(theirs, CPU)
    x, y = draw_batch(config)
    for _ in range(parts):
        mine, other = written(x, y, parts), autograd(x, y, parts)
        assert mine.item() == pytest.approx(other.item(), abs=1e-7)
        assert not mine.requires_grad and not other.requires_grad
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


class Two(Distributed):
    """The first of two, which are not connected."""

    def wrap(self, model, device):
        return model


@pytest.mark.parametrize(
    "change, dropout",
    [
        ({}, 0.1),
        ({"dtype": torch.bfloat16}, 0.0),
        ({"dist": Two(world_size=2)}, 0.0),
        ({"device": torch.device("meta")}, 0.0),
    ],
)
def test_what_it_does_not_support_is_left_to_autograd(change, dropout):
    assert isinstance(create_backward(make_model(), CPU, pytest.fail), ManualBackward)
    model = BigramLanguageModel(dataclasses.replace(SMALL, dropout=dropout))
    backward = create_backward(model, dataclasses.replace(CPU, **change), pytest.fail)
    assert type(backward) is Backward


def test_an_option_that_it_does_not_know_is_left_to_autograd(monkeypatch):
    assert set(MODEL_OPTIONS) == OPTIONS
    monkeypatch.setattr(backward_module, "OPTIONS", OPTIONS - {"qk_norm"})
    assert isinstance(create_backward(make_model(), CPU, pytest.fail), ManualBackward)
    model = make_model(dataclasses.replace(SMALL, qk_norm=True))
    assert type(create_backward(model, CPU, pytest.fail)) is Backward


def test_the_compiler_is_told_to_leave_python_out(monkeypatch):
    told = []

    def compile(function, options):
        told.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    backward = create_backward(make_model(), dataclasses.replace(CPU, compile=True), lambda _: None)
    backward(*draw_batch(SMALL), 1)
    assert told == [(loss_and_gradients, {"cpp_wrapper": True})] and backward.compiled
