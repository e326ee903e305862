"""Every benchmark runs without a peer and prints its table. (What the figures are is no test's business.)"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
from conftest import PROJECT, run_process

FOLDER = PROJECT / "benchmarks"
HELPERS = {"common.py", "peers.py", "jax_peer.py"}
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if path.name not in HELPERS)
# What the plain suite has time for.
QUICK = ("checkpoint.py", "optimizers.py")
QUICK_FLAGS = {"scaling.py": ["--picture", "scaling.png"]}


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import common

    yield common
    del sys.modules["common"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_prints_its_table(script, workdir, campaign):
    if script not in QUICK and not campaign.whole:
        pytest.skip("takes some seconds: pytest --campaign")
    flags = QUICK_FLAGS.get(script, [])

    result = run_process(f"benchmarks/{script}", "--quick", *flags, timeout=300, cwd=workdir)

    assert result.code == 0, result.err
    where, header, rule, *rows = result.out.splitlines()
    assert " cores" in where and "torch" in where
    assert set(rule) == set("|- ")
    assert rows
    for row in [header, rule, *rows]:
        assert row.startswith("| ") and row.endswith(" |")
        assert len(row) == len(header)
    assert not set(os.listdir()) - {"scaling.png"}, "it leaves nothing behind"


def test_a_picture_of_the_growth_is_drawn(workdir, common):
    from scaling import draw

    rows = [
        {"what changes": axis, "dtype": dtype, "to": value, "tok/s": 10.0 * value, "peak memory, MB": 5.0}
        for axis, dtype in (("n_embd", "float32"), ("batch_size", "float32"), ("n_embd", "bfloat16"))
        for value in (1, 2)
    ]
    draw(rows, workdir / "x.png")

    assert (workdir / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_is_compared_with_nanogpts_best_in_float32_and_with_the_best_product(common, monkeypatch):
    import training

    def contestants(size, args, folder, threads):
        for who, dtype, seconds in (
            ("ALG1", "bfloat16", 1.0),
            ("nanoGPT", "bfloat16", 1.0),
            ("nanoGPT", "float32", 8.0),
            ("nanoGPT compiled", "float32", 4.0),
        ):
            times = [seconds * (3 - threads)] * 2  # two threads are twice as fast
            yield training.Contestant(who, dtype, dtype, threads, None, 1e12, times)

    def products(arithmetic, threads, device):
        for library, seconds in ("slow", 0.1), ("fast", 0.05):
            flops = 1e11 * threads * (2 if arithmetic == "bfloat16" else 1)
            yield training.Contestant(library, "", arithmetic, threads, None, flops, [seconds, 9.0])

    monkeypatch.setattr(training, "contestants", contestants)
    monkeypatch.setattr(training, "products", products)
    monkeypatch.setattr(training, "take_turns", lambda entered, args: None)
    monkeypatch.setattr(training.os, "cpu_count", lambda: 2)
    args = SimpleNamespace(threads="best", device="cpu", compile=False)

    rows = training.measure("a size", {"batch_size": 2, "block_size": 5}, args, None)

    shown = ("who", "dtype", "threads", "tok/s", "x nanoGPT's best in float32", "of peak")
    assert [tuple(row[name] for name in shown) for row in rows] == [
        ("ALG1", "bfloat16", 2, 10.0, 4.0, "12% of 8,000 (fast)"),
        ("nanoGPT", "bfloat16", 2, 10.0, 4.0, "12% of 8,000 (fast)"),
        ("nanoGPT", "float32", 2, 1.25, 0.5, "3% of 4,000 (fast)"),
        ("nanoGPT compiled", "float32", 2, 2.5, 1.0, "6% of 4,000 (fast)"),
    ]


NANOGPT = """
import torch
from types import SimpleNamespace as GPTConfig

class GPT(torch.nn.Linear):
    def __init__(self, config):
        print("number of parameters: 0.00M")
        super().__init__(config.n_embd, config.vocab_size, config.bias)
        self.config = config

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.SGD(self.parameters(), lr=learning_rate)

    def forward(self, x, y):
        logits = super().forward(torch.ones(len(x), self.config.n_embd))
        seen.append((logits.dtype, self.config.dropout, x.shape, bool((y == x + 1).all())))
        return logits, logits.float().square().mean()

seen = []
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_nanogpt_is_autocast_where_that_is_asked_for(dtype, common, workdir, capsys):
    import numpy as np
    import torch
    from peers import nanogpt_step

    (workdir / "model.py").write_text(NANOGPT)
    size = {"n_embd": 4, "n_head": 1, "n_layer": 1, "block_size": 8, "vocab_size": 3, "batch_size": 2}
    step = nanogpt_step(
        workdir, np.arange(100), {**size, "dropout": 0.25, "device": "cpu"}, dtype, workdir, compile=False
    )
    losses = [step() for _ in range(100)]

    assert sys.modules.pop("nanogpt_model").seen == [(getattr(torch, dtype), 0.25, (2, 8), True)] * 100
    assert losses[0] > losses[-1], "it trains"
    assert capsys.readouterr().out == ""


