"""inference.py --score: each character is predicted as defined, whatever the text and the device."""

from __future__ import annotations

import errno
import gzip
import io
import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import run_process
from small_model import VOCABULARY, build
from torch.nn import functional as F

import inference
from model import BigramLanguageModel
from parameters import ModelConfig
from utils import Tokenizer
from utils_alg1.data import text_files
from utils_alg1.inference import score as score_module
from utils_alg1.network import scoring as scoring_module
from utils_alg1.network.cache import CachedForward
from utils_alg1.network.decoder import Decoder
from utils_alg1.network.scoring import batch_size, cross_entropy, score_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = [
    {},
    {"block_size": 1},
    {"block_size": 7, "n_layer": 2},
    {"block_size": 8, "positions": "rotary", "qk_norm": True},
]
MODEL = ("--model", "model.safetensors")


def text_of(n: int, seed: int = 0) -> str:
    """A text of the small model's characters."""
    return "".join(np.random.default_rng(seed).choice(VOCABULARY, n))


@torch.no_grad()
def plainly(model: BigramLanguageModel, tokens: list[int]) -> list[float]:
    """The losses of all characters but the first, each predicted by PyTorch from its own context.

    The context begins where the text begins, or at the newest multiple of half a window that is at most a
    window away from the character.
    """
    T = model.config.block_size
    step = max(1, T // 2)
    losses = []
    for t in range(1, len(tokens)):
        start = math.ceil(max(0, t - T) / step) * step
        assert start == 0 or T / 2 <= t - start <= T
        logits = model(torch.tensor([tokens[start:t]]))[0][0, -1].double()
        losses.append(F.cross_entropy(logits, torch.tensor(tokens[t])).item())
    return losses


def decoder_of(model: BigramLanguageModel, kind: str) -> Decoder | CachedForward:
    if kind == "torch":
        return CachedForward(model)
    return Decoder(model.config, {name: tensor.numpy() for name, tensor in model.state_dict().items()})


def in_pieces(tokens: list[int], length: int) -> Iterator[np.ndarray]:
    for start in range(0, len(tokens), length):
        yield np.array(tokens[start : start + length])


# --- the definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("sizes", OPTIONS)
def test_every_loss_is_that_of_pytorch_from_its_own_context(sizes, kind, monkeypatch):
    model = build(**sizes)
    T = model.config.block_size
    monkeypatch.setattr(scoring_module, "batch_size", lambda *_: 3)
    for n in {1, 2, T, T + 1, T + 2, 2 * T + 3, 11 * T + 1}:
        tokens = Tokenizer(VOCABULARY).encode(text_of(n))
        expected = plainly(model, tokens)
        for length in (1, 5, 1000):
            losses = [*score_tokens(decoder_of(model, kind), in_pieces(tokens, length))]
            np.testing.assert_allclose(np.concatenate([*losses, []]), expected, atol=1e-5)


def test_a_token_that_is_read_but_not_scored_changes_no_other_loss():
    model = build()
    tokens = Tokenizer(VOCABULARY).encode(text_of(40))
    silent = [0, 1, 6, 7, 20, 39]
    given = [~token if i in silent else token for i, token in enumerate(tokens)]

    losses = np.concatenate([*score_tokens(decoder_of(model, "numpy"), in_pieces(given, 9))])

    expected = [loss for i, loss in enumerate(plainly(model, tokens), start=1) if i not in silent]
    np.testing.assert_allclose(losses, expected, atol=1e-5)


def test_a_long_text_is_scored_as_it_is_read():
    """So its length needs no memory."""
    model, read, scored = build(), 0, 0

    def pieces() -> Iterator[np.ndarray]:
        nonlocal read
        for _ in range(20):
            read += 100
            yield np.zeros(100, np.int64)

    for losses in score_tokens(decoder_of(model, "numpy"), pieces()):
        scored += len(losses)
        assert read - scored <= 100 + model.config.block_size
    assert (read, scored) == (2000, 1999)


@pytest.mark.parametrize(
    ("sizes", "windows"),
    [({}, 5461), ({"n_head": 8}, 3640), ({"n_embd": 1024}, 42), ({"vocab_size": 20_000}, 8)],
)
def test_what_is_computed_at_a_time_is_bounded_by_the_largest_array(sizes, windows):
    """A million numbers in the hidden layer, the attention or the logits; but there is always one window."""
    config = ModelConfig(**{"n_embd": 8, "n_head": 1, "block_size": 6, "vocab_size": 10} | sizes)
    assert batch_size(config, 2**20) == windows
    config.block_size = 10**6
    assert batch_size(config, 2**20) == 1


def test_cross_entropy_is_that_of_pytorch_also_for_large_logits():
    logits = np.random.default_rng(0).normal(0, 60, (50, 9)).astype(np.float32)
    targets = np.random.default_rng(1).integers(0, 9, 50)
    expected = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(targets), reduction="none")
    np.testing.assert_allclose(cross_entropy(logits, targets), expected, rtol=1e-5, atol=1e-5)


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture
def model(workdir) -> BigramLanguageModel:
    """A model in model.safetensors, which is all there is in the working folder."""
    model = build()
    model.save_safetensors("model.safetensors")
    return model


