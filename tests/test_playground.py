"""The playground: the page of `inference.py --page` and that part of the report, in a browser."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import small_model
import torch
from browser import Browser, needs_chromium
from conftest import PROJECT, QUIET_TRACKERS, TINY
from test_report import only_run, page_of

import inference
from parameters import specs
from utils_alg1.base.text import without_controls
from utils_alg1.network.decoder import Decoder
from utils_alg1.network.scoring import score_tokens
from utils_alg1.network.weights import read_weights
from utils_alg1.report import playground
from utils_alg1.tracking.observer import attention_weights

LATIN = sorted("\n !'(),-.:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
CHINESE = [chr(code) for code in range(ord("一"), ord("一") + 300)]
HOSTILE = sorted("</script>!-\"'&`\\ ${}\r\n\té🙂\u2028ا\x1b")
SMALL = {"n_embd": 32, "n_head": 4, "n_layer": 2, "block_size": 16}
MODELS = {  # the vocabulary, and what is not the reference model
    "reference": (LATIN, {"n_embd": 64, "n_head": 4, "n_layer": 4, "block_size": 32}),
    "rotary": (LATIN, SMALL | {"positions": "rotary", "qk_norm": True, "zero_init": True}),
    "chinese": (CHINESE, SMALL),
    "hostile": (HOSTILE, SMALL),
    "one character of context": (LATIN, SMALL | {"block_size": 1}),
}
SCALE = 0.15  # deviation of the random weights: the likeliest character is clear, and not always the same


def build(name: str):
    """A model with random weights, whose greedy text varies."""
    vocabulary, sizes = MODELS[name]
    model = small_model.build(9, vocabulary, **sizes)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.mul_(SCALE / 0.6)
            if "ln" in parameter_name and parameter_name.endswith("weight"):
                parameter.add_(1)
    model.lm_head.weight.data.mul_(1.5)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the export and the page of each of the models."""
    folder = tmp_path_factory.mktemp("playground")
    for name in MODELS:
        build(name).save_safetensors(folder / f"{name}.safetensors")
        flags = ["--model", str(folder / f"{name}.safetensors"), "--page", str(folder / f"{name}.html")]
        assert inference.main(flags) == 0
    return folder


@pytest.fixture
def browser(chromium):
    """The browser; at the end of the test its page has said nothing and asked for nothing."""
    yield chromium
    assert (chromium.said, chromium.asked) == ([], [])


def fill(browser: Browser, **values: object) -> None:
    """Type into the fields of the playground."""
    for name, value in values.items():
        browser.evaluate(f"""(() => {{
            const field = document.getElementById("play-{name.replace("_", "-")}");
            field.value = {json.dumps(str(value))};
            field.dispatchEvent(new Event(field.tagName === "SELECT" ? "change" : "input"));
        }})()""")


def drawn(browser: Browser) -> str:
    return browser.evaluate("document.querySelector('#play-text pre').textContent")


def click(browser: Browser, button: str) -> None:
    browser.evaluate(f"document.getElementById('play-{button}').click()")


def draw(browser: Browser, **values: object) -> str:
    """Have a text continued; return it with its continuation."""
    fill(browser, **values)
    click(browser, "start")
    browser.wait("document.getElementById('play-stop').disabled")
    return drawn(browser)


def bars(browser: Browser, context: str) -> dict[str, float]:
    """The labels and probabilities of the bars, once they are those of a text that ends with `context`."""
    wanted = json.dumps([character.replace("\n", "↵\n") for character in context])
    browser.wait(
        "JSON.stringify([...document.querySelectorAll('#play-attention span')].map(s => s.textContent))"
        f" === JSON.stringify({wanted})"
    )
    found = browser.evaluate("""[...document.querySelectorAll("#play-probabilities li")].map(row => {
        const width = row.querySelector(".bar span").style.width;
        return [row.querySelector("code").textContent, parseFloat(width) / 100];
    })""")
    return dict(found)


def prompts(name: str) -> list[str]:
    vocabulary = [c for c in MODELS[name][0] if c not in "\r\n\t\x1b"]
    block_size = MODELS[name][1]["block_size"]
    rng = np.random.default_rng(2)
    return ["".join(rng.choice(vocabulary, n)) for n in (1, block_size, 2 * block_size + 3)]


def probabilities(model, text: str) -> np.ndarray:
    """Those of the next character (V)."""
    idx = torch.tensor([[model.vocabulary.index(character) for character in text]])
    with torch.no_grad():
        return model(idx)[0][0, -1].softmax(dim=-1).numpy()


