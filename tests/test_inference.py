"""inference.py: which weights it samples, what it prints and how it ends."""

from __future__ import annotations

import contextlib
import io
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pytest
import torch
from conftest import PROJECT, QUIET_TRACKERS, TINY
from safetensors.torch import load_file, save_file
from small_model import RUN, VOCABULARY, build, export, greedy

import inference
from utils_alg1.console import dialogue as dialogue_module
from utils_alg1.console.script import run_script
from utils_alg1.inference import loading as loading_module
from utils_alg1.network.cache import CachedForward
from utils_alg1.network.sampling import Sampling
from utils_alg1.report import page as page_module
from utils_alg1.report import results as results_module


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower on several threads, much slower where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(workdir):
    """The model of the only run in the working folder."""
    model = build()
    export(RUN, model)
    return model


GREEDY = ("--temperature", 0, "--max-new-tokens", 12)


# --- which weights ------------------------------------------------------------------------------------


def test_the_latest_run_is_sampled_and_named(sample, model):
    later = build(1)
    path = export("runs/2026-02-01_001", later)
    export("runs/2026-01-31_010", build(2))

    result = sample("--prompt", "ab", *GREEDY)

    assert (result.code, result.out, result.err) == (0, greedy(later, "ab", 12) + "\n", f"{path}\n")
    assert greedy(later, "ab", 12) != greedy(model, "ab", 12)


@pytest.mark.parametrize("name", ["2026-01-31_001_first", RUN, f"./{RUN}/"])
def test_a_run_is_named_by_id_or_directory(sample, model, name):
    export("runs/2026-02-01_001", build(1))

    result = sample("--run", name, "--prompt", "ab", *GREEDY)

    assert result.out == greedy(model, "ab", 12) + "\n"
    assert result.err == f"{RUN}/artifacts/export/model.safetensors\n"


def test_a_latest_run_without_weights_is_passed_over(sample, model):
    Path("runs/2026-02-01_001/artifacts").mkdir(parents=True)

    assert sample("--prompt", "ab", *GREEDY).out == greedy(model, "ab", 12) + "\n"


def test_runs_are_looked_for_in_runs_dir(sample, model):
    Path("runs").rename("elsewhere")

    assert sample("--prompt", "ab", *GREEDY).code == 2
    assert sample("--runs-dir", "elsewhere", "--prompt", "ab", *GREEDY).out == greedy(model, "ab", 12) + "\n"


def test_an_exported_file_is_sampled(sample, model):
    other = build(1)
    other.save_safetensors("other.safetensors")

    assert (
        sample("--model", "other.safetensors", "--prompt", "ab", *GREEDY).out
        == greedy(other, "ab", 12) + "\n"
    )


def test_a_real_run_is_sampled_from_its_export_and_without_one_from_its_newest_checkpoint(
    train, sample, text_file, monkeypatch
):
    monkeypatch.setattr(page_module, "write_report", lambda *_: None)  # pictures take most of the time
    monkeypatch.setattr(results_module, "SAMPLE_LENGTH", 4)
    assert train("--data", text_file, *TINY, *QUIET_TRACKERS, "--export", "last").code == 0
    (run,) = Path("runs").glob("2*")
    exported = sample("--prompt", "The", *GREEDY)
    shutil.rmtree(run / "artifacts/export")
    checkpoint = sorted((run / "artifacts/checkpoints").iterdir())[-1]

    interrupted = sample("--prompt", "The", *GREEDY)
    named = sample("--model", checkpoint, "--prompt", "The", *GREEDY)

    assert exported.code == interrupted.code == 0
    assert exported.out.startswith("The") and len(exported.out) == len("The") + 12 + 1
    assert exported.out == interrupted.out == named.out
    assert interrupted.err == f"{checkpoint}\n"


# --- the prompt ---------------------------------------------------------------------------------------


def test_the_prompt_comes_first(sample, model):
    result = sample("--prompt", "é🙂\n a", *GREEDY)

    assert result.out == greedy(model, "é🙂\n a", 12) + "\n"
    assert result.out.startswith("é🙂\n a")