def write(text: str, name: str = "text.txt") -> Path:
    path = Path(name)
    path.write_bytes(text.encode())
    return path


def figures(result) -> dict:
    assert result.code == 0, result.err
    return yaml.safe_load(result.out)


def loss_of(model: BigramLanguageModel, text: str) -> float:
    return float(np.mean(plainly(model, Tokenizer(VOCABULARY).encode(text))))


@pytest.mark.parametrize("n", [2, 7, 300])
def test_the_figures_are_yaml_and_agree(sample, model, n):
    text = text_of(n)
    write(text)

    result = sample(*MODEL, "--score", "text.txt")

    found, loss = figures(result), loss_of(model, text)
    assert found == {
        "nats_per_character": pytest.approx(loss, abs=1e-5),
        "bits_per_character": pytest.approx(loss / math.log(2), abs=1e-5),
        "perplexity": pytest.approx(math.exp(loss), abs=1e-4),
        "characters_scored": n - 1,
        "characters_unknown": 0,
    }
    assert result.err == "model.safetensors\n"
    assert [line.partition(":")[0] for line in result.out.splitlines()] == [*found]


def test_nothing_on_disk_is_changed(sample, model):
    write(text_of(100))
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in Path().rglob("*")}
    sample(*MODEL, "--score", "text.txt")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in Path().rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("shakespeare", "data/shakespeare.txt"),
        ("python-docs", "data/python-docs.txt"),
        ("data/input.txt", "data/input.txt"),
    ],
)
def test_no_text_is_made_to_be_scored(sample, model, name, path):
    result = sample(*MODEL, "--score", name)
    assert (result.code, result.out, os.listdir()) == (2, "", ["model.safetensors"])
    assert result.err.splitlines()[1:] == [
        f"error: {path}: no such text file",
        "hint: check the path of --score",
    ]
    write(text_of(20), "text.txt")
    Path("data").mkdir()
    Path("text.txt").rename(path)
    assert figures(sample(*MODEL, "--score", name))["characters_scored"] == 19


def test_several_texts_and_gzip_are_scored_as_one_text(sample, model):
    text = text_of(300)
    write(text)
    Path("books").mkdir()
    write(text[:130], "books/a.txt")
    Path("books/b.txt.gz").write_bytes(gzip.compress(text[130:].encode()))
    one, folder, pattern = (sample(*MODEL, "--score", name) for name in ("text.txt", "books", "books/?.*"))
    assert one.out == folder.out == pattern.out


def test_the_standard_input_and_a_pipe_give_the_same_figures(sample, model, monkeypatch):
    text = "\ufeff" + text_of(500)  # the byte order mark is no part of the text
    write(text)
    in_file = sample(*MODEL, "--score", "text.txt")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(text.encode()))))
    os.mkfifo("pipe")
    writer = threading.Thread(target=Path("pipe").write_bytes, args=(text.encode(),))
    writer.start()

    piped = sample(*MODEL, "--score", "-")
    named = sample(*MODEL, "--score", "pipe")

    writer.join()
    assert in_file.out == piped.out == named.out
    assert figures(piped)["nats_per_character"] == pytest.approx(loss_of(model, text[1:]), abs=1e-5)


