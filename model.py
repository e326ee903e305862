"""The network: a decoder-only transformer over characters.

Shapes are written beside the tensors with these letters:
    B batch, T time (characters), C = n_embd, H = n_head, S = C / H (size of a head), V = vocab_size

On disk the weights have the layout of the lecture that this architecture comes from, one key, query and
value matrix for each head; in memory the heads of a block are one matrix, which is faster. `load_safetensors`
and `save_safetensors` translate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parameters import MODEL_OPTIONS, ModelConfig
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.settings import field_names
from utils_alg1.network.decoder import Decoder, KeyValueCache, check_sampling, next_token
from utils_alg1.network.rotary import rotate, rotations
from utils_alg1.network.tensor_file import read_tensors, write_tensors
from utils_alg1.network.weights import (
    FORMAT,
    FORMAT_VERSION,
    OTHER_WEIGHTS,
    config_from_shapes,
    join_heads,
    split_heads,
)

INIT_STD = 0.02  # of the normal distribution that weights start from

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
    """One head of a `MultiHeadAttention`, in the plain form of the textbook.

    It owns nothing: its weights are rows of the block's fused matrix. It gives the attention weights that
    pictures need, and the result that the fused form must equal.
    """

    def __init__(self, attention: MultiHeadAttention, index: int):
        self.attention = attention
        self.index = index

    def _weight(self, which: int) -> Tensor:
        """Rows of query (0), key (1) or value (2): (S, C)."""
        size, C = self.attention.head_size, self.attention.n_embd
        start = which * C + self.index * size
        return self.attention.qkv.weight[start : start + size]

    @property
    def query(self) -> Tensor:
        return self._weight(0)

    @property
    def key(self) -> Tensor:
        return self._weight(1)

    @property
    def value(self) -> Tensor:
        return self._weight(2)

    def weights(self, x: Tensor) -> Tensor:
        """How much each character attends to each: (B, T, C) -> (B, T, T), rows sum to 1."""
        T = x.shape[1]
        turns = rotations(self.attention.config, 0, T, x.device)
        q, k = (self.attention.compared(F.linear(x, w), turns) for w in (self.query, self.key))  # (B, T, S)
        scores = q @ k.transpose(-2, -1) * self.attention.head_size**-0.5  # (B, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        return scores.masked_fill(future, float("-inf")).softmax(dim=-1)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, S)."""
        return self.weights(x) @ F.linear(x, self.value)