def test_a_prompt_longer_than_block_size_is_printed_whole(sample, model):
    prompt = "abcdefg" * 5

    assert sample("--prompt", prompt, *GREEDY).out == greedy(model, prompt, 12) + "\n"


@pytest.mark.parametrize(
    ("vocabulary", "start"), [(VOCABULARY, "\n"), (sorted("b ac"), " "), (sorted("bca"), "a")]
)
def test_without_a_prompt_the_text_starts_after_a_line_end_or_the_first_character(
    sample, workdir, vocabulary, start
):
    model = build(vocabulary=vocabulary)
    export(RUN, model)

    assert sample(*GREEDY).out == greedy(model, start, 12)[1:] + "\n"


def test_an_unknown_character_is_an_error_that_says_what_to_do(sample, model):
    result = sample("--prompt", "aZbé~")

    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[1:] == [
        "error: not in the model's vocabulary: 'Z' (U+005A), '~' (U+007E)",
        "hint: leave them out with --unknown skip, or --unknown replace",
    ]


@pytest.mark.parametrize(
    ("unknown", "vocabulary", "prompt", "printed"),
    [
        ("skip", VOCABULARY, "aZbé~", "abé"),
        ("replace", VOCABULARY, "aZbé~", "a bé "),
        ("replace", sorted("cab"), "bZ", "ba"),
        ("error", VOCABULARY, "abé", "abé"),
    ],
)
def test_unknown_characters_are_skipped_or_replaced(sample, workdir, unknown, vocabulary, prompt, printed):
    model = build(vocabulary=vocabulary)
    export(RUN, model)

    result = sample("--prompt", prompt, "--unknown", unknown, *GREEDY)

    assert result.out == greedy(model, printed, 12) + "\n"


def test_a_prompt_of_which_nothing_is_left_is_no_prompt(sample, model):
    assert sample("--prompt", "ZZ", "--unknown", "skip", *GREEDY).out == sample(*GREEDY).out


# --- the text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 40])
def test_as_many_characters_are_drawn_as_asked_for(sample, model, n):
    assert len(sample("--prompt", "ab", "--max-new-tokens", n).out) == 2 + n + 1


def test_the_same_seed_gives_the_same_text_and_another_seed_another(sample, model):
    one, again, other = (sample("--max-new-tokens", 60, "--seed", seed).out for seed in (7, 7, 8))

    assert one == again != other


def test_each_of_several_samples_has_its_own_seed(sample, model):
    texts = [sample("--max-new-tokens", 30, "--seed", seed).out for seed in (7, 8, 9)]

    result = sample("--max-new-tokens", 30, "--seed", 7, "--num-samples", 3)

    assert result.out == "".join(f"--- sample {i + 1}\n{text}" for i, text in enumerate(texts))
    assert len(set(texts)) == 3


def test_more_samples_than_are_drawn_at_a_time_are_the_same(sample, model, monkeypatch):
    flags = ("--max-new-tokens", 30, "--seed", 7, "--num-samples", 5)
    at_once = sample(*flags)
    monkeypatch.setattr(inference, "BATCH_TOKENS", 2 * model.config.block_size)

    assert sample(*flags).out == at_once.out
    assert at_once.out.count("--- sample ") == 5


def test_each_of_several_samples_ends_with_its_own_stop(sample, model):
    stop = sample("--prompt", "ab", "--seed", 7).out[30]
    flags = ("--prompt", "ab", "--max-new-tokens", 60, "--stop", stop)
    texts = [sample(*flags, "--seed", seed).out for seed in (7, 8, 9, 10)]

    result = sample(*flags, "--seed", 7, "--num-samples", 4)

    assert result.out == "".join(f"--- sample {i + 1}\n{text}" for i, text in enumerate(texts))
    assert len({len(text) for text in texts}) > 2
    assert all(text[2:].find(stop) == len(text) - 4 for text in texts)