# --- what the model answers ---------------------------------------------------------------------------


@needs_chromium
@pytest.mark.parametrize("name", MODELS)
def test_the_greedy_text_of_the_page_is_that_of_inference(name, folder, browser, sample):
    browser.open(folder / f"{name}.html")
    for prompt in prompts(name):
        flags = ["--model", folder / f"{name}.safetensors", "--temperature", 0, "--max-new-tokens", 200]
        result = sample(*flags, f"--prompt={prompt}")
        assert result.code == 0 and len(result.out) == len(prompt) + 201
        if name != "one character of context":  # what varies tells more
            assert len(set(result.out[len(prompt) :])) > 3
        assert draw(browser, prompt=prompt, temperature=0, length=200) == without_controls(result.out)[:-1]


@needs_chromium
@pytest.mark.parametrize("name", MODELS)
def test_the_bars_are_the_probabilities_of_the_model(name, folder, browser):
    browser.open(folder / f"{name}.html")
    model = build(name)
    for prompt in prompts(name):
        fill(browser, prompt=prompt)
        context = prompt[-model.config.block_size :]
        expected = probabilities(model, context)
        shown = bars(browser, context)
        labels = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\x1b": "␛", "\u2028": "U+2028"}
        order = [
            labels.get(model.vocabulary[token], model.vocabulary[token]) for token in (-expected).argsort()
        ]
        assert list(shown.values()) == pytest.approx(-np.sort(-expected)[:10], abs=1e-3)
        assert next(iter(shown)) == order[0] and set(shown) <= set(order[:12])


@needs_chromium
@pytest.mark.parametrize("name", ["reference", "rotary"])
def test_the_worker_computes_the_probabilities_and_the_attention_of_each_head(name, folder, browser):
    model = build(name)
    text = prompts(name)[1]
    tokens = [model.vocabulary.index(character) for character in text]
    expected = attention_weights(model, torch.tensor([tokens]))
    browser.open(folder / f"{name}.html")
    for layer, head in (0, 0), (model.config.n_layer - 1, model.config.n_head - 1), (1, 2):
        found = browser.evaluate(f"""new Promise(resolve => {{
            const contentOf = id => document.getElementById(id).textContent;
            const model = JSON.parse(contentOf("playground"));
            const source = new Blob([contentOf("model")]);
            const worker = new Worker(URL.createObjectURL(source));
            worker.onmessage = ({{ data }}) => resolve([[...data.probabilities], [...data.attention]]);
            worker.postMessage({{ kind: "load", ...model }});
            worker.postMessage({{ kind: "look", tokens: {tokens}, layer: {layer}, head: {head} }});
        }})""")
        assert found[0] == pytest.approx(probabilities(model, text), abs=2e-4)
        assert found[1] == pytest.approx(expected[layer, head].ravel(), abs=2e-4)


@needs_chromium
def test_a_seed_draws_one_text_and_top_k_leaves_out_what_is_unlikely(folder, browser):
    browser.open(folder / "reference.html")
    greedy = draw(browser, prompt="To be", temperature=0, length=150)
    first = draw(browser, temperature=1, seed=1)
    assert len(first) == len("To be") + 150 and first != greedy
    assert draw(browser, seed=2) != first == draw(browser, seed=1)
    assert draw(browser, top_k=1) == greedy
    model = build("reference")
    two = np.argsort(-probabilities(model, "To be"))[:2]
    firsts = {draw(browser, top_k=2, length=1, seed=seed)[-1] for seed in range(20)}
    assert firsts == {model.vocabulary[token] for token in two}


@needs_chromium
def test_characters_are_drawn_as_often_as_they_are_likely(folder, browser):
    browser.open(folder / "one character of context.html")
    model = build("one character of context")
    temperature = 2.0
    text = draw(browser, prompt="", temperature=temperature, length=20_000)
    after = max(set(text), key=text.count)
    idx = torch.tensor([[model.vocabulary.index(after)]])
    with torch.no_grad():
        expected = (model(idx)[0][0, -1] / temperature).softmax(dim=-1).numpy()
    followers = [text[i + 1] for i in range(len(text) - 1) if text[i] == after]
    counts = np.array([followers.count(character) for character in model.vocabulary])
    deviations = np.sqrt(len(followers) * expected * (1 - expected)) + 1
    assert len(followers) > 500
    assert (np.abs(counts - len(followers) * expected) < 5 * deviations).all()