def test_a_packed_text_is_unpacked_from_the_standard_input_and_a_pipe(sample, model, monkeypatch):
    text = text_of(500)
    write(text)
    packed = gzip.compress(text.encode())
    stdin = io.BufferedReader(io.BytesIO(packed))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stdin))
    os.mkfifo("pipe")
    writer = threading.Thread(target=Path("pipe").write_bytes, args=(packed,))
    writer.start()

    piped = sample(*MODEL, "--score", "-")
    named = sample(*MODEL, "--score", "pipe")

    writer.join()
    assert sample(*MODEL, "--score", "text.txt").out == piped.out == named.out
    assert not stdin.closed


def test_a_pipe_that_cannot_be_read_is_a_mistake(sample, model, monkeypatch):
    os.mkfifo("pipe")
    real = Path.open

    def refuse(path, *arguments, **options):
        if path.name == "pipe":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    result = sample(*MODEL, "--score", "pipe")
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[1] == "error: pipe: cannot be read: Permission denied"


def test_how_a_text_is_cut_into_pieces_does_not_matter(sample, model, monkeypatch):
    write(text_of(500))
    whole = sample(*MODEL, "--score", "text.txt")
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 7)  # which also cuts characters
    assert sample(*MODEL, "--score", "text.txt").out == whole.out


def test_on_another_device_the_model_itself_scores(sample, model, monkeypatch):
    write(text_of(500))
    on_cpu = figures(sample(*MODEL, "--score", "text.txt"))
    created = []
    monkeypatch.setattr(inference, "find_device", lambda _: torch.device("cpu"))
    create = inference.create_decoder
    monkeypatch.setattr(inference, "create_decoder", lambda *a: created.append(create(*a)) or created[0])

    found = figures(sample(*MODEL, "--score", "text.txt"))

    assert isinstance(created[0], CachedForward)
    assert found == pytest.approx(on_cpu, abs=1e-5)


def test_a_latest_run_is_scored_without_a_model(sample, model):
    run = Path("runs/2026-01-31_001/artifacts/export")
    run.mkdir(parents=True)
    Path("model.safetensors").rename(run / "model.safetensors")
    write(text_of(30))
    assert figures(sample("--score", "text.txt"))["characters_scored"] == 29


# --- characters that the model does not know ----------------------------------------------------------

MIXED = "Zab日c🙂d\ra é日"  # ten that are known, four that are not


@pytest.mark.parametrize("source", ["text.txt", "-"])
def test_unknown_characters_are_refused_by_default(sample, model, source, monkeypatch):
    write(MIXED)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(MIXED.encode()))))

    result = sample(*MODEL, "--score", source)

    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[1:] == [
        f"error: --score {source}: not in the model's vocabulary:"
        " '\\r' (U+000D), 'Z' (U+005A), '日' (U+65E5)",
        "hint: to score the others: --unknown skip leaves these out, --unknown replace puts a space there",
    ]


def test_a_file_is_refused_before_any_of_it_is_scored(sample, model, monkeypatch):
    write(text_of(300) + "Z")
    monkeypatch.setattr(score_module, "score_tokens", lambda *_: pytest.fail("scored"))
    assert sample(*MODEL, "--score", "text.txt").code == 2


def test_unknown_characters_are_left_out_or_replaced_and_never_scored(sample, model):
    write(MIXED)
    tokens = Tokenizer(VOCABULARY).encode(re.sub("[Z日\r]", " ", MIXED))
    replaced = [loss for loss, c in zip(plainly(model, tokens), MIXED[1:], strict=True) if c in VOCABULARY]

    skip = sample(*MODEL, "--score", "text.txt", "--unknown", "skip")
    replace = sample(*MODEL, "--score", "text.txt", "--unknown", "replace")

    left = re.sub("[Z日\r]", "", MIXED)
    assert figures(skip)["nats_per_character"] == pytest.approx(loss_of(model, left), abs=1e-5)
    assert (figures(skip)["characters_scored"], figures(skip)["characters_unknown"]) == (len(left) - 1, 4)
    assert skip.out.splitlines()[-1] == "characters_unknown: 4  # not scored; left out"
    assert figures(replace)["nats_per_character"] == pytest.approx(np.mean(replaced), abs=1e-5)
    assert (figures(replace)["characters_scored"], figures(replace)["characters_unknown"]) == (len(left), 4)
    remark = "not scored; replaced where they are context"
    assert replace.out.splitlines()[-1] == f"characters_unknown: 4  # {remark}"


