"""torch.onnx.export of the model, with a length that is chosen later, by both of PyTorch's exporters."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import PROJECT

from model import BigramLanguageModel
from parameters import ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 8, "vocab_size": 11}
LEARNED: dict[str, Any] = {}
ROTARY: dict[str, Any] = {"positions": "rotary"}


def export_as_documented() -> None:
    """What README-ARCH.md shows."""
    (code,) = re.findall(
        r"^```python\n(.*?)^```$", (PROJECT / "README-ARCH.md").read_text("utf-8"), re.M | re.S
    )
    exec(code, {})


def export_by_tracing() -> None:
    model = BigramLanguageModel().load_safetensors("model.safetensors").eval()
    idx = torch.zeros(2, 4, dtype=torch.int64)
    torch.onnx.export(
        model, (idx,), "model.onnx", dynamo=False, input_names=["idx"], dynamic_axes={"idx": {1: "length"}}
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("export", "options"),
    [
        (export_as_documented, LEARNED),
        (export_as_documented, ROTARY | {"qk_norm": True}),
        (export_by_tracing, LEARNED),
        (export_by_tracing, ROTARY),
    ],
)
def test_an_exported_model_computes_the_logits_at_every_length(workdir, export, options):
    pytest.importorskip("onnxscript", reason="exporting is optional")
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(1)
    model = BigramLanguageModel(ModelConfig(**SIZES, **options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_safetensors("model.safetensors")
    export()
    exported = ReferenceEvaluator("model.onnx")
    for length in range(1, SIZES["block_size"] + 1):
        idx = torch.randint(SIZES["vocab_size"], (2, length))
        logits = torch.from_numpy(exported.run(None, {"idx": idx.numpy()})[0])
        assert logits.shape == (2, length, SIZES["vocab_size"])
        assert (logits - model(idx)[0]).abs().max() < 1e-6 * logits.abs().max()


def test_attention_is_one_causal_kernel_whatever_the_length(monkeypatch):
    """A mask would keep PyTorch from its fast kernels, and what depends on the length from exporting."""
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def noted(*tensors, **options):
        calls.append((len(tensors), options))
        return attention(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    model = BigramLanguageModel(ModelConfig(**SIZES))
    for length in (1, 8):
        model(torch.zeros(2, length, dtype=torch.int64))
    assert calls == [(3, {"dropout_p": 0.0, "is_causal": True})] * 2