def test_a_step_of_the_jax_peer_is_that_of_alg1(common, workdir):
    jax = pytest.importorskip("jax", reason="needs the extra: pip install alg1[bench]")
    import numpy as np
    from jax_peer import JaxSteps, training_step

    size = {"n_embd": 16, "n_head": 2, "n_layer": 2, "block_size": 8, "batch_size": 4}
    (workdir / "text.txt").write_text("To be, or not to be: that is the question. " * 20, encoding="utf-8")
    trainer = common.build_trainer(workdir / "text.txt", **size, grad_clip=0.1, learning_rate=1e-3)
    weights = {name: w.detach().numpy().copy() for name, w in trainer.model.named_parameters()}
    averages = {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in weights.items()}
    x, y = trainer._batch(0)
    step = training_step(n_head=2, n_layer=2, dtype="float32", grad_clip=0.1)

    with jax.default_device(jax.devices("cpu")[0]):
        updated, averages, (loss, norm) = step(weights, averages, 1.0, x.numpy(), y.numpy())

    assert loss == pytest.approx(trainer.forward_backward(), rel=1e-5)
    assert norm == pytest.approx(trainer.gradient_norm, rel=1e-5) and norm > 0.1
    trainer.optimizer_step()
    for name, w in trainer.model.named_parameters():
        np.testing.assert_allclose(
            averages[name][0], 0.1 * w.grad.numpy(), rtol=1e-4, atol=1e-7, err_msg=name
        )
        np.testing.assert_allclose(updated[name], w.detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=name)

    JaxSteps(weights, trainer.data[0], size, "bfloat16", 1, workdir)(2)  # it takes steps, or exits


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_is_in_the_readme_with_its_command(script):
    assert f"python benchmarks/{script}" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_turns_are_taken_forwards_and_backwards(common):
    taken = []

    seconds = common.interleave({name: lambda name=name: taken.append(name) for name in "abc"}, 3)

    assert "".join(taken) == "abccbaabc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_steps_are_timed_in_turns_after_a_warm_up(common, monkeypatch):
    taken = []
    monkeypatch.setattr(common.time, "perf_counter", lambda: 0.5 * sum(taken))  # half a second a step

    times = common.seconds_per_step({"a": taken.append}, rounds=2, seconds=2.0)

    assert taken == [3, 1, 4, 4]
    assert times == {"a": [0.5, 0.5]}


def test_a_step_that_is_not_compiled_is_no_figure(common, workdir, monkeypatch):
    import torch

    (workdir / "text.txt").write_text("To be, or not to be: that is the question. " * 20, encoding="utf-8")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: 1 / 0)

    with pytest.raises(SystemExit, match=r"torch\.compile does not work here"):
        common.build_trainer(workdir / "text.txt", compile="on", n_embd=8, n_layer=1, device="cpu")


def test_the_row_of_a_shortcut_has_the_quartiles_of_the_ratio(common):
    from shortcuts import row

    made = row("a shortcut", "a size", [1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 4.0, 3.0, 5.0])

    assert made["ratio"] == 3.0
    assert made["quartiles"] == "2 to 4"
    assert made["with it, ms"] == 1000.0 and made["without, ms"] == 3000.0


def test_a_ratio_is_the_median_over_the_rounds(common):
    assert common.ratio([2, 30, 8], [1, 10, 2]) == 3


def test_a_table_is_markdown_with_a_dash_for_what_was_not_measured(common, capsys):
    common.table([{"who": "ours", "tok/s": 12345.6}, {"who": "theirs", "x": 0.12345, "n": 1000}])

    assert capsys.readouterr().out.splitlines() == [
        "| who    | tok/s  | x     | n     |",
        "| ------ | ------ | ----- | ----- |",
        "| ours   | 12,346 | -     | -     |",
        "| theirs | -      | 0.123 | 1,000 |",
    ]


def test_a_peer_is_loaded_by_its_file(common, workdir):
    (workdir / "model.py").write_text("class GPT:\n    size = 3\n")

    assert common.load(workdir / "model.py", "a_peer").GPT.size == 3
    assert sys.modules.pop("a_peer").GPT.size == 3


def test_a_child_tells_what_it_found_and_its_own_peak(common, workdir):
    code = "x = bytearray(int(sys.argv[1])); x[::4096] = x[::4096]; report(found=7)"

    small = common.child(code, 1, folder=workdir)
    large = common.child(code, 50_000_000, folder=workdir)

    assert small["found"] == large["found"] == 7
    assert large["peak"] - small["peak"] > 40_000_000


def test_a_child_that_fails_says_what_it_said(common, workdir):
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        common.child("1 / 0", folder=workdir)