# --- how the page behaves -----------------------------------------------------------------------------


@needs_chromium
def test_stop_stops_and_the_page_stays_alive_meanwhile(folder, browser):
    browser.open(folder / "reference.html")
    whole = draw(browser, prompt="Ay", temperature=1, length=300)
    fill(browser, length=100_000)
    click(browser, "start")
    browser.wait("document.querySelector('#play-text pre').textContent.length > 300")
    fill(browser, prompt="Or not")
    assert bars(browser, "Or not")  # which the worker computed in between
    assert browser.evaluate("document.getElementById('play-start').disabled")
    click(browser, "stop")
    text = drawn(browser)
    assert text.startswith(whole) and len(text) < 100_000
    assert browser.evaluate("document.getElementById('play-stop').disabled")
    assert draw(browser, prompt="Ay", length=300) == whole  # takes longer than what was under way
    assert drawn(browser) == whole


@needs_chromium
def test_a_worker_that_is_stopped_draws_no_more(folder, browser):
    browser.open(folder / "reference.html")
    kinds = browser.evaluate("""new Promise(resolve => {
        const contentOf = id => document.getElementById(id).textContent;
        const worker = new Worker(URL.createObjectURL(new Blob([contentOf("model")])));
        const kinds = [];
        worker.onmessage = ({ data }) => {
            kinds.push(data.kind);
            if (kinds.length > 1) return;
            worker.postMessage({ kind: "stop" });
            worker.postMessage({ kind: "look", tokens: [0], layer: 0, head: 0 });
            setTimeout(() => resolve(kinds), 500);
        };
        worker.postMessage({ kind: "load", ...JSON.parse(contentOf("playground")) });
        const settings = { temperature: 1, topK: 5, seed: 1 };
        worker.postMessage({ kind: "generate", job: 1, tokens: [0], length: 1e6, ...settings });
    })""")
    assert kinds[0] == "drawn" and kinds[-1] == "seen" and "seen" not in kinds[:-1]


@needs_chromium
def test_an_empty_prompt_is_that_of_inference_and_nothing_is_shown_of_it(folder, browser, sample):
    browser.open(folder / "reference.html")
    flags = ["--model", folder / "reference.safetensors", "--temperature", 0, "--max-new-tokens", 40]
    assert draw(browser, prompt="", temperature=0, length=40) == sample(*flags).out.removesuffix("\n")
    assert bars(browser, "\n")


@needs_chromium
def test_what_the_model_does_not_know_is_left_out_and_named(folder, browser):
    def note() -> str:
        return browser.evaluate("document.getElementById('play-unknown').textContent")

    browser.open(folder / "hostile.html")
    fill(browser, prompt="<s日c日本\u200b>")
    assert bars(browser, "<sc>") and note() == "left out, as the model does not know them: 日 本 U+200B"
    fill(browser, prompt="e\u0301🙂")  # known in one piece only
    assert bars(browser, "é🙂") and note() == ""
    assert draw(browser, temperature=0, length=5).startswith("é🙂")


@needs_chromium
def test_a_line_end_of_two_characters_is_one(folder, browser):
    models = (small_model.build(seed, ["\n", "\r"], block_size=1) for seed in range(100))
    model = next(m for m in models if small_model.greedy(m, "\n", 4) == "\n\r\n\r\n")
    model.save_safetensors(folder / "ends.safetensors")
    flags = ["--model", folder / "ends.safetensors", "--page", folder / "ends.html"]
    assert inference.main([*map(str, flags)]) == 0
    browser.open(folder / "ends.html")
    for length, last in (20_000, ""), (20_001, "␍"):  # in so many pieces that some end between the two
        assert draw(browser, prompt="", temperature=0, length=length) == length // 2 * "\n" + last
    assert browser.evaluate(r"visible('\r\r\n\n\r')") == "␍\n\n␍"


@needs_chromium
def test_values_out_of_range_are_taken_as_their_limits(folder, browser):
    browser.open(folder / "reference.html")
    greedy = draw(browser, prompt="No", temperature=0, length=20)
    assert draw(browser, temperature=-3) == greedy
    assert draw(browser, length=-1) == greedy[:3]
    assert len(draw(browser, length="", temperature="", seed="", top_k="")) == 502


