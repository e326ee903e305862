"""The manual gradient equals that of autograd, for any sizes, and is used where it applies."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import BigramLanguageModel
from parameters import MODEL_OPTIONS, ModelConfig, Parameters
from utils_alg1.network import gradient
from utils_alg1.network import products as products_module
from utils_alg1.network.gradient import OPTIONS, loss_and_gradients
from utils_alg1.network.products import Products, onednn_works
from utils_alg1.training import arithmetic as arithmetic_module
from utils_alg1.training.arithmetic import Arithmetic, Processor, choose_arithmetic
from utils_alg1.training.backward import Backward, ManualBackward, create_backward
from utils_alg1.training.distributed import SINGLE_PROCESS, Distributed
from utils_alg1.training.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Runtime()
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
        loss, gradients = loss_and_gradients(
            dict(model.named_parameters()), config, x, y, Products(torch.float64)
        )
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
            loss, gradients = function(weights, config, x, y, Products())
    assert len(graphs) == 1
    assert ("softmax" in graphs[0].replace("log_softmax", "")) == (math_up_to > 0)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for parameter, found in zip(weights.values(), gradients, strict=True):
        torch.testing.assert_close(found, parameter.grad, atol=1e-6, rtol=1e-4)


# --- products -----------------------------------------------------------------------------------------

needs_onednn = pytest.mark.skipif(not onednn_works(), reason="this build of PyTorch has no oneDNN")


@needs_onednn
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("N, I, O", [(32, 5, 7), (33, 8, 3), (1, 4, 4), (48, 64, 32)])
def test_products_of_onednn_are_those_of_pytorch_in_both_directions(N, I, O):  # noqa: E741
    draw = torch.Generator().manual_seed(N)
    x, weight, bias, residual, grad = (
        torch.randn(shape, generator=draw) for shape in ((N, I), (O, I), (O,), (N, O), (N, O))
    )
    plain, ours = Products(), Products(onednn=True)
    for relu in (False, True):
        torch.testing.assert_close(ours.linear(x, weight, bias, relu), plain.linear(x, weight, bias, relu))
    torch.testing.assert_close(ours.linear(x, weight, None), plain.linear(x, weight, None))
    before = residual.clone()
    added = ours.linear_add(x, weight, bias, residual)
    torch.testing.assert_close(added, plain.linear_add(x, weight, bias, residual))
    assert residual.equal(before)  # layer norm needs it again
    for with_bias in (True, False):
        found = ours.backward(grad, x, weight, with_bias, torch.float32)
        expected = plain.backward(grad, x, weight, with_bias, torch.float32)
        assert (found[2] is None) == (expected[2] is None) == (not with_bias)
        for mine, theirs in zip(found[: 2 + with_bias], expected, strict=False):
            assert mine.is_contiguous()
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=needs_onednn)])
@pytest.mark.parametrize("options", [{}, {"positions": "rotary", "qk_norm": True}])
def test_bfloat16_is_no_less_precise_than_autocast(onednn, options):
    """As the distance from the gradient in double precision, over all weights."""
    config = ModelConfig(32, 2, 2, 16, 0.0, 11, **options)
    model, (x, y) = make_model(config), draw_batch(config, 8)
    exact = make_model(config).double()
    exact(x, y)[1].backward()
    with torch.autocast("cpu", torch.bfloat16):
        autocast_loss = model(x, y)[1]
    autocast_loss.backward()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        loss, gradients = loss_and_gradients(weights, config, x, y, Products(torch.bfloat16, onednn))

    def distance(gradients) -> float:
        pairs = zip(gradients, exact.parameters(), strict=True)
        return sum(float((gradient - p.grad).square().sum()) for gradient, p in pairs) ** 0.5

    assert all(gradient.dtype is torch.float32 and gradient.is_contiguous() for gradient in gradients)
    size = sum(float(p.grad.square().sum()) for p in exact.parameters()) ** 0.5
    autocast_distance = distance(p.grad for p in model.parameters())
    assert 1e-4 * size < distance(gradients) < 1.1 * autocast_distance < 0.05 * size
    assert loss.item() == pytest.approx(exact(x, y)[1].item(), abs=0.01)


def test_a_build_without_onednn_is_noticed(monkeypatch):
    monkeypatch.setattr(products_module.Products, "linear", lambda *_, **__: torch.ops.mkldnn.not_there)
    onednn_works.cache_clear()
    assert not onednn_works()
    monkeypatch.undo()
    monkeypatch.setattr(products_module.Products, "linear_add", lambda *_: torch.zeros(16, 3))
    onednn_works.cache_clear()
    assert not onednn_works()  # nor one that computes something else
    onednn_works.cache_clear()


# --- steps --------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "change, dist, device",
    [
        ({"dropout": 0.1}, SINGLE_PROCESS, "cpu"),
        ({}, Distributed(world_size=2), "cpu"),
        ({}, SINGLE_PROCESS, "meta"),
    ],
)
def test_what_it_does_not_support_is_left_to_autograd(change, dist, device):
    def gradient_of(values, dist=SINGLE_PROCESS, device="cpu"):
        params = Parameters.from_values({"dtype": "float32", **values}, {})
        return choose_arithmetic(params, torch.device(device), dist, Processor()).gradient

    assert gradient_of({}) == "manual"
    assert gradient_of(change, dist, device) == "autograd"


@pytest.mark.parametrize("gradient, kind", [("manual", ManualBackward), ("autograd", Backward)])
def test_the_runtime_decides_which_gradient_is_used(gradient, kind):
    runtime = Runtime(arithmetic=Arithmetic(gradient=gradient))
    assert type(create_backward(make_model(), runtime, pytest.fail)) is kind


def test_an_option_that_it_does_not_know_is_left_to_autograd(monkeypatch):
    assert set(MODEL_OPTIONS) == OPTIONS
    monkeypatch.setattr(arithmetic_module, "OPTIONS", OPTIONS - {"qk_norm"})
    for values, expected in ({}, "manual"), ({"qk_norm": True}, "autograd"):
        params = Parameters.from_values(values, {})
        chosen = choose_arithmetic(params, torch.device("cpu"), SINGLE_PROCESS, Processor())
        assert chosen.gradient == expected


def test_the_compiler_is_told_to_leave_python_out(monkeypatch):
    told = []

    def compile(function, options):
        told.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    backward = create_backward(make_model(), Runtime(arithmetic=Arithmetic(compiled=True)), lambda _: None)
    assert not Backward(pytest.fail, Runtime()).arithmetic.compiled
    backward(*draw_batch(SMALL), 1)
    assert told == [(loss_and_gradients, {"cpp_wrapper": True})] and backward.arithmetic.compiled