# --- texts that cannot be scored ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "text.txt: the file is empty"),
        (b"a", "--score text.txt: nothing in this text can be scored"),
        (b"ab\xff", "text.txt: not UTF-8 at byte 2 (0xFF), in line 1"),
        (None, "text.txt: no such text file"),
        ("folder", "text.txt: this folder has no .txt or .txt.gz file"),
    ],
)
def test_a_text_that_cannot_be_scored_is_one_error(sample, model, content, error):
    if content == "folder":
        Path("text.txt").mkdir()
    elif content is not None:
        Path("text.txt").write_bytes(content)

    result = sample(*MODEL, "--score", "text.txt")

    assert (result.code, result.out) == (2, "")
    _, said, hint = result.err.splitlines()
    assert said == f"error: {error}" and hint.startswith("hint: ")


@pytest.mark.parametrize("content", [b"", b"a", b"ab\xff"])
def test_nor_can_it_from_the_standard_input(sample, model, content, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    result = sample(*MODEL, "--score", "-")
    assert (result.code, result.out) == (2, "")
    wanted = "the standard input: not UTF-8" if len(content) > 2 else "--score -: nothing in this text"
    assert result.err.splitlines()[1].startswith(f"error: {wanted}")


def test_a_closed_standard_input_is_an_empty_text(model):
    result = run_process(
        "inference.py", *MODEL, "--score", "-", "--device", "cpu", preexec_fn=lambda: os.close(0)
    )
    assert (result.code, result.out) == (2, "")
    assert "error: --score -: nothing in this text can be scored" in result.err


@pytest.mark.filterwarnings("error")
def test_weights_of_a_run_that_has_diverged_score_nothing(sample, workdir):
    write(text_of(50))
    diverged = build()
    with torch.no_grad():
        diverged.lm_head.weight[0, :] = math.nan
    diverged.save_safetensors("model.safetensors")

    result = sample(*MODEL, "--score", "text.txt")

    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[1:] == [
        "error: model.safetensors: the model's logits are not finite",
        "hint: use weights of a run that has not diverged",
    ]


# --- while it lasts -----------------------------------------------------------------------------------


def test_ctrl_c_tells_what_was_scored_so_far(sample, model, monkeypatch):
    text = text_of(300)
    write(text)

    def interrupted(*arguments):
        yield next(score_tokens(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(score_module, "score_tokens", interrupted)

    result = sample(*MODEL, "--score", "text.txt")

    loss = loss_of(model, text[:7])
    assert (result.code, result.out) == (130, "")
    note, last = result.err.splitlines()[1:]
    assert re.fullmatch(rf"note: 6 characters so far: loss {loss:.4f} \(perplexity .*\)", note)
    assert last == "interrupted"


@pytest.mark.parametrize("source", ["text.txt", "-"])
def test_a_long_text_shows_its_progress_at_a_terminal(model, terminal, monkeypatch, source):
    write(text_of(1000))
    monkeypatch.setattr(score_module, "BAR_DELAY", -1.0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(text_of(1000).encode()))))
    shown = terminal()

    inference.main([*MODEL, "--score", source])

    seen = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", shown())
    assert ("character    6/1000" if source == "text.txt" else "character 6 ") in seen
    assert seen.splitlines()[-5].endswith(re.search(r"nats_per_character: .*", seen)[0])


def test_a_short_text_shows_none(model, terminal):
    write(text_of(100))
    shown = terminal()
    inference.main([*MODEL, "--score", "text.txt"])
    assert "\x1b" not in shown()