@needs_chromium
def test_the_fields_show_the_values_that_are_used(folder, browser):
    browser.open(folder / "reference.html")
    names = ("temperature", "top-k", "length", "seed")
    shown = f"{json.dumps(names)}.map(name => document.getElementById('play-' + name).value)"
    defaults = browser.evaluate(shown)
    assert defaults == ["0.8", "", "500", "1"]
    expected = draw(browser, prompt="No")
    assert draw(browser, length="", temperature="", seed="", top_k="") == expected
    assert browser.evaluate(shown) == defaults
    draw(browser, length=-5, temperature=-5, seed=-5, top_k=0)
    assert browser.evaluate(shown) == ["0", "1", "1", "0"]
    draw(browser, length=2.6, temperature=0.25, seed=5e9, top_k=2.4)
    assert browser.evaluate(shown) == ["0.25", "2", "3", "4294967295"]


@needs_chromium
def test_a_long_text_scrolls_in_its_own_place_to_its_end(folder, browser):
    browser.open(folder / "reference.html")
    draw(browser, prompt="To be or not\n" * 2000, length=3000, temperature=1)
    text = "document.querySelector('#play-text pre')"
    assert browser.evaluate(f"{text}.clientHeight < 600 && {text}.scrollHeight > 10_000")
    assert browser.evaluate(f"{text}.scrollTop + {text}.clientHeight > {text}.scrollHeight - 4")


@needs_chromium
def test_a_small_probability_is_not_shown_as_none(folder, browser):
    browser.open(folder / "reference.html")
    found = browser.evaluate("[0, 1e-9, 0.00049, 0.0005, 0.0123, 0.5, 1].map(percent)")
    assert found == ["< 0.1 %", "< 0.1 %", "< 0.1 %", "0.1 %", "1.2 %", "50 %", "100 %"]


@needs_chromium
def test_hover_and_keys_choose_whose_attention_is_shown(folder, browser):
    browser.open(folder / "reference.html")
    text, model = "Who goes", build("reference")
    fill(browser, prompt=text)
    bars(browser, text)
    idx = torch.tensor([[model.vocabulary.index(character) for character in text]])
    weights = attention_weights(model, idx)
    spans = "document.querySelectorAll('#play-attention span')"

    def assert_shown(layer: int, head: int, chosen: int) -> None:
        row = weights[layer, head, chosen]
        expected = np.sqrt(row / row.max()).round(2).tolist()
        browser.wait(f"[...{spans}].findIndex(s => s.className === 'chosen') === {chosen}")
        shares = f"[...{spans}].map(s => parseFloat(s.style.getPropertyValue('--share')) / 55)"
        browser.wait(f"{shares}.every((share, i) => Math.abs(share - {expected}[i]) < 0.01)")
        said = browser.evaluate("document.querySelector('#play-attention output').textContent")
        names = [text[i].replace(" ", "␣") for i in np.argsort(-row)[:3]]
        assert said.startswith(f"{text[chosen].replace(' ', '␣')} looks at: {names[0]} ")
        assert re.findall(r"(\S) [\d.]+ %", said) == names[: chosen + 1]

    assert_shown(0, 0, len(text) - 1)
    browser.evaluate(f"{spans}[4].dispatchEvent(new PointerEvent('pointerover', {{ bubbles: true }}))")
    assert_shown(0, 0, 4)
    for key, chosen in ("ArrowLeft", 3), ("ArrowRight", 4), ("ArrowRight", 5):
        press = f"new KeyboardEvent('keydown', {{ key: '{key}', bubbles: true }})"
        browser.evaluate(f"document.querySelector('#play-attention pre').dispatchEvent({press})")
        assert_shown(0, 0, chosen)
    browser.evaluate(f"{spans}[0].dispatchEvent(new PointerEvent('pointerover', {{ bubbles: true }}))")
    assert_shown(0, 0, 0)
    fill(browser, layer=3, head=2)
    assert_shown(3, 2, len(text) - 1)


@needs_chromium
@pytest.mark.parametrize("name", ["chinese", "hostile"])
def test_the_page_of_a_model_is_as_wide_as_a_phone(name, folder, browser):
    browser.open(folder / f"{name}.html", width=400)
    draw(browser, prompt=MODELS[name][0][-3] * 300, temperature=0, length=300)
    bars(browser, MODELS[name][0][-3] * 16)
    assert browser.evaluate("document.documentElement.scrollWidth <= 400 && innerWidth === 400")
    unlabelled = browser.evaluate(
        "[...document.querySelectorAll('input, select, textarea')].filter(e => e.labels.length !== 1).length"
    )
    assert unlabelled == 0


