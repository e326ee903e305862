"""model.py and its files: against a plain computation of the same network from the exported tensors."""

from __future__ import annotations

import cmath
import contextlib
import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import model as model_module
from model import BigramLanguageModel
from parameters import MODEL_OPTIONS, ModelConfig
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.settings import field_names
from utils_alg1.network import blas as blas_module
from utils_alg1.network.cache import CachedForward, KeyValueCache
from utils_alg1.network.decoder import Decoder
from utils_alg1.network.rotary import apply_rotary, rotary_cos_sin
from utils_alg1.network.sampling import Sampling, draw_with
from utils_alg1.network.tensor_file import read_arrays, read_tensors, write_tensors
from utils_alg1.network.weights import model_shapes, split_heads

SIZES = [
    {"n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 8, "vocab_size": 11},
    {"n_embd": 24, "n_head": 3, "n_layer": 2, "block_size": 5, "vocab_size": 30},
    {"n_embd": 8, "n_head": 8, "n_layer": 1, "block_size": 4, "vocab_size": 2},
    {"n_embd": 12, "n_head": 1, "n_layer": 3, "block_size": 7, "vocab_size": 65},
    {"n_embd": 64, "n_head": 4, "n_layer": 4, "block_size": 32, "vocab_size": 65},
    {"n_embd": 6, "n_head": 3, "n_layer": 1, "block_size": 1, "vocab_size": 5},
]
SMALL = SIZES[0]
OPTIONS = [
    {"n_embd": 24, "n_head": 3, "n_layer": 2, "block_size": 9, "vocab_size": 30, "positions": "rotary"},
    {"n_embd": 24, "n_head": 3, "n_layer": 2, "block_size": 5, "vocab_size": 30, "qk_norm": True},
    {**SMALL, "positions": "rotary", "qk_norm": True, "zero_init": True},
]
VOCABULARY = sorted("\n !abcdefgé")  # as many as SMALL's vocab_size


pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed: int = 0, spread: float = 0.3, **sizes) -> BigramLanguageModel:
    """A model in which every number matters: biases, scales and positions too are far from 0 and 1."""
    model = BigramLanguageModel(ModelConfig(**(SMALL | sizes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(noise + (1 if ".ln" in name or name == "ln_f.weight" else 0))
    return model.eval()


def random_tokens(model: BigramLanguageModel, B: int, T: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (B, T), generator=generator)


@pytest.fixture
def exported(tmp_path):
    """A small model with a vocabulary, and its file."""
    model = build(dropout=0.25)
    model.vocabulary = VOCABULARY
    model.provenance = {"run_id": "2026-01-31_001", "val_loss": 1.5}
    path = tmp_path / "model.safetensors"
    model.save_safetensors(path)
    return model, path


def snapshot(model: BigramLanguageModel) -> tuple:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, dataclasses.replace(model.config), model.vocabulary, dict(model.provenance)


def assert_same(one: tuple, other: tuple) -> None:
    assert one[1:] == other[1:]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


# --- the network --------------------------------------------------------------------------------------


def layer_norm(x, tensors, name):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def rotated(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Rotary positions (B, T, S): complex number i of character t rotates by t / block_size ** (2 i / S)."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])  # (B, T, S / 2)
    for t in range(x.shape[1]):
        for i in range(half):
            pairs[:, t, i] *= cmath.exp(1j * t / block_size ** (i / half))
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def plain_logits(path: Path, idx: torch.Tensor, block_size: int = 0, qk_norm: bool = False) -> torch.Tensor:
    """The network as the lecture writes it, head by head, from the names in the file alone.

    A block_size is given for rotary positions.
    """
    tensors = {name: tensor.double() for name, tensor in load_file(path).items()}
    T = idx.shape[1]
    x = tensors["token_embedding_table.weight"][idx]
    if not block_size:
        x = x + tensors["position_embedding_table.weight"][:T]
    layer = 0
    while f"blocks.{layer}.ln1.weight" in tensors:
        block = f"blocks.{layer}"
        normed = layer_norm(x, tensors, f"{block}.ln1")
        heads, head = [], 0
        while f"{block}.sa.heads.{head}.key.weight" in tensors:
            prefix = f"{block}.sa.heads.{head}"
            q, k, v = (normed @ tensors[f"{prefix}.{part}.weight"].T for part in ("query", "key", "value"))
            if qk_norm:
                q, k = (y / (y**2).mean(-1, keepdim=True).sqrt() for y in (q, k))
            if block_size:
                q, k = rotated(q, block_size), rotated(k, block_size)
            scores = q @ k.transpose(1, 2) / k.shape[-1] ** 0.5
            scores = scores.masked_fill(torch.tril(torch.ones(T, T)) == 0, float("-inf"))
            heads.append(scores.softmax(-1) @ v)
            head += 1
        joined = torch.cat(heads, dim=-1)
        x = x + joined @ tensors[f"{block}.sa.proj.weight"].T + tensors[f"{block}.sa.proj.bias"]
        net = f"{block}.ffwd.net"
        hidden = layer_norm(x, tensors, f"{block}.ln2") @ tensors[f"{net}.0.weight"].T
        hidden = (hidden + tensors[f"{net}.0.bias"]).clamp(min=0)
        x = x + hidden @ tensors[f"{net}.2.weight"].T + tensors[f"{net}.2.bias"]
        layer += 1
    return layer_norm(x, tensors, "ln_f") @ tensors["lm_head.weight"].T + tensors["lm_head.bias"]


@pytest.mark.parametrize("sizes", SIZES + OPTIONS)
def test_logits_and_loss_equal_the_plain_computation_from_the_file(tmp_path, sizes):
    model = build(spread=0.15, **sizes)
    path = tmp_path / "model.safetensors"
    model.save_safetensors(path)
    for T in {1, sizes["block_size"] // 2 + 1, sizes["block_size"]}:
        idx, targets = random_tokens(model, 3, T), random_tokens(model, 3, T, seed=2)

        logits, loss = model(idx, targets)

        rotary = sizes["block_size"] if "positions" in sizes else 0
        plain = plain_logits(path, idx, rotary, "qk_norm" in sizes)
        assert logits.shape == (3, T, sizes["vocab_size"]) and logits.dtype == torch.float32
        assert (logits - plain).abs().max() < 1e-5
        likelihoods = plain.softmax(-1).gather(2, targets[:, :, None])
        assert loss.shape == () and model(idx)[1] is None
        assert loss.item() == pytest.approx(-likelihoods.log().mean().item(), abs=1e-5)
        assert torch.equal(loss, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1)))


@pytest.mark.parametrize("sizes", SIZES[:3] + OPTIONS)
def test_each_head_equals_its_slice_of_the_fused_result(sizes):
    model = build(**sizes)
    attention = model.blocks[0].sa
    x = torch.randn(2, sizes["block_size"], sizes["n_embd"], generator=torch.Generator().manual_seed(3))
    joined = torch.cat([head(x) for head in attention.heads], dim=-1)

    assert len(attention.heads) == sizes["n_head"]
    tensors = split_heads(model.state_dict(), model.config)
    assert torch.equal(
        attention.heads[-1].key, tensors[f"blocks.0.sa.heads.{sizes['n_head'] - 1}.key.weight"]
    )
    cos_sin = rotary_cos_sin(model.config, 0, sizes["block_size"], x.device)
    assert torch.allclose(attention.proj(joined), attention(x, cos_sin=cos_sin), atol=1e-5)


def test_attention_weights_sum_to_one_and_see_nothing_of_the_future():
    attention = build(spread=1.0).blocks[0].sa
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(3))
    for head in attention.heads:
        weights = head.weights(x)

        assert weights.shape == (2, 8, 8)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 8))
        assert (weights.triu(1) == 0).all()
        assert (weights.tril() > 0).any(-1).all()