def test_the_first_of_several_samples_appears_as_it_is_drawn(model, monkeypatch):
    written: list[str] = []
    next_token, (one, other) = Sampling.next_token, greedy(model, "ab", 2)[2:]

    def draw(*arguments):
        written.append("draw")
        return next_token(*arguments)

    screen = io.StringIO()
    monkeypatch.setattr(screen, "write", written.append)
    monkeypatch.setattr(Sampling, "next_token", draw)
    monkeypatch.setattr(sys, "stdout", screen)

    inference.main(["--prompt", "ab", "--temperature", "0", "--max-new-tokens", "2", "--num-samples", "2"])

    assert written == [
        *("--- sample 1\nab", "draw", one, "draw", other, "\n"),
        *("--- sample 2\nab", one, other, "\n"),
    ]


@pytest.mark.parametrize("flags", [("--temperature", 0), ("--top-k", 1), ("--top-p", 1e-9)])
def test_the_likeliest_text_needs_no_seed(sample, model, flags):
    for seed in (1, 2):
        result = sample("--prompt", "ab", *flags, "--seed", seed, "--max-new-tokens", 20)
        assert result.out == greedy(model, "ab", 20) + "\n"


def test_stop_ends_the_text_after_it(sample, model):
    whole = sample("--max-new-tokens", 200, "--seed", 3).out
    stop = whole[20:22]

    stopped = sample("--max-new-tokens", 200, "--seed", 3, "--stop", stop).out

    assert stopped == whole[: whole.index(stop) + 2] + "\n"
    assert len(stopped) < len(whole)