@needs_chromium
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_logits_that_are_not_finite_are_told(value, tmp_path, browser):
    model = build("hostile")
    model.ln_f.weight.data.fill_(value)
    model.lm_head.weight.data.mul_(1000)
    model.save_safetensors(tmp_path / "m.safetensors")
    flags = ["--model", tmp_path / "m.safetensors", "--page", tmp_path / "m.html"]
    assert inference.main([*map(str, flags)]) == 0
    browser.open(tmp_path / "m.html")
    assert draw(browser, prompt="s", temperature=1) == "s"
    status = "document.getElementById('play-status').textContent"
    assert browser.evaluate(status) == "the model's logits are not finite"


# --- the report ---------------------------------------------------------------------------------------


@pytest.fixture
def start(train, text_file, monkeypatch):
    """Starts a tiny run without pictures."""
    for name in ("draw_loss_curve", "draw_attention"):
        monkeypatch.setattr(f"utils_alg1.report.pictures.{name}", lambda *_: b"")
    return lambda *flags: train("--data", text_file, *TINY, *QUIET_TRACKERS, *flags)


@needs_chromium
def test_the_report_has_the_exported_model_and_colours_the_held_out_text(start, browser, sample):
    assert start("--max-iters", 40, "--learning-rate", 0.02).code == 0
    run = only_run()
    held_out = page_of(run).data["held_out"]
    text = Path("text.txt").read_text(encoding="utf-8")
    text = text[int(0.9 * len(text)) :][:1000]
    assert "".join(held_out["characters"]) == text
    weights = read_weights(run / "artifacts/export/model.safetensors")
    tokens = np.array([weights.vocabulary.index(character) for character in text])
    (losses,) = [np.concatenate([*score_tokens(Decoder(weights.config, weights.tensors), [tokens])])]
    assert held_out["losses"][0] is None and held_out["losses"][1:] == pytest.approx(losses, abs=6e-4)

    browser.open(run / "eval/report.html", width=1000)
    opening = playground.opening(text)
    assert browser.evaluate("document.getElementById('play-prompt').value") == opening != ""
    assert len(bars(browser, opening[-weights.config.block_size :])) == 10
    tops = "[...document.querySelector('.cards').children].map(card => card.offsetTop)"
    assert list(Counter(browser.evaluate(tops)).values()) == [4, 3]

    browser.open(run / "eval/report.html", width=400)
    flags = ["--run", run, "--prompt", "The", "--temperature", 0, "--max-new-tokens", 60]
    assert draw(browser, prompt="The", temperature=0, length=60) == sample(*flags).out.removesuffix("\n")
    assert browser.evaluate("document.documentElement.scrollWidth <= 400")
    spans = "document.querySelectorAll('#held-out span')"
    shares = browser.evaluate(f"[...{spans}].map(s => parseFloat(s.style.getPropertyValue('--share')) / 55)")
    evenly = math.log(len(weights.vocabulary))
    assert shares[1:] == pytest.approx(np.minimum(1, losses / evenly), abs=2e-3) and shares[0] == 0
    browser.evaluate(f"{spans}[3].dispatchEvent(new PointerEvent('pointerover', {{ bubbles: true }}))")
    said = browser.evaluate("document.querySelector('#held-out output').textContent")
    assert f"{text[3].replace(' ', '␣')} had a probability of " in said and f": {losses[2]:.2f} nats" in said


@pytest.mark.parametrize(
    ("text", "opening"),
    [
        ("\n\nFirst Citizen:\nBefore we proceed", "First Citizen:"),
        ("Before we proceed any further, hear me speak.", "Before we proceed"),
        ("Twenty characters it", "Twenty characters it"),
        ("Twenty characters it is", "Twenty characters it"),
        ("\u5929" * 30, "\u5929" * 20),
        (" \n", ""),
    ],
)
def test_a_report_begins_with_the_first_words_of_the_held_out_text(text, opening):
    assert playground.opening(text) == opening


def test_without_a_playground_the_report_names_the_command(start, monkeypatch, sample):
    assert start("--no-playground", "--run-tag", "off").code == 0
    monkeypatch.setattr(playground, "LARGEST_IN_REPORT", 100)
    assert start("--run-tag", "large").code == 0
    for path in Path("runs").glob("2*"):
        page = page_of(path)
        assert page.all("textarea") == [] and len(page.texts["script"]) == 2
        assert page.data["held_out"]["characters"]
        command = next(text for text in page.texts["code"] if text.startswith("python "))
        assert command == f"python inference.py --run {path} --page playground.html"
        assert sample(*command.split()[2:]).code == 0 and Path("playground.html").exists()


