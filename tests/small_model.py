"""A model so small that texts are drawn and scored at once, and the run that holds it."""

from __future__ import annotations

from pathlib import Path

import torch

from model import BigramLanguageModel
from parameters import ModelConfig

VOCABULARY = sorted("\n abcdefgé🙂")
RUN = "runs/2026-01-31_001_first"


def build(seed: int = 0, vocabulary: list[str] = VOCABULARY, **sizes) -> BigramLanguageModel:
    """A model whose text varies; another seed writes another text."""
    torch.manual_seed(seed)
    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 1, "block_size": 6} | sizes
    model = BigramLanguageModel(ModelConfig(**sizes, vocab_size=len(vocabulary)))
    model.vocabulary = vocabulary
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.6)
    return model.eval()


def export(run: str, model: BigramLanguageModel) -> Path:
    path = Path(run, "artifacts/export/model.safetensors")
    path.parent.mkdir(parents=True)
    model.save_safetensors(path)
    return path


def greedy(model: BigramLanguageModel, prompt: str, n: int) -> str:
    """The prompt and its likeliest continuation."""
    idx = torch.tensor([[model.vocabulary.index(character) for character in prompt]])
    return "".join(model.vocabulary[token] for token in model.generate(idx, n, temperature=0)[0])
