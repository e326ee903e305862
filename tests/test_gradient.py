"""The manual gradient equals that of autograd, for any sizes, and is used where it applies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model import BigramLanguageModel
from parameters import MODEL_OPTIONS, ModelConfig, Parameters, TrainConfig
from utils_alg1.network import attention as attention_module
from utils_alg1.network import dropout as dropout_module
from utils_alg1.network import products as products_module
from utils_alg1.network.attention import blocked_attention, flash_attention, math_attention
from utils_alg1.network.dropout import DropoutMasks, draw_masks
from utils_alg1.network.gradient import OPTIONS, loss_and_gradients, self_attention
from utils_alg1.network.products import Products, onednn_works
from utils_alg1.network.rotary import apply_qk_norm_and_rotary, rotary_cos_sin
from utils_alg1.training import arithmetic as arithmetic_module
from utils_alg1.training.arithmetic import Arithmetic, Processor, choose_arithmetic
from utils_alg1.training.backward import Backward, ManualBackward, create_backward
from utils_alg1.training.optimizers import create_optimizer
from utils_alg1.training.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Runtime()
needs_onednn = pytest.mark.skipif(
    not onednn_works(torch.bfloat16), reason="this build of PyTorch has no oneDNN"
)
SMALL = ModelConfig(vocab_size=7, n_embd=8, n_head=2, n_layer=2, block_size=6)


def make_model(config: ModelConfig = SMALL) -> BigramLanguageModel:
    """A model whose every number matters: biases and norms are drawn too."""
    torch.manual_seed(1)
    model = BigramLanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


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
    form=st.sampled_from([flash_attention, math_attention, blocked_attention]), block=st.integers(1, 9),
    n_head=st.integers(1, 4), head_size=st.integers(1, 5), n_layer=st.integers(1, 3),
    block_size=st.integers(2, 9), short=st.integers(0, 1), B=st.integers(1, 4), vocab_size=st.integers(2, 9),
    positions=st.sampled_from(["learned", "rotary"]), qk_norm=st.booleans(),
)  # fmt: skip
def test_the_gradient_is_that_of_autograd(
    form, block, n_head, head_size, n_layer, block_size, short, B, vocab_size, positions, qk_norm
):
    # A norm over one number has no gradient, and rotary positions rotate pairs.
    n_embd = n_head * (2 * head_size if positions == "rotary" else head_size + 1)
    config = ModelConfig(
        n_embd, n_head, n_layer, block_size, 0.0, vocab_size, positions=positions, qk_norm=qk_norm
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "QUERY_BLOCK", block)
        patch.setattr(attention_module, "flash_attention", form)
        assert_same_gradient_as_autograd(config, B, block_size - short)


@pytest.mark.parametrize("math_up_to", [0, 64])
@pytest.mark.parametrize("options", [{}, {"positions": "rotary", "qk_norm": True}, {"dropout": 0.2}])
@pytest.mark.parametrize("products", [Products(), Products(torch.bfloat16)])
def test_the_compiler_sees_one_graph_with_the_same_gradient(products, options, math_up_to, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.code))
        return graph.forward

    monkeypatch.setattr(attention_module, "MATH_ATTENTION_MAX_T", math_up_to)
    torch.compiler.reset()
    function = torch.compile(loss_and_gradients, backend=backend, fullgraph=True)
    config = dataclasses.replace(SMALL, **options)
    x, y = draw_batch(config)
    weights = dict(make_model(config).named_parameters())
    with torch.no_grad():
        for seed in range(2):
            masks = draw_masks(config, *x.shape, seed) if config.dropout else None
            expected, plain = loss_and_gradients(weights, config, x, y, Products(), masks)
            loss, gradients = function(weights, config, x, y, products, masks)
    assert len(graphs) == 1
    by_products = math_up_to > 0 or config.dropout > 0
    assert ("softmax" in graphs[0].replace("log_softmax", "")) == by_products
    exact = products.dtype is torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6 if exact else 0.02)
    for parameter, found in zip(plain, gradients, strict=True):
        if exact:
            torch.testing.assert_close(found, parameter, atol=1e-6, rtol=1e-4)
    difference = torch._foreach_sub(gradients, plain)
    assert flat(difference).norm() < 0.1 * flat(plain).norm()


@pytest.mark.parametrize("T, dtypes", [(5, [torch.float32]), (6, [])])
@pytest.mark.parametrize("options", [{}, {"positions": "rotary", "qk_norm": True}])
def test_bfloat16_attends_in_float32_to_a_short_context_and_in_blocks_to_a_long_one(
    T, dtypes, options, monkeypatch
):
    seen = []

    def spy(q, k, v):
        seen.append(q.dtype)
        return flash_attention(q, k, v)

    monkeypatch.setattr(attention_module, "BFLOAT16_ATTENTION_MIN_T", 6)
    monkeypatch.setattr(attention_module, "flash_attention", spy)
    config = dataclasses.replace(SMALL, **options)
    cos_sin = rotary_cos_sin(config, 0, T, torch.device("cpu"))
    draw = torch.Generator().manual_seed(1)
    qkv = torch.randn(2, T, 3, 2, 4, generator=draw)
    grad = torch.randn(2 * T, 8, generator=draw)
    out, backward = self_attention(qkv.bfloat16(), config.qk_norm, cos_sin)
    assert seen == dtypes
    monkeypatch.setattr(attention_module, "flash_attention", math_attention)
    exact, exact_backward = self_attention(qkv.double(), config.qk_norm, cos_sin)
    assert out.dtype is (dtypes[0] if dtypes else torch.bfloat16)  # what comes next converts it
    torch.testing.assert_close(out.double(), exact, atol=0.03, rtol=0.03)
    found = backward(grad.bfloat16())
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), exact_backward(grad.double()), atol=0.05, rtol=0.03)


# --- dropout ------------------------------------------------------------------------------------------


def loss_with_dropout(model: BigramLanguageModel, x, y, masks: DropoutMasks) -> torch.Tensor:
    """The loss in the plain form of the modules, with these choices of dropout."""
    (B, T), config = x.shape, model.config
    out = model.token_embedding_table(x)
    if model.position_embedding_table is not None:
        out = out + model.position_embedding_table.weight[:T]
    cos_sin = rotary_cos_sin(config, 0, T, x.device)
    for block, kept in zip(model.blocks, masks.layers, strict=True):
        q, k, v = block.sa.qkv(block.ln1(out)).view(B, T, 3, config.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k = (apply_qk_norm_and_rotary(part, config.qk_norm, cos_sin) for part in (q, k))
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = (q @ k.mT * config.head_size**-0.5).masked_fill(future, -torch.inf).softmax(-1)
        padded = [F.pad(part, (0, T - part.shape[2])) for part in kept.attention]
        weights = weights * torch.cat(padded, 1).view(weights.shape) * masks.scale
        joined = (weights @ v).transpose(1, 2).reshape(B, T, -1)
        out = out + block.sa.proj(joined) * kept.proj.view(B, T, -1) * masks.scale
        out = out + block.ffwd.net(block.ln2(out)) * kept.down.view(B, T, -1) * masks.scale
    return F.cross_entropy(model.lm_head(model.ln_f(out)).flatten(0, 1), y.flatten())


@settings(max_examples=30)
@given(
    B=st.integers(1, 3), T=st.integers(1, 9), block=st.integers(1, 9), n_head=st.integers(1, 3),
    p=st.floats(0.05, 0.95), seed=st.integers(0, 2**63 - 1), positions=st.sampled_from(["learned", "rotary"]),
)  # fmt: skip
def test_the_gradient_with_dropout_is_that_of_autograd_with_the_same_masks(
    B, T, block, n_head, p, seed, positions
):
    config = ModelConfig(4 * n_head, n_head, 2, 9, p, 5, positions=positions, qk_norm=positions == "rotary")
    model = make_model(config).double().eval()
    x, y = draw_batch(config, B, T)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attention_module, "QUERY_BLOCK", block)
        masks = draw_masks(config, B, T, seed)
        products = Products(torch.float64)
        loss, gradients = loss_and_gradients(dict(model.named_parameters()), config, x, y, products, masks)
    expected = loss_with_dropout(model, x, y, masks)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    for (name, parameter), found in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(found, parameter.grad, atol=1e-12, rtol=1e-12, msg=name)


def mask_values(masks: DropoutMasks) -> torch.Tensor:
    parts = [part for layer in masks.layers for part in (*layer.attention, layer.proj, layer.down)]
    assert all(part.dtype is torch.uint8 for part in parts)
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_dropout_keeps_the_share_it_should(p):
    config = ModelConfig(64, 4, 3, 128, p, 5)
    masks = draw_masks(config, 16, 128, seed=3)
    assert masks.layers[0].attention[1].shape == (64, 64, 128)  # the second block of queries sees all keys
    values = mask_values(masks)
    assert values.unique().tolist() == [0, 1]
    assert 1 / masks.scale == pytest.approx(1 - p, abs=1e-5)
    deviation = (p * (1 - p) / values.numel()) ** 0.5  # below 3e-4
    assert values.double().mean().item() == pytest.approx(1 - p, abs=4 * deviation)
    for layer in masks.layers:
        for part in (*layer.attention, layer.proj, layer.down):
            deviation = (p * (1 - p) / part.numel()) ** 0.5
            assert part.double().mean().item() == pytest.approx(1 - p, abs=4 * deviation)


def test_the_seed_decides_the_masks_and_no_two_layers_have_the_same():
    config = ModelConfig(8, 2, 2, 9, 0.5, 5)
    draws = [mask_values(draw_masks(config, 3, 9, seed)) for seed in (7, 7, 8)]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])
    half = len(draws[0]) // 2
    assert not draws[0][:half].equal(draws[0][half:])
    first = "".join(map(str, draws[0][:24].tolist()))
    assert first == "101101000101010001000011"  # also in years, as old runs resume


def test_masks_are_the_same_by_any_number_of_threads(threads, monkeypatch):
    config = ModelConfig(8, 2, 5, 9, 0.5, 5)
    alone = mask_values(draw_masks(config, 3, 9, 7))
    monkeypatch.setattr(dropout_module, "THREADS_PAY", 0)
    assert mask_values(draw_masks(config, 3, 9, 7)).equal(alone)


def test_a_dropout_of_almost_one_keeps_something():
    assert draw_masks(ModelConfig(8, 2, 1, 4, 0.9999999, 5), 1, 4, 0).scale == 65536


def test_the_mean_over_many_masks_is_the_value_without_dropout():
    config = ModelConfig(8, 2, 1, 4, 0.3, 5)
    q, k, v = torch.randn(3, 2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = blocked_attention(q, k, v)[0]
    masks = [draw_masks(config, 2, 4, seed) for seed in range(3000)]
    outs = torch.stack([blocked_attention(q, k, v, m.layers[0].attention, m.scale)[0] for m in masks])
    assert outs.std(0).mean() > 0.3
    torch.testing.assert_close(outs.mean(0), expected, atol=0.08, rtol=0)


# --- products -----------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("blocks_from", [0, 1000])
def test_bfloat16_is_about_as_precise_as_autocast(onednn, options, blocks_from, monkeypatch):
    """As the distance from the gradient in double precision, over all weights."""
    monkeypatch.setattr(attention_module, "BFLOAT16_ATTENTION_MIN_T", blocks_from)
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", 8)
    config = ModelConfig(32, 2, 2, 32, 0.0, 11, **options)
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
    assert 1e-4 * size < distance(gradients) < 1.25 * autocast_distance < 0.05 * size
    assert loss.item() == pytest.approx(exact(x, y)[1].item(), abs=0.01)


def test_a_build_without_onednn_is_noticed(monkeypatch):
    monkeypatch.setattr(products_module.Products, "linear", lambda *_, **__: torch.ops.mkldnn.not_there)
    onednn_works.cache_clear()
    assert not onednn_works()
    monkeypatch.undo()
    monkeypatch.setattr(products_module.Products, "linear_add", lambda *_: torch.zeros(16, 3))
    onednn_works.cache_clear()
    assert not onednn_works()  # nor one that computes something else
    monkeypatch.undo()
    onednn_works.cache_clear()


@needs_onednn
def test_a_processor_that_oneDNN_gives_no_bfloat16_still_gets_its_float32(monkeypatch):
    class Refusing(Products):
        def linear(self, x, *arguments, **options):
            if self.dtype is torch.bfloat16:
                raise RuntimeError("bf16 path needs the cpu support")
            return super().linear(x, *arguments, **options)

    onednn_works.cache_clear()
    monkeypatch.setattr(products_module, "Products", Refusing)
    assert onednn_works() and not onednn_works(torch.bfloat16)
    monkeypatch.undo()
    onednn_works.cache_clear()


# --- steps --------------------------------------------------------------------------------------------


def test_micro_batches_add_up_and_the_loss_is_their_share():
    config, parts = SMALL, 4
    ours, theirs = make_model(), make_model()
    flats = [create_optimizer(model, TrainConfig(), Arithmetic()).flats for model in (ours, theirs)]
    written, autograd = ManualBackward(ours, flats[0], CPU, pytest.fail), Backward(theirs, flats[1], CPU)
    x, y = draw_batch(config)
    for i in range(parts):
        mine, other = (backward(x, y, parts, accumulate=i > 0) for backward in (written, autograd))
        assert mine.item() == pytest.approx(other.item(), abs=1e-7)
        assert not mine.requires_grad and not other.requires_grad
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "gradient, where",
    [
        ("manual", {}),
        ("manual", {"dtype": "bfloat16", "dropout": 0.1}),
        ("autograd", {"device": torch.device("meta")}),
    ],
)
def test_what_it_does_not_support_is_left_to_autograd(gradient, where):
    here = {"device": torch.device("cpu"), "processor": Processor()}
    values = {key: where[key] for key in ("dtype", "dropout") if key in where}
    params = Parameters.from_values(values, {})
    here |= {key: value for key, value in where.items() if key not in values}
    assert choose_arithmetic(params, **here).gradient == gradient


@pytest.mark.parametrize("gradient, kind", [("manual", ManualBackward), ("autograd", Backward)])
def test_the_runtime_decides_which_gradient_is_used(gradient, kind):
    runtime = Runtime(arithmetic=Arithmetic(gradient=gradient))
    assert type(create_backward(make_model(), [], runtime, pytest.fail)) is kind


def test_an_option_that_it_does_not_know_is_left_to_autograd(monkeypatch):
    assert set(MODEL_OPTIONS) == OPTIONS
    monkeypatch.setattr(arithmetic_module, "OPTIONS", OPTIONS - {"qk_norm"})
    for values, expected in ({}, "manual"), ({"qk_norm": True}, "autograd"):
        params = Parameters.from_values(values, {})
        chosen = choose_arithmetic(params, torch.device("cpu"), Processor())
        assert chosen.gradient == expected


def test_the_compiler_is_told_to_leave_python_out(monkeypatch):
    told = []

    def compile(function, options):
        told.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    model, plain = make_model(), make_model()
    flats, runtime = (
        create_optimizer(model, TrainConfig(), Arithmetic()).flats,
        Runtime(arithmetic=Arithmetic(compiled=True)),
    )
    backward = create_backward(model, flats, runtime, lambda _: None)
    assert not Backward(pytest.fail, [], Runtime()).arithmetic.compiled
    batch = draw_batch(SMALL)
    loss = backward(*batch, 1)
    ((function, options),) = told
    assert options == {"cpp_wrapper": True} and backward.arithmetic.compiled
    # The compiled function joins the gradients; they are those of the plain one.
    arguments = SMALL, *batch, Products(torch.float32)
    with torch.no_grad():
        expected, gradients = loss_and_gradients(dict(plain.named_parameters()), *arguments)
        assert len(function(dict(model.named_parameters()), *arguments)[1]) == len(flats) == 2
    assert loss == expected
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