def test_the_trials_of_a_search_have_none(text_file):
    from utils_alg1.console.command_line import Options
    from utils_alg1.search.space import Plan

    def flags(**given) -> list[str]:
        return Plan({}, Options(given), {}, {}, "", "").arguments({})

    assert flags() == ["--no-playground"]
    assert flags(playground=True) == ["--playground"]
    assert specs()["playground"].may_change


# --- inference.py --page ------------------------------------------------------------------------------


def test_a_page_is_written_without_pytorch_and_replaces_an_older_one(folder, tmp_path):
    code = "import sys, inference; inference.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    flags = ["--model", folder / "hostile.safetensors", "--page", tmp_path / "friend.html"]
    command = [sys.executable, "-c", code, *map(str, flags)]
    for _ in range(2):
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{tmp_path}/friend.html: 0.1 MB, for any browser, without a network\n"
        assert done.stderr == f"{folder}/hostile.safetensors\n"
    assert (tmp_path / "friend.html").read_bytes() == (folder / "hostile.html").read_bytes()


def test_the_weights_in_a_page_are_those_of_the_export_to_sixteen_bits(folder):
    source = (folder / "hostile.html").read_text("utf-8")
    values = json.loads(re.search('id="playground">(.*?)</script>', source)[1])
    assert values["vocabulary"] == HOSTILE and values["default_prompt"] == "\n"
    tensors = read_weights(folder / "hostile.safetensors").tensors
    assert {name: tuple(shape) for name, shape in values["shapes"]} == {
        n: t.shape for n, t in tensors.items()
    }
    integers = np.frombuffer(base64.b64decode(values["integers"]), "<i2").astype(np.float64)
    scales = np.frombuffer(base64.b64decode(values["scales"]), "<f4")
    for name, shape in values["shapes"]:
        size, n_rows = math.prod(shape), math.prod(shape[:-1])
        of_row, scales = scales[:n_rows, None], scales[n_rows:]
        found, integers = integers[:size].reshape(n_rows, -1) * of_row, integers[size:]
        expected = tensors[name].reshape(n_rows, -1)
        assert (np.abs(found - expected) <= np.abs(expected).max(axis=1, keepdims=True) / 65_000).all()
    assert len(integers) == len(scales) == 0


def test_sixteen_bits_hold_zeros_and_numbers_of_all_sizes():
    tensor = np.array([[0, 0, 0], [1e30, -1e30, 3e29], [1e-30, 0, -1e-30]], np.float32)
    integers, scales = playground.quantize(tensor)
    assert (integers.dtype, scales.dtype, scales.shape) == ("<i2", "<f4", (3, 1))
    assert (integers * scales)[0].tolist() == [0, 0, 0]
    assert integers[1:].tolist() == [[32767, -32767, 9830], [32767, 0, -32767]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--page", "text.txt"], "--page text.txt: this file is not a page of a model"),
        (["--page", "no/p.html"], "--page no/p.html: there is no folder no"),
        (["--page", "."], "--page .: this is a folder"),
        (["--page", "-"], "--page -: a page of a model is not written to standard output"),
        (["--page", "p.html", "--prompt", "a"], "not allowed with argument"),
        (["--page", "p.html", "--seed", "3"], "--page draws no text: leave --seed out"),
        (["--page", "p.html", "--device", "cpu"], "--page draws no text: leave --device out"),
        (["--score", "text.txt", "--top-k", "3"], "--score draws no text: leave --top-k out"),
        (["--page", ""], "--page: must not be empty"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(flags, message, folder, text_file, sample):
    before = text_file.read_bytes()
    result = sample("--model", folder / "hostile.safetensors", *flags)
    assert result.code == 2 and result.err.splitlines()[0].startswith("error: ") and message in result.err
    assert [path.name for path in Path().iterdir()] == ["text.txt"] and text_file.read_bytes() == before


def test_a_model_that_no_browser_can_read_is_refused(folder, workdir, sample, monkeypatch):
    monkeypatch.setattr(playground, "LARGEST_PAGE", 1000)
    result = sample("--model", folder / "hostile.safetensors", "--page", "p.html")
    assert result.code == 2 and "is too large for a page" in result.err and "1,000" in result.err
    assert not Path("p.html").exists()