class MultiHeadAttention(nn.Module):
    """Causal self-attention: all heads as one product, then a projection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.n_embd, self.n_head, self.head_size = config.n_embd, config.n_head, config.head_size
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def heads(self) -> list[Head]:
        return [Head(self, index) for index in range(self.n_head)]

    def compared(self, x: Tensor, turns: Tensor | None) -> Tensor:
        """Queries or keys (..., T, S) as they meet: of one length with qk_norm, turned with rotary positions.

        The length is that of S ones, as in RMSNorm (Henry et al. 2020, Query-Key Normalization).
        """
        if self.config.qk_norm:
            x = F.rms_norm(x, x.shape[-1:])
        return x if turns is None else rotate(x, turns)

    def forward(
        self, x: Tensor, cache: KeyValueCache | None = None, layer: int = 0, turns: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). With a cache, x follows the characters that it holds."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, self.head_size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, S) each
        q, k = self.compared(q, turns), self.compared(k, turns)
        # A query of one character sees all of the cache; longer ones start an empty cache.
        causal = cache is None or cache.length == 0
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, length + T, S)
        p = self.dropout.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=causal and T > 1)
        out = out.transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.proj(out))


class FeedFoward(nn.Module):
    """Each character for itself: widen four times, ReLU, narrow."""

    def __init__(self, n_embd: int, dropout: float):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd),
            nn.ReLU(),
            nn.Linear(4 * n_embd, n_embd),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.net(x)


class Block(nn.Module):
    """A transformer block: characters communicate, then each computes; pre-norm, with residuals."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.sa = MultiHeadAttention(config)
        self.ffwd = FeedFoward(config.n_embd, config.dropout)
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)

    def forward(
        self, x: Tensor, cache: KeyValueCache | None = None, layer: int = 0, turns: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.sa(self.ln1(x), cache, layer, turns)
        return x + self.ffwd(self.ln2(x))


class BigramLanguageModel(nn.Module):
    """A character-level GPT (the name is historical: the lecture began with bigrams).

    Args:
        config: its sizes. Without one the globals of this module are read; where their vocab_size is not
            set either, the model is empty until `load_safetensors` gives it sizes and weights.

    Attributes:
        config: the ModelConfig it was built from.
        vocabulary: its characters by token, or None where nobody told; travels with the export.
        provenance: what is known of the weights' origin (JSON values); travels with the export.
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
        assert config.vocab_size is not None  # validate() saw to it
        self.config = config
        C = config.n_embd
        self.token_embedding_table = nn.Embedding(config.vocab_size, C)
        self.position_embedding_table = None  # with rotary positions
        if config.positions == "learned":
            self.position_embedding_table = nn.Embedding(config.block_size, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C)
        self.lm_head = nn.Linear(C, config.vocab_size)
        self.apply(_init_weights)
        if config.zero_init:
            for name, parameter in self.blocks.named_parameters():
                if name.endswith(("sa.proj.weight", "ffwd.net.2.weight")):
                    nn.init.zeros_(parameter)

    def turns(self, start: int, end: int) -> Tensor | None:
        """`rotations` of this model, where its weights are."""
        return rotations(self.config, start, end, self.lm_head.weight.device)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the next character at every place.

        Args:
            idx: (B, T) int64 tokens, T <= block_size.
            targets: (B, T) int64 tokens that follow, or None.
            cache: of the characters before idx; idx is added to it. Then T is 1 or the cache is empty.

        Returns:
            logits (B, T, V), and the mean cross-entropy in nats (a scalar), or None without targets.
        """
        T = idx.shape[1]
        past = cache.length if cache is not None else 0
        assert past + T <= self.config.block_size, "more characters than block_size"
        x = self.token_embedding_table(idx)  # (B, T, C)
        if self.position_embedding_table is not None:
            x = x + self.position_embedding_table.weight[past : past + T]
        turns = self.turns(past, past + T)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer, turns)
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
        """Continue each row of idx: (B, T) -> (B, T + max_new_tokens), or shorter where `stop` ended it.

        See `generate_stream` for the arguments.
        """
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

        The model sees the whole text while it fits into block_size. After that the positions of all
        characters would shift with every new one, and nothing could be kept; so when the context is full,
        the older half is dropped: from then on each character is drawn from between block_size / 2 and
        block_size characters of context.

        Args:
            idx: (B, T) int64 tokens, T >= 1.
            max_new_tokens: how many to draw.
            temperature: below 1 is more certain, above 1 more varied; 0 takes the likeliest.
            top_k: draw from the k likeliest only.
            top_p: draw from the fewest whose probabilities reach p only.
            generator: on the model's device; the same state draws the same text.
            stop: tokens that end the generation once every row has drawn them in a row.

        Raises:
            ValueError: idx is empty, or an argument is out of range.
        """
        check_sampling(temperature, top_k, top_p)
        if idx.shape[1] < 1:
            raise ValueError("idx must hold at least one token")
        was_training = self.training
        self.eval()
        try:
            B, size = idx.shape[0], self.config.block_size
            decoder = Decoder(self, B)
            fresh = idx[:, -size:]  # what the decoder has not seen
            context = [fresh]  # in pieces (B, T)
            ending = idx.new_tensor(list(stop or ()))
            recent = idx.new_full((B, len(ending)), -1)
            stopped = torch.zeros(B, dtype=torch.bool, device=idx.device)
            for _ in range(max_new_tokens):
                logits = decoder.logits(fresh)  # (B, V)
                token = next_token(logits, temperature, top_k, top_p, generator)  # (B,)
                yield token
                if stop:
                    recent = torch.cat([recent[:, 1:], token[:, None]], dim=1)
                    stopped |= (recent == ending).all(dim=1)
                    if stopped.all():
                        return
                fresh = token[:, None]
                context.append(fresh)
                if decoder.cache.length == size:
                    fresh = torch.cat(context, dim=1)[:, -max(1, size // 2) :]
                    context, decoder.cache.length = [fresh], 0
        finally:
            self.train(was_training)

    def save_safetensors(self, path: str | Path) -> None:
        """Write the weights, sizes, vocabulary and provenance to one file, atomically.

        Raises:
            Alg1Error: the file system refused (exit code 4).
        """
        if self.config.vocab_size is None:
            raise ValueError("this model is empty: give it a config, or load weights first")
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": self.config.stored(),
            "vocabulary": self.vocabulary,
            "provenance": self.provenance,
        }
        write_tensors(path, split_heads(self.state_dict(), self.config), metadata)

    def load_safetensors(
        self, path: str | Path, vocabulary: Sequence[str] | None = None
    ) -> BigramLanguageModel:
        """Take sizes, weights, vocabulary and provenance from a file, whatever this model's sizes were.

        Args:
            path: written by `save_safetensors`, or any safetensors file in the lecture's layout.
            vocabulary: the characters by token, for a file that does not hold them.

        Returns:
            the model itself, on the CPU.

        Raises:
            Alg1Error: not a whole safetensors file, damaged, or not these weights; the model is unchanged.
        """
        return self.load_tensors(*read_tensors(path), path, vocabulary)

    def load_tensors(
        self,
        tensors: Mapping[str, Tensor],
        metadata: dict[str, Any] | None,
        path: str | Path,
        vocabulary: Sequence[str] | None = None,
    ) -> BigramLanguageModel:
        """`load_safetensors` for a file that `read_tensors` has read; `path` is for messages."""
        if metadata is not None and metadata.get("format") != FORMAT:
            raise Alg1Error(
                f"{path}: this is {metadata.get('format')!r}, not an exported model", OTHER_WEIGHTS
            )
        if metadata is not None and metadata.get("format_version") != FORMAT_VERSION:
            raise Alg1Error(
                f"{path}: format version {metadata.get('format_version')!r} is not known",
                "use the release of ALG1 that wrote it",
            )
        metadata = metadata or {}
        stored = metadata.get("model")
        told = stored if isinstance(stored, dict) else {}
        config = config_from_shapes(tensors, path, told)
        if stored is not None and dataclasses.asdict(config) != MODEL_OPTIONS | told:
            raise Alg1Error(f"{path}: its sizes and its tensors do not agree", OTHER_WEIGHTS)
        characters = vocabulary if vocabulary is not None else metadata.get("vocabulary")
        if characters is not None and len(characters) != config.vocab_size:
            raise Alg1Error(
                f"{path}: the vocabulary has {len(characters)} characters,"
                f" the weights are for {config.vocab_size}",
                "name the vocabulary of the text that it was trained on",
            )
        if characters is not None and list(characters) != sorted(set(characters)):
            raise Alg1Error(
                f"{path}: the vocabulary is not a sorted set of characters, token by token", OTHER_WEIGHTS
            )
        with torch.device("meta"):
            expected = BigramLanguageModel(config).state_dict()
        state = join_heads(tensors, expected, config, path)
        self._build(config)
        self.load_state_dict(state)
        self.train(self.training)  # the new modules are in training mode, whatever the old ones were
        self.vocabulary = None if characters is None else list(characters)
        self.provenance = metadata.get("provenance") or {}
        return self


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, mean=0.0, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
