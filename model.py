"""The network: a decoder-only transformer over characters.

Shapes are noted beside the tensors, in these letters:
    B batch, T time (characters), C = n_embd, H = n_head, S = C / H (size of a head), V = vocab_size

In memory the queries, keys and values of all heads of a block are one matrix, which is faster. On disk each
head has three matrices of its own, the layout of the lecture that this architecture comes from;
`save_safetensors` and `load_safetensors` convert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parameters import ModelConfig
from utils_alg1.base.settings import field_names
from utils_alg1.network.cache import CachedForward, KeyValueCache, eval_mode
from utils_alg1.network.decoder import Decoder
from utils_alg1.network.rotary import apply_qk_norm_and_rotary, rotary_cos_sin
from utils_alg1.network.sampling import LogitsDecoder, Sampling, generate_tokens
from utils_alg1.network.tensor_file import read_arrays, write_tensors
from utils_alg1.network.weights import Weights, split_heads, weights_metadata, weights_of_export

INIT_STD = 0.02  # standard deviation of the initial weights
PER_CHARACTER = ("token_embedding_table.weight", "lm_head.weight", "lm_head.bias")  # a row for each

# What `BigramLanguageModel()` without a config is built from; see ModelConfig.apply_to_model_module.
n_embd = ModelConfig.n_embd
n_head = ModelConfig.n_head
n_layer = ModelConfig.n_layer
block_size = ModelConfig.block_size
dropout = ModelConfig.dropout
vocab_size = ModelConfig.vocab_size
positions = ModelConfig.positions
qk_norm = ModelConfig.qk_norm
zero_init = ModelConfig.zero_init


class Head:
    """One head of a `MultiHeadAttention`, computed as in the textbook.

    It gives the attention weights that plots need, and the reference result for tests of the fused form.

    Attributes:
        query, key, value: its matrices, (S, C) each: views of the fused matrix.
    """

    def __init__(self, attention: MultiHeadAttention, index: int):
        self.config = attention.config
        matrices = attention.qkv.weight.view(3, self.config.n_head, self.config.head_size, self.config.n_embd)
        self.query, self.key, self.value = matrices[:, index]

    def weights(self, x: Tensor) -> Tensor:
        """Compute the attention weights (B, T, T) of x (B, T, C); row t weighs the characters 0 to t."""
        T, qk_norm = x.shape[1], self.config.qk_norm
        cos_sin = rotary_cos_sin(self.config, 0, T, x.device)
        q, k = (apply_qk_norm_and_rotary(F.linear(x, w), qk_norm, cos_sin) for w in (self.query, self.key))
        scores = q @ k.mT * self.config.head_size**-0.5  # (B, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(dim=-1)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, S)."""
        return self.weights(x) @ F.linear(x, self.value)


class MultiHeadAttention(nn.Module):
    """Causal self-attention: all heads in one product, then a projection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def heads(self) -> list[Head]:
        return [Head(self, index) for index in range(self.config.n_head)]

    def forward(
        self, x: Tensor, cache: KeyValueCache | None = None, layer: int = 0, cos_sin: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). With a cache, x continues the characters in it; `layer` is the index there.

        cos_sin: `rotary_cos_sin` of the positions of x.
        """
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.config.n_head, self.config.head_size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, S) each
        q = apply_qk_norm_and_rotary(q, self.config.qk_norm, cos_sin)
        k = apply_qk_norm_and_rotary(k, self.config.qk_norm, cos_sin)
        # A single query attends to the whole cache; several queries come only with an empty cache.
        causal = cache is None or cache.length == 0
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, length + T, S)
        p = self.dropout.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=causal)
        out = out.transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.proj(out))