def test_a_later_character_never_changes_earlier_logits():
    model = build()
    idx = random_tokens(model, 2, 8)
    for changed in range(1, 8):
        other = idx.clone()
        other[:, changed] = (other[:, changed] + 1) % model.config.vocab_size

        before, after = model(idx)[0], model(other)[0]

        assert torch.equal(before[:, :changed], after[:, :changed])
        assert not torch.allclose(before[:, changed:], after[:, changed:])


def test_a_model_that_cannot_be_is_refused():
    with pytest.raises(Alg1Error, match="n_embd = 10 must be divisible by n_head = 3"):
        BigramLanguageModel(ModelConfig(**(SMALL | {"n_embd": 10, "n_head": 3})))


def test_the_reference_model_has_its_number_of_parameters():
    model = BigramLanguageModel(ModelConfig(vocab_size=65))
    assert sum(parameter.numel() for parameter in model.parameters()) == 209_729


def test_a_new_model_knows_nothing_yet():
    torch.manual_seed(0)
    model = BigramLanguageModel(ModelConfig(vocab_size=65))
    idx = random_tokens(model, 8, 32)

    loss = model(idx, random_tokens(model, 8, 32, seed=2))[1]

    assert loss.item() == pytest.approx(torch.tensor(65.0).log().item(), abs=0.05)


def test_dropout_is_active_only_in_training():
    model, plain = build(dropout=0.5), build(dropout=0.0)
    idx = random_tokens(model, 2, 8)

    assert torch.equal(model(idx)[0], plain(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], plain(idx)[0])


@pytest.mark.parametrize("dropped", ["sa.dropout", "ffwd.net.3"])
def test_dropout_follows_attention_and_feed_forward(dropped):
    assert build(dropout=0.5).blocks[0].get_submodule(dropped).p == 0.5


# --- without a config ---------------------------------------------------------------------------------


@pytest.fixture
def module_globals(monkeypatch):
    for name in field_names(ModelConfig):
        monkeypatch.setattr(model_module, name, getattr(model_module, name))


def test_a_model_without_a_config_reads_the_globals_of_its_module(module_globals):
    config = ModelConfig(**SIZES[1], dropout=0.5)

    config.apply_to_model_module(model_module)
    model = BigramLanguageModel()

    assert model.config == config
    assert model(torch.zeros(2, 5, dtype=torch.int64))[0].shape == (2, 5, 30)
    assert len(model.blocks) == 2 and len(model.blocks[0].sa.heads) == 3


# --- generation ---------------------------------------------------------------------------------------