@pytest.mark.parametrize("further", [(), ("--interactive",)])
def test_a_stop_that_the_model_can_never_draw_is_an_error(sample, model, further):
    result = sample("--stop", "aΩ", *further)

    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[1:] == [
        "error: --stop: not in the model's vocabulary: 'Ω' (U+03A9)",
        "hint: no text would ever stop there: leave --stop out, or name characters that the model knows",
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("flags", [("--temperature", 0), (), ("--num-samples", 3)])
@pytest.mark.parametrize(
    "name, weight",
    [
        ("lm_head", math.nan),
        ("lm_head", 3e38),
        ("token_embedding_table", math.nan),
        ("token_embedding_table", 1e24),  # finite, but its square is not
    ],
)
def test_weights_of_a_run_that_has_diverged_are_refused(sample, workdir, flags, name, weight):
    diverged = build()
    with torch.no_grad():
        diverged.get_submodule(name).weight[:] = weight * torch.randn(
            diverged.get_submodule(name).weight.shape
        )
    diverged.save_safetensors("diverged.safetensors")
    result = sample("--model", "diverged.safetensors", *flags)
    assert result.code == 2
    assert "error: " in result.err and "the model's logits are not finite" in result.err
    assert "Traceback" not in result.err and "Warning" not in result.err


def test_stop_is_not_sought_in_the_prompt(sample, model, monkeypatch):
    drawn = iter([np.array([VOCABULARY.index(character)]) for character in "babcd"])
    monkeypatch.setattr(Sampling, "next_token", lambda *_: next(drawn))

    assert sample("--prompt", "a", "--stop", "ab", "--max-new-tokens", 5).out == "abab\n"


def test_characters_appear_one_by_one_as_they_are_drawn(model, monkeypatch):
    events: list[str] = []

    class Screen(io.StringIO):
        def write(self, text):
            events.append(text)
            return len(text)

        def flush(self):
            events.append("flush")

    next_token, text = Sampling.next_token, greedy(model, "ab", 3)[2:]

    def draw(*arguments):
        events.append("draw")
        return next_token(*arguments)

    monkeypatch.setattr(Sampling, "next_token", draw)
    monkeypatch.setattr(sys, "stdout", Screen())

    inference.main(["--prompt", "ab", "--temperature", "0", "--max-new-tokens", "3"])

    assert events == [
        *("ab", "flush"),
        *("draw", text[0], "flush"),
        *("draw", text[1], "flush"),
        *("draw", text[2], "flush"),
        *("\n", "flush"),
    ]


# --- the device ---------------------------------------------------------------------------------------


def in_a_new_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run inference.py; its exit code is 77 if it has imported PyTorch."""
    code = (
        "import sys, inference;"
        f"inference.main({[str(argument) for argument in arguments]!r});"
        "sys.exit(77 if 'torch' in sys.modules else 0)"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.parametrize("kind", ["export", "checkpoint", "bfloat16", "float16"])
def test_on_a_cpu_no_text_needs_pytorch(sample, train, text_file, workdir, kind, monkeypatch):
    monkeypatch.setattr(page_module, "write_report", lambda *_: None)
    monkeypatch.setattr(results_module, "SAMPLE_LENGTH", 4)
    flags: tuple[object, ...] = ("--run", "latest")
    if kind == "export":
        export(RUN, build())
    elif kind == "checkpoint":
        assert train("--data", text_file, *TINY, *QUIET_TRACKERS, "--max-iters", 2).code == 0
        shutil.rmtree(next(Path("runs").glob("2*")) / "artifacts/export")
    else:
        path = export(RUN, build())
        tensors = {name: tensor.to(getattr(torch, kind)) for name, tensor in load_file(path).items()}
        save_file(tensors, "other.safetensors")
        Path("text.txt").write_text("".join(VOCABULARY), encoding="utf-8")
        flags = ("--model", "other.safetensors", "--vocabulary", "text.txt")
    if not torch.cuda.is_available():
        assert in_a_new_process(*flags, "--max-new-tokens", 3).returncode == 0

    alone = in_a_new_process(*flags, "--device", "cpu", "--max-new-tokens", 20, "--num-samples", 2)

    assert (alone.returncode, alone.stdout) == (
        0,
        sample(*flags, "--max-new-tokens", 20, "--num-samples", 2).out,
    )
    assert len(alone.stdout) > 60


def test_on_another_device_the_model_itself_draws_the_same_text(sample, model, monkeypatch):
    flags = ("--prompt", "ab", "--max-new-tokens", 40, "--num-samples", 3, "--top-k", 5)
    on_cpu = sample(*flags)
    decoders: list[object] = []
    create = inference.create_decoder
    monkeypatch.setattr(inference, "find_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(inference, "create_decoder", lambda *a: decoders.append(create(*a)) or decoders[0])

    assert sample(*flags).out == on_cpu.out
    assert isinstance(decoders[0], CachedForward)


@pytest.mark.parametrize(("initialized", "gpus", "found"), [(0, 1, True), (0, 0, False), (100, 0, False)])
def test_a_gpu_is_looked_for_without_pytorch(monkeypatch, initialized, gpus, found):
    def count(pointer):
        pointer._obj.value = gpus
        return 0

    driver = SimpleNamespace(cuInit=lambda _: initialized, cuDeviceGetCount=count)
    monkeypatch.setattr(loading_module.ctypes, "CDLL", lambda name: driver)

    assert loading_module.may_have_gpu() is found


def test_without_a_driver_there_is_no_gpu(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(os.path, "exists", lambda path: False)
    for driver in (missing, lambda _: SimpleNamespace()):  # another library may have the driver's name
        monkeypatch.setattr(loading_module.ctypes, "CDLL", driver)
        assert not loading_module.may_have_gpu()
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/kfd")
    assert loading_module.may_have_gpu()


# --- interactive --------------------------------------------------------------------------------------


def test_prompts_are_continued_until_ctrl_d(sample, model, type_in):
    type_in("ab", "🙂")

    result = sample("--interactive", *GREEDY)

    assert result.code == 0
    assert result.out == f"{greedy(model, 'ab', 12)}\n{greedy(model, '🙂', 12)}\n\n"
    assert result.err.splitlines()[1:] == [dialogue_module.INTRODUCTION]


def test_an_empty_line_is_a_text_from_the_default_prompt(sample, model, type_in):
    type_in("")

    assert sample("--interactive", *GREEDY).out == greedy(model, "\n", 12)[1:] + "\n\n"


def test_one_prompt_twice_gives_two_texts_and_the_seed_decides_both(sample, model, type_in):
    outputs = []
    for _ in range(2):
        type_in("ab", "ab")
        outputs.append(sample("--interactive", "--max-new-tokens", 40, "--seed", 5).out)

    assert outputs[0] == outputs[1]
    assert outputs[0][:43] != outputs[0][43:86]


def test_ctrl_c_ends_a_text_and_asks_again(sample, model, type_in, monkeypatch):
    type_in("ab", "cd")
    next_token, draws = Sampling.next_token, []

    def interrupted(*arguments):
        draws.append(arguments)
        if len(draws) == 4:
            raise KeyboardInterrupt
        return next_token(*arguments)

    monkeypatch.setattr(Sampling, "next_token", interrupted)

    result = sample("--interactive", *GREEDY)

    assert result.code == 0
    assert result.out == f"{greedy(model, 'ab', 3)}\n{greedy(model, 'cd', 12)}\n\n"


def test_ctrl_c_at_the_prompt_asks_again(sample, model, type_in):
    type_in(KeyboardInterrupt, "ab")

    assert sample("--interactive", *GREEDY).out == f"\n{greedy(model, 'ab', 12)}\n\n"


def test_an_unknown_character_is_a_message_and_not_the_end(sample, model, type_in):
    type_in("aZ", "ab")

    result = sample("--interactive", *GREEDY)

    assert (result.code, result.out) == (0, f"{greedy(model, 'ab', 12)}\n\n")
    assert result.err.splitlines()[-2:] == [
        "error: not in the model's vocabulary: 'Z' (U+005A)",
        "hint: leave them out with :unknown skip, or :unknown replace",
    ]


def test_the_hint_about_unknown_characters_can_be_followed(sample, model, type_in):
    type_in("aZ", ":unknown", ":unknown skip", "aZ", ":unknown replace", "aZ", ":unknown error", "aZ")

    result = sample("--interactive", *GREEDY)

    assert result.out == f"{greedy(model, 'a', 12)}\n{greedy(model, 'a ', 12)}\n\n"
    assert [line for line in result.err.splitlines() if not line.startswith("hint")][2:] == [
        "error: not in the model's vocabulary: 'Z' (U+005A)",
        ":unknown error",
        ":unknown skip",
        ":unknown replace",
        ":unknown error",
        "error: not in the model's vocabulary: 'Z' (U+005A)",
    ]


def test_typed_bytes_that_are_no_text_are_an_unknown_character(sample, model, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"a\xff\nab\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)

    result = sample("--interactive", *GREEDY)

    assert (result.code, result.out) == (0, f"{greedy(model, 'ab', 12)}\n")
    assert "error: not in the model's vocabulary: '\ufffd' (U+FFFD)" in result.err


def test_commands_change_what_comes_after_them(sample, model, type_in):
    type_in(":temperature 0", ":length 3", "ab", ":length 12", "ab")

    result = sample("--interactive")

    assert result.out == f"{greedy(model, 'ab', 3)}\n{greedy(model, 'ab', 12)}\n\n"
    assert result.err.splitlines()[2:] == [":temperature 0.0", ":length 3", ":length 12"]


def test_top_k_and_top_p_can_be_switched_off_again(sample, model, type_in):
    likeliest = greedy(model, "ab", 30)
    for command in (":top-k 1", ":top-p 1e-9"):
        word = command.split()[0]
        type_in(command, "ab", f"{word} off", "ab")
        lines = sample("--interactive", "--max-new-tokens", 30)
        assert lines.out.startswith(likeliest + "\n")
        assert not lines.out.removeprefix(likeliest + "\n").startswith(likeliest)
        assert lines.err.splitlines()[-1] == f"{word} off"


def test_the_seed_begins_the_draws_anew(sample, model, type_in):
    type_in(":seed 5", "ab", "ab", ":seed 5", "ab")

    out = sample("--interactive", "--max-new-tokens", 40).out

    first, second, third = out[:43], out[43:86], out[86:129]
    assert first == third != second
    assert first == sample("--prompt", "ab", "--max-new-tokens", 40, "--seed", 5).out


def test_a_command_without_a_value_shows_the_present_one(sample, model, type_in):
    type_in(":top-k", ":length", ":seed")

    result = sample("--interactive", *GREEDY, "--seed", 8)

    assert result.err.splitlines()[2:] == [":top-k off", ":length 12", ":seed 8"]


@pytest.mark.parametrize(
    ("command", "errors"),
    [
        (
            ":temprature 1",
            [
                "error: unknown command :temprature; did you mean :temperature?",
                "hint: type :help, or :: for a prompt that begins with :",
            ],
        ),
        (":lenght", ["error: unknown command :lenght; did you mean :length?", ...]),
        (":qqq", ["error: unknown command :qqq", ...]),
        (":exit", ["error: unknown command :exit; did you mean :quit?", ...]),
        (":q", ["error: unknown command :q; did you mean :quit?", ...]),
        (":length x", ["error: :length: 'x' must be a whole number", "hint: :help explains every command"]),
        (":length 5 6", ["error: :length: '5 6' must be a whole number", ...]),
        (":temperature -1", ["error: :temperature: -1.0 must be at least 0", ...]),
        (":top-k 0", ["error: :top-k: 0 must be at least 1", ...]),
        (f":seed {2**63}", [f"error: :seed: {2**63} must be at most {2**63 - 1}", ...]),
        (
            ":unknown off",
            ["error: :unknown: invalid choice: 'off' (choose from 'error', 'skip', 'replace')", ...],
        ),
        (":", ["error: unknown command :", ...]),
    ],
)
def test_a_wrong_command_is_one_error_and_changes_nothing(sample, model, type_in, command, errors):
    type_in(command, "ab")

    result = sample("--interactive", *GREEDY)

    assert (result.code, result.out) == (0, f"{greedy(model, 'ab', 12)}\n\n")
    said = result.err.splitlines()[2:]
    assert [line[:6] for line in said] == ["error:", "hint: "]
    assert all(wanted in (..., line) for line, wanted in zip(said, errors, strict=True))


def test_a_prompt_may_begin_with_a_colon(sample, model, type_in):
    type_in("::a", "  ::a", "a::a")

    out = sample("--interactive", *GREEDY, "--unknown", "replace").out

    prompts = " a", "   a", "a  a"  # the model does not know the colon
    assert out == "".join(greedy(model, prompt, 12) + "\n" for prompt in prompts) + "\n"


def test_spaces_before_a_command_do_not_matter(sample, model, type_in):
    type_in("  :length 3", "\t:length", " ab", " :quit", "ab")

    result = sample("--interactive", *GREEDY)

    assert result.out == greedy(model, " ab", 3) + "\n\n"
    assert result.err.splitlines()[2:] == [":length 3", ":length 3"]


@pytest.mark.parametrize("word", ["exit", "quit", " exit()"])
def test_who_types_exit_is_told_how_to_leave(sample, model, type_in, word):
    type_in(word)
    result = sample("--interactive", *GREEDY, "--unknown", "replace")
    assert result.out == greedy(model, re.sub(r"[^abe]", " ", word), 12) + "\n\n"
    said = f"note: {word.strip()!r} is continued as a prompt; to leave: :quit, or Ctrl-D"
    assert result.err.splitlines()[2] == said
    type_in("exit the a")
    assert "note: 'exit" not in sample("--interactive", *GREEDY, "--unknown", "replace").err


def test_numbers_are_written_as_in_training(sample, model, type_in):
    type_in(":length 1_0", ":length 1e1", ":length 10.0", ":top-p 1e-9", ":top-k 1_0")

    result = sample("--interactive", "--max-new-tokens", "1e1", "--seed", "1_0")

    assert result.err.splitlines()[2:] == [*[":length 10"] * 3, ":top-p 1e-09", ":top-k 10"]
    ten = sample("--max-new-tokens", 10, "--seed", 10).out
    assert sample("--max-new-tokens", "1e1", "--seed", "1_0").out == ten


def test_help_lists_every_command_with_its_present_value(sample, model, type_in):
    type_in(":help top-k", ":quit", "ab")

    result = sample("--interactive", *GREEDY, "--top-k", 5)

    assert (result.code, result.out) == (0, "\n")
    for row in (r":length N [^:]*\(12\)", r":top-k N [^:]*\(5\)", r":top-p X [^:]*\(off\)", ":quit"):
        assert re.search(row, result.err)


def sample_in_child(*arguments: str) -> NoReturn:
    """Run inference.py in this process, a forked child, on the file descriptors 0 to 2, and exit."""
    code = 99
    try:
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        run_script(lambda: inference.main([*arguments]))
    except SystemExit as stop:
        sys.stdout.flush()  # as Python does at exit
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def test_at_a_terminal_ctrl_c_stops_a_text_and_ctrl_d_the_program(model):
    """A process with a terminal: history, a completed command, an endless text."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "dumb"
        sample_in_child("--interactive", "--max-new-tokens", "2")
    patience = threading.Timer(120, os.kill, (pid, signal.SIGKILL))
    patience.start()
    seen = ""

    def type_after(wanted: str, keys: bytes) -> None:
        nonlocal seen
        while wanted not in seen:
            seen += os.read(terminal, 4096).decode()
        seen = seen.split(wanted, 1)[1]
        os.write(terminal, keys)

    type_after("> ", b":le\t 100000000\n")
    type_after(":length 100000000\r\n", b"")
    type_after("> ", b"ab\n")
    type_after("ab\r\nab", b"\x03")
    type_after("\n> ", b":length 3\n")
    type_after("\n> ", b"\x10\x10\n")  # two lines back in the history
    type_after("\r\nab", b"")
    type_after("\n> ", b"\x04")
    with contextlib.suppress(OSError):
        while os.read(terminal, 4096):
            pass
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    patience.cancel()
    os.close(terminal)
    assert code == 0


# --- control characters -------------------------------------------------------------------------------

CONTROLS = sorted("ab[3m\n\t\r\x07\x1b\x7f\x9b")
DRAWN = "a\r\nb\rb\x1b[3m\x9b\x7f\t\r\r\n\x07a\r"
SHOWN = "a\nb␍b␛[3m\ufffd␡\t␍\n␇a\n"  # the last newline ends every text


@pytest.fixture
def drawing(workdir, monkeypatch):
    """A model that has the vocabulary CONTROLS and draws DRAWN."""
    export(RUN, build(vocabulary=CONTROLS))
    drawn = iter([np.array([CONTROLS.index(character)]) for character in DRAWN * 2])
    monkeypatch.setattr(Sampling, "next_token", lambda *_: next(drawn))


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_no_terminal_obeys_a_text_or_a_prompt(drawing, terminal, term):
    shown = terminal(term)

    inference.main(["--prompt", "b\x1b[3m\r\nb\r", "--max-new-tokens", str(len(DRAWN))])

    assert shown() == f"{RUN}/artifacts/export/model.safetensors\nb␛[3m\nb␍{SHOWN}"


def test_a_crlf_between_prompt_and_text_is_one_line_end(workdir, terminal, monkeypatch):
    export(RUN, build(vocabulary=CONTROLS))
    monkeypatch.setattr(Sampling, "next_token", lambda *_: np.array([CONTROLS.index("\n")]))
    shown = terminal()

    inference.main(["--prompt", "a\r", "--max-new-tokens", "1"])

    assert shown().endswith("model.safetensors\na\n\n")


def test_a_pipe_gets_every_byte_of_a_text(sample, drawing):
    result = sample("--prompt", "b\x1b[3m\r\nb\r", "--max-new-tokens", len(DRAWN))

    assert result.out.encode() == b"b\x1b[3m\r\nb\r" + DRAWN.encode() + b"\n"


def test_no_terminal_obeys_a_name_of_a_file(workdir, terminal):
    name = "evil\x1b[2J\x9b.safetensors"
    build().save_safetensors(name)
    shown = terminal()

    inference.main(["--model", name, "--max-new-tokens", "0"])

    assert shown() == "evil␛[2J\ufffd.safetensors\n\n"


def test_no_terminal_obeys_what_was_typed(sample, model, type_in, terminal):
    type_in(":\x1b[2J", ":length \x1b")
    shown = terminal()

    inference.main(["--interactive", "--max-new-tokens", "0"])

    text = re.sub(r"\x1b\[\d*m", "", shown())  # labels are bold
    assert "\x1b" not in text
    assert "error: unknown command :␛[2J\n" in text
    assert "error: :length: '\\x1b' must be a whole number\n" in text


# --- how it ends --------------------------------------------------------------------------------------


def test_a_closed_pipe_ends_it_quietly(model):
    (reader, output), (errors, error_output) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.dup2(output, 1)
        os.dup2(error_output, 2)
        sample_in_child("--max-new-tokens", "100000")
    os.close(output)
    os.close(error_output)
    assert len(os.read(reader, 5)) > 0
    os.close(reader)
    with open(errors, encoding="utf-8") as file:
        assert file.read() == f"{RUN}/artifacts/export/model.safetensors\n"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_ctrl_c_ends_it_without_a_traceback(sample, model, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Sampling, "next_token", interrupted)

    result = sample()

    assert result.code == 130
    assert result.err == f"{RUN}/artifacts/export/model.safetensors\ninterrupted\n"


def test_a_vocabulary_that_is_not_needed_is_a_warning(sample, model):
    result = sample("--prompt", "ab", *GREEDY, "--vocabulary", "nowhere.txt")

    assert (result.code, result.out) == (0, greedy(model, "ab", 12) + "\n")
    weights = f"{RUN}/artifacts/export/model.safetensors"
    warning = "warning: --vocabulary is not used: the model holds its own; leave the flag out"
    assert result.err.splitlines() == [warning, weights]


@pytest.mark.parametrize(
    ("text", "error", "hint"),
    [
        ("nowhere.txt", "nowhere.txt: no such text file", "check the path of --vocabulary"),
        ("data/input.txt", "data/input.txt: no such text file", "check the path of --vocabulary"),
        ("python-docs", "data/python-docs.txt: no such text file", "check the path of --vocabulary"),
        (
            "folder",
            "folder: this folder has no .txt or .txt.gz file",
            "put a text there, or name another: --vocabulary PATH",
        ),
    ],
)
def test_a_text_for_the_vocabulary_is_found_not_made(sample, model, text, error, hint):
    Path("folder").mkdir()
    weights = Path(RUN, "artifacts/export/model.safetensors")
    save_file(load_file(weights), "bare.safetensors")

    result = sample("--model", "bare.safetensors", "--vocabulary", text)

    assert (result.code, result.out, result.err) == (2, "", f"error: {error}\nhint: {hint}\n")
    assert not Path("data").exists()


def test_a_run_that_is_not_there_is_told_from_the_latest(sample, model):
    result = sample("--run", "nothing")

    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines() == [
        "error: nothing: no such run in runs, and no run directory",
        "hint: the latest is 2026-01-31_001_first",
    ]


def test_help_names_the_settings_with_their_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        inference.parse_command_line(["--help"])
    shown = capsys.readouterr().out
    settings = inference.parse_command_line([])
    for name in ("max_new_tokens", "temperature", "seed", "unknown", "num_samples", "device"):
        assert re.search(rf"--{name.replace('_', '-')} [^-]*\({getattr(settings, name)}\)", shown)
    assert (settings.max_new_tokens, settings.temperature, settings.num_samples) == (500, 1.0, 1)
    assert (settings.top_k, settings.top_p) == (None, None)


def test_the_largest_seed_serves_several_samples(sample, model):
    assert sample("--seed", 2**63 - 1, "--num-samples", 2, "--max-new-tokens", 2).code == 0


def test_a_named_run_without_weights_says_so(sample, model):
    Path("runs/2026-02-01_001/artifacts").mkdir(parents=True)

    result = sample("--run", "2026-02-01_001")

    assert result.code == 2
    assert result.err.splitlines()[0] == "error: 2026-02-01_001 has no weights yet"


def cut(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-1])
    return "not a whole safetensors file ("


def flip(path: Path) -> str:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return "damaged: its bytes do not match its SHA-256\n"


def strip_metadata(path: Path) -> str:
    save_file(load_file(path), path)
    return "it does not hold its vocabulary\n"


def pickle(path: Path) -> str:
    torch.save({"a": torch.zeros(1)}, path)
    return "this is a PyTorch pickle file (.pt), which could run code when it is read\n"


def complex_numbers(path: Path) -> str:
    header = b'{"a":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return "its numbers are of the type C64, which is not known\n"


@pytest.mark.parametrize("damage", [cut, flip, strip_metadata, pickle, complex_numbers])
def test_a_file_that_cannot_be_sampled_says_why(sample, model, damage):
    path = Path(RUN, "artifacts/export/model.safetensors")
    complaint = damage(path)

    result = sample()

    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {path}: {complaint}")
    assert len(result.err.splitlines()) == 2