class FeedFoward(nn.Module):
    """A two-layer MLP applied to each position: C -> 4 C, ReLU, 4 C -> C."""

    def __init__(self, n_embd: int, dropout: float):
        super().__init__()
        up, down = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)
        self.net = nn.Sequential(up, nn.ReLU(), down, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.net(x)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.sa = MultiHeadAttention(config)
        self.ffwd = FeedFoward(config.n_embd, config.dropout)
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)

    def forward(
        self, x: Tensor, cache: KeyValueCache | None = None, layer: int = 0, cos_sin: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.sa(self.ln1(x), cache, layer, cos_sin)
        return x + self.ffwd(self.ln2(x))


class BigramLanguageModel(nn.Module):
    """A character-level GPT. (The name is historical: the lecture begins with a bigram model.)

    Args:
        config: the sizes. Without one, the globals of this module are used; if their vocab_size is None, the
            model stays empty until `load_safetensors` gives it sizes and weights.

    Attributes:
        config: the ModelConfig it was built from.
        vocabulary: the characters by token, or None if unknown; stored in the export.
        provenance: where the weights come from (JSON values); stored in the export.
    """

    def __init__(self, config: ModelConfig | None = None):
        super().__init__()
        self.vocabulary: list[str] | None = None
        self.provenance: dict[str, Any] = {}
        if config is None:
            config = ModelConfig(**{name: globals()[name] for name in field_names(ModelConfig)})
            if config.vocab_size is None:
                self.config = config
                return
        self._build(config)

    def _build(self, config: ModelConfig) -> None:
        config.validate()
        assert config.vocab_size is not None  # validate() has checked that
        self.config = config
        C = config.n_embd
        self.token_embedding_table = nn.Embedding(config.vocab_size, C)
        self.position_embedding_table = None  # none with rotary positions
        if config.positions == "learned":
            self.position_embedding_table = nn.Embedding(config.block_size, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C)
        self.lm_head = nn.Linear(C, config.vocab_size)
        self.apply(_init_weights)
        if config.zero_init:  # every block starts as the identity
            for name, parameter in self.blocks.named_parameters():
                if name.endswith(("sa.proj.weight", "ffwd.net.2.weight")):
                    nn.init.zeros_(parameter)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the next character at every position.

        Args:
            idx: (B, T) int64 tokens, T <= block_size.
            targets: (B, T) int64, the token that follows each of idx, or None.
            cache: holds the characters before idx; idx is added to it. T must be 1, or the cache empty.

        Returns:
            logits (B, T, V), and the mean cross-entropy in nats (a scalar), or None without targets.
        """
        T = idx.shape[1]
        past = cache.length if cache is not None else 0
        assert past + T <= self.config.block_size, "more characters than block_size"
        x = self.token_embedding_table(idx)  # (B, T, C)
        if self.position_embedding_table is not None:
            x = x + self.position_embedding_table.weight[past : past + T]
        cos_sin = rotary_cos_sin(self.config, past, past + T, self.lm_head.weight.device)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer, cos_sin)
        if cache is not None:
            cache.length += T
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        stop: Sequence[int] | None = None,
    ) -> Tensor:
        """Continue each row of idx: (B, T) -> (B, T + n). See `generate_stream` for the arguments."""
        tokens = list(self.generate_stream(idx, max_new_tokens, temperature, top_k, top_p, generator, stop))
        return torch.cat([idx, torch.stack(tokens, dim=1)], dim=1) if tokens else idx.clone()

    def generate_stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        stop: Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """Continue each row of idx, yielding (B,) tokens as they are drawn.

        For a context longer than block_size see `generate_tokens`.

        Args:
            idx: (B, T) int64 tokens, T >= 1.
            max_new_tokens: how many tokens to draw.
            temperature, top_k, top_p: see `Sampling`.
            generator: on the model's device; the same state draws the same text.
            stop: generation ends once every row has drawn this sequence of tokens.

        Raises:
            ValueError: idx is empty, or an argument is out of range.
        """
        sampling = Sampling(temperature, top_k, top_p)
        if idx.shape[1] < 1:
            raise ValueError("idx must hold at least one token")

        def draw(probs: np.ndarray) -> np.ndarray:
            # The draw of torch.multinomial from the same generator state.
            exponential = torch.empty(probs.shape, dtype=torch.from_numpy(probs).dtype, device=idx.device)
            return (probs / exponential.exponential_(generator=generator).cpu().numpy()).argmax(axis=-1)

        with eval_mode(self):
            prompts = idx.cpu().numpy()
            for token in generate_tokens(
                self._decoder(), prompts, max_new_tokens, sampling, draw, stop or ()
            ):
                yield torch.from_numpy(token).to(idx.device)

    def _decoder(self) -> LogitsDecoder:
        """Return what computes the logits of a text on this device."""
        weight = self.lm_head.weight
        plain = weight.dtype is torch.float32 and not torch.is_autocast_enabled(weight.device.type)
        if weight.device.type == "cpu" and plain:
            return Decoder(self.config, {name: tensor.numpy() for name, tensor in self.state_dict().items()})
        return CachedForward(self)

    def start_from(self, other: BigramLanguageModel) -> None:
        """Copy the weights of a model of the same sizes, whose vocabulary may lack characters of this one.

        The rows of these characters stay as they are. The other model may also have no known vocabulary, and
        then has this one.
        """
        weights = other.state_dict()
        if self.vocabulary is not None and other.vocabulary is not None:
            token_of = {character: token for token, character in enumerate(self.vocabulary)}
            tokens = [token_of[character] for character in other.vocabulary]
            for name in PER_CHARACTER:
                rows = self.get_parameter(name).detach().clone()
                rows[tokens] = weights[name]
                weights[name] = rows
        self.load_state_dict(weights)

    def save_safetensors(self, path: str | Path) -> None:
        """Write the weights, sizes, vocabulary and provenance to one file, atomically.

        Raises:
            Alg1Error: the file system refused (exit code 4).
        """
        if self.config.vocab_size is None:
            raise ValueError("this model is empty: give it a config, or load weights first")
        metadata = weights_metadata(self.config, self.vocabulary, self.provenance)
        write_tensors(path, split_heads(self.state_dict(), self.config), metadata)

    def load_safetensors(
        self, path: str | Path, vocabulary: Sequence[str] | None = None
    ) -> BigramLanguageModel:
        """Replace sizes, weights, vocabulary and provenance by those of a file.

        Args:
            path: written by `save_safetensors`, or any safetensors file in the layout of the lecture.
            vocabulary: the characters by token, for a file that does not hold them.

        Returns:
            the model itself, on the CPU.

        Raises:
            Alg1Error: the file is incomplete, damaged, or not of such a model; the model is unchanged.
        """
        tensors, metadata = read_arrays(path)
        return self.load(weights_of_export(tensors, metadata, path, vocabulary))

    def load(self, weights: Weights) -> BigramLanguageModel:
        """Replace sizes, weights, vocabulary and provenance, on the CPU; returns the model itself."""
        self._build(weights.config)
        self.load_state_dict({name: torch.from_numpy(array) for name, array in weights.tensors.items()})
        self.train(self.training)  # the new modules are in training mode, whatever the old ones were in
        self.vocabulary, self.provenance = weights.vocabulary, weights.provenance
        return self


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, mean=0.0, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