def recomputed(model, idx: torch.Tensor, n: int, choose) -> torch.Tensor:
    """Continue idx without a cache; past block_size the older half of a full context is dropped."""
    size = model.config.block_size
    context = idx[:, -size:]
    for _ in range(n):
        logits = model(context)[0][:, -1]
        token = choose(logits)[:, None]
        idx = torch.cat([idx, token], dim=1)
        full = context.shape[1] == size
        context = torch.cat([context, token], dim=1)
        if full:
            context = context[:, -max(1, size // 2) :]
    return idx


def likeliest(logits):
    return logits.argmax(-1)


@pytest.mark.parametrize("sizes", [SIZES[1], *OPTIONS])
@torch.no_grad()
def test_the_cache_gives_the_logits_of_full_recomputation(sizes):
    model = build(spread=0.5, **sizes)
    idx = random_tokens(model, 2, 5)
    cache = KeyValueCache(model.config, 2, model.lm_head.weight)

    pieces = [
        model(idx[:, :2], cache=cache)[0],
        *(model(idx[:, t : t + 1], cache=cache)[0] for t in (2, 3, 4)),
    ]

    assert cache.length == 5
    assert torch.allclose(torch.cat(pieces, dim=1), model(idx)[0], atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES + OPTIONS)
@torch.no_grad()
def test_the_tokens_are_those_of_recomputation_and_past_block_size_the_older_half_is_dropped(sizes):
    model = build(spread=0.5, **sizes)
    size = sizes["block_size"]
    for T in {1, max(1, size - 1), size, size + 1, 2 * size + 3}:
        idx = random_tokens(model, 1 + T % 3, T)

        continued = model.generate(idx, 3 * size + 2, temperature=0)

        assert torch.equal(continued, recomputed(model, idx, 3 * size + 2, likeliest))


def decode(
    model: BigramLanguageModel, idx: torch.Tensor, read: int, dtype: type = np.float32
) -> list[np.ndarray]:
    """The logits of a decoder that reads a text in one piece of `read` characters, then one by one."""
    decoder = Decoder(model.config, {n: tensor.numpy() for n, tensor in model.state_dict().items()}, dtype)
    decoder.start(len(idx))
    pieces = [idx[:, :read], *(idx[:, t : t + 1] for t in range(read, idx.shape[1]))]
    logits = [decoder.logits(piece.numpy()) for piece in pieces]
    assert decoder.length == idx.shape[1]
    return logits


@pytest.mark.parametrize("sizes", SIZES + OPTIONS)
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("spread", [0.02, 0.2, 0.6])  # of 0.6 some attention scores are beyond 100
@torch.no_grad()
def test_the_decoder_gives_the_logits_of_the_model(sizes, B, spread):
    """In float32 to 1e-5; in double precision nearly exactly, where no angle is rounded to float32."""
    model = build(spread=spread, **sizes)
    size = sizes["block_size"]
    idx = random_tokens(model, B, size)
    single, double = model(idx)[0].numpy(), model.double()(idx)[0].numpy()
    exact = 1e-6 if "positions" in sizes or "qk_norm" in sizes else 1e-12
    for read in {1, size // 2 or 1, size}:
        for dtype, expected, tolerance in ((np.float32, single, 1e-5), (np.float64, double, exact)):
            model = model.to(torch.float32 if dtype is np.float32 else torch.float64)

            logits = decode(model, idx, read, dtype)

            for t, row in zip(range(read - 1, size), logits, strict=True):
                assert row.dtype == dtype
                assert np.abs(row - expected[:, t]).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("sizes", [SIZES[2], SIZES[4]])
@pytest.mark.parametrize("sign", [1, -1])
@torch.no_grad()
def test_attention_scores_beyond_the_range_of_exp_do_not_overflow(sizes, sign):
    """All scores are large, or all far below zero: the input of the attention has the mean 3."""
    model = build(spread=0.05, **sizes)
    for block in model.blocks:
        block.ln1.bias += 3
        q, k, _ = block.sa.qkv.weight.chunk(3)
        q += 0.3
        k += 0.3 * sign
    idx = random_tokens(model, 2, sizes["block_size"])
    expected = model(idx)[0][:, -1].numpy()

    for read in (2, sizes["block_size"]):
        logits = decode(model, idx, read)[-1]
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@torch.no_grad()
def test_the_cached_forward_gives_the_logits_of_the_model(dtype):
    model = build(spread=0.2).to(dtype)
    idx = random_tokens(model, 2, 5)
    decoder = CachedForward(model)
    decoder.start(2)
    decoder.logits(idx[:, :4].numpy())

    logits = decoder.logits(idx[:, 4:].numpy())

    assert logits.dtype == (np.float64 if dtype is torch.float64 else np.float32) and decoder.length == 5
    expected = model(idx)[0][:, -1].double().numpy()
    assert np.abs(logits - expected).max() < (0.1 if dtype is torch.bfloat16 else 1e-5)


# What the version before the decoder in numpy drew from the same seed: options, B, sampling -> token + 48.
DRAWN_BEFORE = {
    (0, 1, (1.0, None, None)): ["T^2TTT2T^^^T^:^TeTTaT^^2TT[TTTT^T[2TTTTT"],
    (1, 1, (0.8, 5, None)): ["@5C57GKKKG76HGGK5>GGGKFF7G2HCK5K<>C<GK;C"],
    (2, 2, (1.3, None, 0.8)): [
        "@@3D39@@@=@@@9D=@@=@@D@D9@M@@=@@D@D@@MD@",
        "D9M99=9@@3@=@@@9@@@=9==MMM@@9@@@D@M@@@@@",
    ],
    (3, 2, (0.7, 8, 0.9)): [
        "3333337733373333773737377337737377333373",
        "7377377777377373773737777777783737737373",
    ],
}


@pytest.mark.parametrize(("i", "B", "arguments"), DRAWN_BEFORE)
def test_the_same_state_draws_what_earlier_versions_drew(i, B, arguments):
    model = build(**[SIZES[4], *OPTIONS][i])
    idx = random_tokens(model, B, 3)

    text = model.generate(idx, 40, *arguments, generator=torch.Generator().manual_seed(7))

    drawn = ["".join(chr(48 + token) for token in row) for row in text[:, 3:].tolist()]
    assert drawn == DRAWN_BEFORE[i, B, arguments]


@pytest.mark.parametrize("sizes", [SIZES[3], *OPTIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("B", [1, 4])
@torch.no_grad()
def test_what_is_drawn_is_what_full_recomputation_draws(sizes, dtype, B):
    model = build(spread=0.5, **sizes).to(dtype)
    idx, generators = random_tokens(model, B, 3), [torch.Generator().manual_seed(5) for _ in range(2)]

    text = model.generate(idx, 40, 0.8, 20, 0.9, generators[0])

    def draw(probs):
        return torch.multinomial(torch.from_numpy(probs), 1, generator=generators[1])[:, 0].numpy()

    def next_token(logits):
        return torch.from_numpy(Sampling(0.8, 20, 0.9).next_token(logits.numpy(), draw))

    assert torch.equal(text, recomputed(model, idx, 40, next_token))


def change(model: BigramLanguageModel) -> None:
    """What an optimizer does: every parameter moves, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)))


@pytest.mark.parametrize("how", ["in place", "other tensors", "loaded"])
def test_a_model_that_changed_between_two_texts_draws_with_its_new_weights(tmp_path, how):
    model, other = build(spread=0.5), build(spread=0.5)
    change(other)
    idx = random_tokens(model, 2, 3)
    before = model.generate(idx, 30, temperature=0)

    if how == "in place":
        change(model)
    elif how == "other tensors":
        model.load_state_dict(other.state_dict(), assign=True)
    else:
        other.save_safetensors(tmp_path / "other.safetensors")
        model.load_safetensors(tmp_path / "other.safetensors")

    after = model.generate(idx, 30, temperature=0)
    assert not torch.equal(after, before)
    assert torch.equal(after, recomputed(other, idx, 30, likeliest))


def test_texts_that_are_drawn_by_turns_are_those_drawn_alone():
    model = build(spread=0.5)
    starts = [random_tokens(model, 1, 3, seed) for seed in (1, 2)]

    def stream(i):
        return model.generate_stream(starts[i], 30, generator=torch.Generator().manual_seed(i))

    alone = [torch.cat(list(stream(i))) for i in range(2)]
    by_turns = zip(*zip(stream(0), stream(1), strict=True), strict=True)

    assert all(torch.equal(torch.cat(one), other) for one, other in zip(by_turns, alone, strict=True))


@pytest.mark.parametrize("token", [-1, 1000])
def test_a_token_outside_the_vocabulary_is_an_error(token):
    with pytest.raises(IndexError):
        build().generate(torch.tensor([[token]]), 2)


def test_a_file_with_null_as_its_metadata_is_one_of_another_program(tmp_path):
    path = tmp_path / "null.safetensors"
    header = b'{"__metadata__":null}   '
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(Alg1Error, match=r"no token_embedding_table\.weight in it; it is empty"):
        build().load_safetensors(path)


def test_what_was_drawn_can_be_trained_on():
    model = build()
    text = model.generate(random_tokens(model, 2, 3), 5)

    model(text[:, :-1], text[:, 1:])[1].backward()

    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_under_autocast_the_model_itself_computes_the_logits(monkeypatch):
    model, seen = build(spread=0.2), []
    idx = random_tokens(model, 2, 4)
    monkeypatch.setattr(
        Sampling, "next_token", lambda _, logits, draw: seen.append(logits) or logits.argmax(axis=-1)
    )
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(idx, 1)
        expected = model(idx)[0][:, -1].float().numpy()
    assert np.array_equal(seen[0], expected)


@pytest.mark.parametrize("failing", [False, True])
def test_the_decoder_uses_one_thread_and_leaves_their_number_as_it_was(monkeypatch, failing):
    functions = blas_module.thread_functions()
    if functions is None:
        pytest.skip("numpy comes without OpenBLAS")
    get, set_threads = functions
    before, counts = get(), []
    set_threads(2)
    run_blocks = Decoder._run_blocks

    def run(*arguments):
        counts.append(get())
        if failing:
            raise MemoryError
        return run_blocks(*arguments)

    monkeypatch.setattr(Decoder, "_run_blocks", run)
    model = build()
    with pytest.raises(MemoryError) if failing else contextlib.nullcontext():
        for _ in model.generate_stream(random_tokens(model, 1, 3), 3):
            assert get() == 2

    assert get() == 2 and set(counts) == {1}
    set_threads(before)


def test_the_stream_yields_what_generate_returns():
    model = build()
    idx = random_tokens(model, 3, 2)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]

    whole = model.generate(idx, 20, 0.9, 5, 0.95, generators[0])
    tokens = list(model.generate_stream(idx, 20, 0.9, 5, 0.95, generators[1]))

    assert all(token.shape == (3,) and token.dtype == torch.int64 for token in tokens)
    assert torch.equal(torch.cat([idx, torch.stack(tokens, dim=1)], dim=1), whole)
    assert torch.equal(model.generate(idx, 0), idx)


def plain_probabilities(logits, temperature, top_k, top_p) -> list[float]:
    """What each token is drawn with: temperature, then the k likeliest, then the fewest that reach p."""
    scaled = [logit / temperature for logit in logits]
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    kept = order[:top_k]
    powers = {token: 2.718281828459045 ** (scaled[token] - scaled[order[0]]) for token in kept}
    total = sum(powers.values())
    reached, nucleus = 0.0, []
    for token in kept:
        if top_p is not None and reached >= top_p:
            break
        nucleus.append(token)
        reached += powers[token] / total
    total = sum(powers[token] for token in nucleus)
    return [powers[token] / total if token in nucleus else 0.0 for token in range(len(logits))]


LOGITS = [0.5, 2.0, -1.0, 1.5, 0.0, -30.0]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, None),
        (0.5, None, None),
        (3.0, None, None),
        (1.0, 1, None),
        (1.0, 3, None),
        (1.0, 100, None),
        (1.0, None, 0.3),
        (1.0, None, 0.6),
        (1.0, None, 0.9),
        (1.0, None, 1.0),
        (2.0, 4, 0.7),
        (1e-50, None, None),
        (1e-5, None, 0.5),
    ],
)
def test_tokens_are_drawn_with_the_plain_probabilities(temperature, top_k, top_p):
    n = 40_000
    rows = np.tile(np.float32(LOGITS), (n, 1))

    tokens = Sampling(temperature, top_k, top_p).next_token(rows, draw_with([random.Random(1)] * n))

    shares = torch.bincount(torch.from_numpy(tokens), minlength=len(LOGITS)) / n
    if temperature < 1e-3:
        expected = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    else:
        expected = torch.tensor(plain_probabilities(LOGITS, temperature, top_k, top_p))
    assert torch.equal(shares[expected < 1e-9], torch.zeros(int((expected < 1e-9).sum())))
    assert torch.allclose(shares, expected, atol=0.012)


def only_head(row: torch.Tensor) -> BigramLanguageModel:
    """A model that gives the same logits after every text."""
    model = build(vocab_size=len(row))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(row)
    return model


@pytest.mark.parametrize("B", [1, 3])
def test_the_same_state_draws_what_torch_multinomial_draws(B):
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    for seed in range(50):
        logits = torch.randn(65, generator=torch.Generator().manual_seed(seed)) * 3
        probs = logits.softmax(-1).expand(B, -1)
        expected = torch.multinomial(probs, 1, generator=generators[0])[:, 0]

        drawn = only_head(logits).generate(torch.zeros(B, 1, dtype=torch.int64), 1, generator=generators[1])

        assert torch.equal(drawn[:, 1], expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"positions": "rotary", "qk_norm": True}])
def test_on_a_gpu_the_same_state_draws_what_torch_multinomial_draws(options):
    model = build(spread=0.2, **options).cuda()
    idx = random_tokens(model, 3, 4).cuda()
    generators = [torch.Generator("cuda").manual_seed(3) for _ in range(2)]

    text = model.generate(idx, 4, generator=generators[0])

    for _ in range(4):
        probs = model(idx)[0][:, -1].softmax(-1)
        idx = torch.cat([idx, torch.multinomial(probs, 1, generator=generators[1])], dim=1)
    assert text.device == idx.device and torch.equal(text, idx)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_from_logits_that_are_not_finite_nothing_is_drawn(value, temperature):
    logits = np.zeros((3, 5), np.float32)
    logits[1, 2] = value

    with pytest.raises(RuntimeError, match="the model's logits are not finite"):
        Sampling(temperature).probabilities(logits)


@pytest.mark.parametrize("arguments", [{"temperature": 0}, {"top_p": 0.5}, {"top_k": 1}])
def test_rows_are_drawn_by_their_own_logits(arguments):
    logits = np.full((4, 6), -100.0)
    logits[range(4), [3, 0, 5, 2]] = 0.0

    tokens = Sampling(**arguments).next_token(logits, draw_with([random.Random(i) for i in range(4)]))

    assert tokens.tolist() == [3, 0, 5, 2]


def test_a_row_is_drawn_with_its_own_generator():
    probs = np.ones((3, 1000))
    alone = [draw_with([random.Random(seed)])(probs[:1])[0] for seed in (1, 2, 3)]

    assert draw_with([random.Random(seed) for seed in (1, 2, 3)])(probs).tolist() == alone
    assert len(set(alone)) == 3


def test_the_generator_alone_decides_the_text():
    model = build()
    idx = random_tokens(model, 2, 2)

    def text(seed, global_seed):
        torch.manual_seed(global_seed)
        return model.generate(idx, 30, generator=torch.Generator().manual_seed(seed)).tolist()

    assert text(1, 2) == text(1, 3)
    assert text(1, 2) != text(4, 2)


def script_tokens(monkeypatch, rows):
    tokens = map(np.array, zip(*rows, strict=True))
    monkeypatch.setattr(Sampling, "next_token", lambda *_: next(tokens))


@pytest.mark.parametrize(
    ("rows", "stop", "drawn"),
    [
        ([[5, 1, 2, 3, 4]], [1, 2], 3),
        ([[5, 1, 2, 3, 4]], [2, 1], 5),
        ([[5, 1, 2, 3, 4]], [5], 1),
        ([[5, 1, 2, 3, 4]], [], 5),
        ([[5, 1, 2, 3, 4]], None, 5),
        ([[1, 1, 2, 3, 4]], [1, 2], 3),
        ([[2, 3, 4, 5, 5]], [1, 2], 5),  # the 1 would be the prompt's last
        ([[1, 2, 5, 5, 5], [5, 5, 1, 2, 5]], [1, 2], 4),
        ([[1, 2, 5, 5, 5], [5, 5, 5, 5, 5]], [1, 2], 5),
    ],
)
def test_stop_ends_the_text_once_every_row_has_drawn_it(monkeypatch, rows, stop, drawn):
    script_tokens(monkeypatch, rows)
    prompt = torch.ones(len(rows), 1, dtype=torch.int64)

    tokens = build().generate(prompt, 5, stop=stop)

    assert tokens[:, 1:].tolist() == [row[:drawn] for row in rows]


@pytest.mark.parametrize("training", [True, False])
def test_generation_is_without_dropout_and_leaves_the_mode_as_it_was(training):
    model = build(dropout=0.5).train(training)
    idx = random_tokens(model, 1, 3)

    texts = {tuple(model.generate(idx, 12, temperature=0)[0].tolist()) for _ in range(5)}

    stream = model.generate_stream(idx, 12)
    next(stream)
    stream.close()

    assert len(texts) == 1
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_generation_keeps_no_graph_and_leaves_gradients_on(dtype):
    model = build().to(dtype)

    for token in model.generate_stream(random_tokens(model, 1, 3), 3):
        assert torch.is_grad_enabled() and not token.is_inference()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.1, None, None), "temperature = -0.1 must be 0 or above"),
        ((float("inf"), None, None), "temperature = inf must be 0 or above"),
        ((float("nan"), None, None), "temperature = nan must be 0 or above"),
        ((1.0, 0, None), "top_k = 0 must be above 0"),
        ((1.0, None, 0.0), "top_p = 0.0 must be above 0 and at most 1"),
        ((1.0, None, 1.1), "top_p = 1.1 must be above 0 and at most 1"),
    ],
)
def test_sampling_arguments_out_of_range_are_refused(arguments, message):
    model = build()
    with pytest.raises(ValueError) as raised:
        Sampling(*arguments)
    assert str(raised.value) == message
    with pytest.raises(ValueError):
        model.generate(random_tokens(model, 1, 1), 1, *arguments)
    with pytest.raises(ValueError, match="idx must hold at least one token"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64), 1)


# --- options ------------------------------------------------------------------------------------------


def test_rotary_products_depend_on_the_distance_alone():
    """One character everywhere: only its positions can tell the places apart."""
    config = ModelConfig(**SMALL, positions="rotary")
    x = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    q, k = (row.expand(8, 8) for row in x[:, 0])  # (T, S)
    cos_sin = rotary_cos_sin(config, 0, 8, torch.device("cpu"))
    later = rotary_cos_sin(config, 5, 13, torch.device("cpu"))

    products = apply_rotary(q, cos_sin) @ apply_rotary(k, cos_sin).T

    for distance in range(-7, 8):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1], atol=1e-6)
    assert len({round(float(products[7, t]), 4) for t in range(8)}) == 8
    assert torch.allclose(products, apply_rotary(q, later) @ apply_rotary(k, later).T, atol=1e-6)
    assert torch.equal(apply_rotary(x, cos_sin)[:, 0], x[:, 0]), "the first one stays as it is"
    assert torch.allclose(apply_rotary(x, cos_sin).norm(dim=-1), x.norm(dim=-1))


def test_zero_init_changes_two_matrices_of_a_block_and_nothing_else():
    models = []
    for zero_init in (False, True):
        torch.manual_seed(1)
        models.append(BigramLanguageModel(ModelConfig(**SMALL, zero_init=zero_init)).state_dict())
    plain, zero = models
    changed = {name for name in plain if not torch.equal(plain[name], zero[name])}
    assert changed == {"blocks.0.sa.proj.weight", "blocks.0.ffwd.net.2.weight"}
    assert all(not zero[name].any() for name in changed)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_file_with_options_keeps_them_and_comes_back(tmp_path, options):
    model = build(**options)
    path, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    model.save_safetensors(path)
    told = {name: value for name, value in options.items() if name in MODEL_OPTIONS}
    stored = read_tensors(path)[1]["model"]

    loaded = BigramLanguageModel().load_safetensors(path)
    loaded.save_safetensors(again)

    assert {name: stored[name] for name in stored if name in MODEL_OPTIONS} == told
    assert "position_embedding_table.weight" not in load_file(path) or "positions" not in told
    assert_same(snapshot(loaded), snapshot(model))
    assert again.read_bytes() == path.read_bytes()
    idx = random_tokens(model, 2, 5)
    assert torch.equal(loaded.eval()(idx)[0], model(idx)[0])


def test_options_that_a_file_names_at_their_defaults_are_the_reference_model(exported):
    model, path = exported
    tensors, metadata = read_tensors(path)
    metadata["model"] |= MODEL_OPTIONS
    write_tensors(path, tensors, metadata)
    assert BigramLanguageModel().load_safetensors(path).config == model.config


ROTARY = {**OPTIONS[2], "dropout": 0.0}


@pytest.mark.parametrize(
    ("stored", "complaint"),
    [
        ({**ROTARY, "positions": "learned"}, "there is no position_embedding_table.weight in it"),
        ({**ROTARY, "positions": ["rotary"]}, "there is no position_embedding_table.weight in it"),
        (None, "there is no position_embedding_table.weight in it"),
        ({**ROTARY, "block_size": None}, "block_size = null must be a whole number"),
        ({**ROTARY, "block_size": 0}, "block_size = 0 must be above 0"),
        ({**ROTARY, "qk_norm": 1}, "qk_norm = 1 must be true or false"),
        ({**ROTARY, "n_layer": 2}, "its sizes and its tensors do not agree"),
        ({**ROTARY, "relu": "squared"}, "its sizes and its tensors do not agree"),
        (ROTARY, "position_embedding_table.weight is unknown"),
    ],
)
def test_a_rotary_file_whose_parts_do_not_fit_is_refused(tmp_path, stored, complaint):
    path = tmp_path / "model.safetensors"
    build(**ROTARY).save_safetensors(path)
    tensors, metadata = read_tensors(path)
    if stored is ROTARY:
        tensors["position_embedding_table.weight"] = torch.zeros(8, 16)
    write_tensors(path, tensors, metadata | {"model": stored})

    assert_refused(path, complaint)


# --- files: what is written ---------------------------------------------------------------------------


def layout(n_embd, n_head, n_layer, block_size, vocab_size) -> dict[str, list[int]]:
    shapes = {
        "token_embedding_table.weight": [vocab_size, n_embd],
        "position_embedding_table.weight": [block_size, n_embd],
        "ln_f.weight": [n_embd],
        "ln_f.bias": [n_embd],
        "lm_head.weight": [vocab_size, n_embd],
        "lm_head.bias": [vocab_size],
    }
    for i in range(n_layer):
        for h in range(n_head):
            for part in ("key", "query", "value"):
                shapes[f"blocks.{i}.sa.heads.{h}.{part}.weight"] = [n_embd // n_head, n_embd]
        shapes |= {
            f"blocks.{i}.sa.proj.weight": [n_embd, n_embd],
            f"blocks.{i}.sa.proj.bias": [n_embd],
            f"blocks.{i}.ffwd.net.0.weight": [4 * n_embd, n_embd],
            f"blocks.{i}.ffwd.net.0.bias": [4 * n_embd],
            f"blocks.{i}.ffwd.net.2.weight": [n_embd, 4 * n_embd],
            f"blocks.{i}.ffwd.net.2.bias": [n_embd],
        }
        for part in ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias"):
            shapes[f"blocks.{i}.{part}"] = [n_embd]
    return shapes


@pytest.mark.parametrize("sizes", SIZES[:2])
def test_the_file_has_exactly_the_layout_of_the_lecture(tmp_path, sizes):
    path = tmp_path / "model.safetensors"
    build(**sizes).save_safetensors(path)

    with safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        types = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118

    assert shapes == layout(**sizes)
    assert types == {"F32"}


def test_the_file_describes_itself_in_one_string(exported):
    model, path = exported
    with safe_open(path, framework="pt") as file:
        strings = file.metadata()

    assert list(strings) == ["alg1"]
    about = json.loads(strings["alg1"])
    assert about["metadata"] == {
        "format": "alg1-model",
        "format_version": 1,
        "model": {**SMALL, "dropout": 0.25},
        "vocabulary": model.vocabulary,
        "provenance": {"run_id": "2026-01-31_001", "val_loss": 1.5},
    }


@pytest.mark.parametrize("receiver", [None, *SIZES[:2]])
def test_save_load_save_gives_the_same_bytes_whatever_the_receivers_sizes(exported, tmp_path, receiver):
    model, path = exported
    other = BigramLanguageModel() if receiver is None else build(**receiver)

    assert other.load_safetensors(path) is other
    other.save_safetensors(tmp_path / "again.safetensors")

    assert_same(snapshot(other), snapshot(model))
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    idx = random_tokens(model, 2, 8)
    assert torch.equal(other.eval()(idx)[0], model(idx)[0])


@pytest.mark.parametrize("sizes", SIZES + OPTIONS)
def test_the_shapes_by_which_a_file_is_checked_are_those_of_the_model(sizes):
    model = build(**sizes)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    assert model_shapes(model.config) == shapes
    assert sum(map(math.prod, shapes.values())) == model.config.n_parameters


def test_loading_starts_no_compiler(exported):
    """A computation on PyTorch's meta device would import it, which takes a second."""
    script = (
        "import sys; from model import BigramLanguageModel;"
        f"BigramLanguageModel().load_safetensors({str(exported[1])!r}); print('torch._dynamo' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)

    assert (done.stdout, done.stderr) == ("False\n", "")


def test_save_load_save_in_a_fresh_process(exported, tmp_path):
    _, path = exported
    script = (
        "from model import BigramLanguageModel; m = BigramLanguageModel();"
        "m.load_safetensors('model.safetensors'); m.eval(); m.save_safetensors('again.safetensors')"
    )

    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_the_bytes_of_a_file_depend_on_nothing_but_the_model(tmp_path):
    provenance = {"words": "é, \ud800", "more": [None, 0.1], "a": {"z": 1}}
    for name, pairs in (("one", provenance.items()), ("two", reversed(provenance.items()))):
        model = build()
        model.provenance = dict(pairs)
        model.save_safetensors(tmp_path / name)

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_bytes_of_a_file_are_those_of_safetensors(tmp_path):
    from safetensors.numpy import load_file, save

    tensors = {
        "é.b": torch.randn(2, 3),
        'a "b"\n': torch.zeros(()),
        "B": torch.randn(4, 4).t(),
        "empty": torch.zeros(0),
    }
    write_tensors(tmp_path / "file", tensors, {"characters": 'é\n\ud800"'})

    with safe_open(tmp_path / "file", "numpy") as file:
        metadata = file.metadata()
    assert (tmp_path / "file").read_bytes() == save(load_file(tmp_path / "file"), metadata)
    torch.testing.assert_close(read_tensors(tmp_path / "file")[0], tensors, rtol=0, atol=0)
    with pytest.raises(AssertionError, match="a is float64"):
        write_tensors(tmp_path / "file", {"a": torch.zeros(1).double()}, {})


@pytest.mark.parametrize("training", [True, False])
def test_loading_keeps_the_mode_of_the_model(exported, training):
    _, path = exported
    other = build(**SIZES[1]).train(training)

    other.load_safetensors(path)

    assert all(module.training == training for module in other.modules())


def test_a_file_that_cannot_be_written_leaves_the_old_one(exported, monkeypatch):
    _, path = exported
    before = path.read_bytes()

    def refuse(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(Alg1Error) as raised:
        build(seed=9).save_safetensors(path)

    assert raised.value.exit_code == 4
    assert raised.value.message == f"cannot write {path}: {os.strerror(28)}"
    assert os.listdir(path.parent) == [path.name] and path.read_bytes() == before


# --- files: of other programs -------------------------------------------------------------------------


def write_reference(path, model, dtype=torch.float32, tril=True):
    """What the lecture's own program writes: no metadata, and a mask in every head."""
    model.save_safetensors(path)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    size = model.config.block_size
    if tril:
        for i in range(model.config.n_layer):
            for h in range(model.config.n_head):
                tensors[f"blocks.{i}.sa.heads.{h}.tril"] = torch.tril(torch.ones(size, size))
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("sizes", "dtype"), [(SMALL, torch.bfloat16), (SIZES[1], torch.float16), (SIZES[2], torch.float32)]
)
def test_a_file_without_our_metadata_has_its_sizes_read_from_its_shapes(tmp_path, sizes, dtype):
    model = build(**sizes)
    path = tmp_path / "reference.safetensors"
    write_reference(path, model, dtype)

    loaded = BigramLanguageModel().load_safetensors(path)

    assert loaded.config == model.config
    assert loaded.vocabulary is None and loaded.provenance == {}
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype).float())


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_number_of_a_small_type_is_read_exactly(tmp_path, dtype):
    numbers = torch.arange(-300, 300).to(dtype).reshape(2, 300)
    save_file({"a": numbers, "b": torch.zeros((), dtype=dtype)}, tmp_path / "file")

    arrays, metadata = read_arrays(tmp_path / "file")

    assert metadata is None and arrays["b"].shape == ()
    assert np.array_equal(arrays["a"], numbers.double().numpy())


def test_numbers_that_are_not_aligned_in_the_file_are_read(tmp_path):
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    text = json.dumps(header).encode()
    for padding in range(4):
        padded = text + b" " * padding
        (tmp_path / "file").write_bytes(len(padded).to_bytes(8, "little") + padded + numbers.tobytes())

        arrays, _ = read_arrays(tmp_path / "file")

        assert (
            np.array_equal(arrays["a"], numbers) and arrays["a"].flags.aligned and arrays["a"].flags.writeable
        )


def test_its_vocabulary_is_given_and_travels_with_the_export(tmp_path):
    path = tmp_path / "reference.safetensors"
    write_reference(path, build())
    for wrong in ("abc", "", "bacdefghijk", "aacdefghijk"):
        assert_refused(path, "its vocabulary must be 11 characters, sorted and each once", wrong)

    BigramLanguageModel().load_safetensors(path, VOCABULARY).save_safetensors(path)

    assert BigramLanguageModel().load_safetensors(path).vocabulary == VOCABULARY


# --- files: what is refused ---------------------------------------------------------------------------


def assert_refused(path, complaint, vocabulary=None):
    """Loading names the file and the fault, and changes nothing of the model."""
    receiver = build(seed=5, **SIZES[1])
    receiver.vocabulary, receiver.provenance = ["a"], {"b": 1}
    before = snapshot(receiver)

    with pytest.raises(Alg1Error) as raised:
        receiver.load_safetensors(path, vocabulary)

    assert raised.value.message.startswith(f"{path}: ") and complaint in raised.value.message
    assert raised.value.exit_code == 2
    assert_same(snapshot(receiver), before)


@pytest.mark.parametrize(
    ("name", "tensor", "complaint"),
    [
        ("ln_f.bias", None, "ln_f.bias is missing"),
        ("blocks.0.sa.heads.1.value.weight", None, "blocks.0.sa.heads.1.value.weight is missing"),
        ("blocks.0.sa.heads.0.key.weight", None, "blocks.0.sa.heads.0.key.weight is missing"),
        ("extra", torch.zeros(1), "extra is unknown"),
        ("blocks.1.ln2.weight", torch.zeros(16), "blocks.1.ln2.weight is unknown"),
        ("token_embedding_table.weight", None, "there is no token_embedding_table.weight in it"),
        ("position_embedding_table.weight", torch.zeros(16), "has the shape (16,), and is no matrix"),
        ("position_embedding_table.weight", torch.zeros(()), "has the shape (), and is no matrix"),
        ("position_embedding_table.weight", torch.zeros(0, 16), "block_size = 0 must be above 0"),
        ("position_embedding_table.weight", torch.zeros(8, 15), "has the shape (8, 15), not (8, 16)"),
        ("lm_head.bias", torch.zeros(12), "lm_head.bias has the shape (12,), not (11,)"),
        ("lm_head.bias", torch.zeros(11, dtype=torch.int64), "lm_head.bias holds torch.int64"),
        ("blocks.0.sa.heads.2.key.weight", torch.zeros(8, 16), "must be divisible by n_head = 3"),
        ("blocks.0.ln1.weight", None, "n_layer = 0 must be above 0"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(tmp_path, name, tensor, complaint):
    path = tmp_path / "reference.safetensors"
    write_reference(path, build(), tril=False)
    tensors = load_file(path) | {name: tensor}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)

    assert_refused(path, complaint)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": {**SMALL, "dropout": 0.25, "n_head": 4}}, "its sizes and its tensors do not agree"),
        ({"model": {**SMALL, "dropout": 0.25, "rotary": True}}, "its sizes and its tensors do not agree"),
        ({"model": "small"}, "its sizes and its tensors do not agree"),
        ({"vocabulary": ["a", "b"]}, "its vocabulary must be 11 characters"),
        ({"vocabulary": list("zabcdefghij")}, "its vocabulary must be 11 characters"),
        ({"format": "alg1-checkpoint"}, "this is 'alg1-checkpoint', not an exported model"),
        ({"format_version": 2}, "format version 2 is not known"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(exported, changes, complaint):
    _, path = exported
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, metadata | changes)

    assert_refused(path, complaint)


def test_what_is_not_there_or_not_a_file_is_named(tmp_path):
    assert_refused(tmp_path / "nothing", "no such file")
    assert_refused(tmp_path, "this is a folder, not a file of weights")


def fails_to_load(path) -> bool:
    """Whether the file is refused; if it is not, it must hold exactly the tensors it was written with."""
    model = BigramLanguageModel()
    try:
        model.load_safetensors(path)
    except Alg1Error as error:
        assert error.message.startswith(f"{path}: ")
        return True
    original = build(dropout=0.25).state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
    assert model.vocabulary in (None, VOCABULARY)
    return False


def test_a_truncated_file_is_refused_wherever_it_ends(exported):
    _, path = exported
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    ends = {*range(0, 20, 3), *range(20, header, 397), header - 1, header, header + 1, len(content) - 1}
    for end in ends | {*range(header, len(content), len(content) // 10)}:
        path.write_bytes(content[:end])

        assert fails_to_load(path), f"cut at byte {end}"


def flip(content: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


def test_a_flipped_bit_in_the_weights_is_always_refused(exported):
    _, path = exported
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    choice = random.Random(1)
    for position in {header, len(content) - 1, *choice.sample(range(header, len(content)), 60)}:
        path.write_bytes(flip(content, position, choice.randrange(8)))

        assert fails_to_load(path), f"byte {position}"


def test_a_flipped_bit_in_the_header_is_refused_or_does_no_harm(exported):
    _, path = exported
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    choice = random.Random(2)
    harmless = 0
    for position in range(0, header, 5):
        path.write_bytes(flip(content, position, choice.randrange(8)))

        harmless += not fails_to_load(path)

    assert harmless < header / 500


def test_bytes_after_the_end_are_refused(exported):
    _, path = exported
    path.write_bytes(path.read_bytes() + b"\0")
    assert fails_to_load(path)
