"""The results of a run in eval/: final.json, the loss and attention pictures, and the report page."""

from __future__ import annotations

import datetime
import io
import json
import logging
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUIET_TRACKERS, TINY
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.image import imread

from model import BigramLanguageModel
from parameters import specs
from utils import Tokenizer
from utils_alg1.base import text as text_module
from utils_alg1.base.files import write_or_warn
from utils_alg1.base.summaries import Image
from utils_alg1.report import page as page_module
from utils_alg1.report import pictures as pictures_module
from utils_alg1.report.charts import Line, chart, downsample, tick_labels, ticks
from utils_alg1.report.page import build_page, escape
from utils_alg1.run_directory import list_runs
from utils_alg1.tracking.metrics_file import read_curves
from utils_alg1.tracking.observer import attention_weights

HOSTILE = (
    "</script><img src=x onerror=alert(1)></pre></main><style>*{display:none}</style>\n"
    "<!-- &amp; &#0; \"quotes\" 'more' 中文字 🙂👩‍🚀 \u202eback\u202c ا ب\n\ttab <svg/onload=alert(2)>"
)
VOID = {"meta", "link", "img"}


@pytest.fixture
def start(train, text_file, monkeypatch):
    """Starts a tiny run without loss.png, which these tests do not need."""
    monkeypatch.setattr("utils_alg1.report.pictures.draw_loss_curve", lambda *_: None)
    return lambda *flags: train("--data", text_file, *TINY, *QUIET_TRACKERS, *flags)


def only_run() -> Path:
    (run,) = list_runs("runs")
    return run


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "logs/metrics.jsonl").read_text().splitlines()]


class Page(HTMLParser):
    """A parsed page: its elements with their attributes, its texts, its tables as rows of cells.

    Parsing fails if the elements are not properly nested.
    """

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}  # of each element of a kind
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in VOID or (self._open and self._open[-1] in ("path", "polyline")):
            return
        self._open.append(tag)
        self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        for tag in self._open:
            self.texts[tag][-1] += data
        if self._open and ("td" in self._open or "th" in self._open):
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def curve(self, kind: str) -> list[tuple[float, float]]:
        """Return the points of the first curve of a kind, in SVG coordinates."""
        (points, *_) = [a["points"] for a in self.all("polyline") if kind in a["class"].split()]
        return [tuple(map(float, point.split(","))) for point in points.split()]


def page_of(run: Path) -> Page:
    return Page((run / "eval/report.html").read_text(encoding="utf-8"))


# --- final.json ---------------------------------------------------------------------------------------


def test_final_figures_follow_from_the_metrics_and_the_weights(start):
    assert start("--learning-rate", 0.5, "--grad-accum-steps", 2).code == 0
    run = only_run()
    final = json.loads((run / "eval/final.json").read_text())
    evaluations = [row for row in metrics(run) if "loss/val" in row]
    last, best = evaluations[-1], min(evaluations, key=lambda row: row["loss/val"])
    assert last["loss/val"] > best["loss/val"]  # a learning rate so large tells the two apart
    assert (final["val_loss"], final["train_loss"]) == (last["loss/val"], last["loss/train"])
    assert (final["best_val_loss"], final["best_step"]) == (best["loss/val"], best["step"])
    assert final["perplexity"] == pytest.approx(math.e ** last["loss/val"], rel=1e-12)
    assert final["bits_per_character"] == pytest.approx(last["loss/val"] / 0.6931471805599453, rel=1e-12)
    assert final["best_perplexity"] == pytest.approx(math.e ** best["loss/val"], rel=1e-12)
    assert final["best_bits_per_character"] == pytest.approx(best["loss/val"] / 0.6931471805599453, rel=1e-12)
    assert final["tokens"] == 6 * 2 * 2 * 8  # steps, micro-batches, sequences, characters
    # The seconds are rounded to a thousandth and the speed to a tenth.
    slowest, fastest = (final["tokens"] / (final["seconds_in_loop"] + off) for off in (0.0005, -0.0005))
    assert slowest - 0.05 <= final["tokens_per_second_overall"] <= fastest + 0.05
    assert final["wall_seconds"] >= final["seconds_in_loop"] > 0
    model = BigramLanguageModel().load_safetensors(run / "artifacts/export/model.safetensors")
    assert final["n_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    finished = datetime.datetime.fromisoformat(final["finished_at"])
    age = datetime.datetime.now(datetime.UTC) - finished
    assert datetime.timedelta(seconds=-1) <= age < datetime.timedelta(hours=1)


def test_bits_per_character_are_the_loss_to_the_base_of_two():
    assert text_module.bits_per_character(math.log(8)) == pytest.approx(3, rel=1e-15)
    assert text_module.format_loss(math.log(8)) == "2.0794 (perplexity 8.00, 3.000 bits per character)"


def test_a_perplexity_past_every_number_is_none():
    assert text_module.perplexity(1e4) is None


# --- the loss picture ---------------------------------------------------------------------------------


@pytest.fixture
def draw_loss(tmp_path, monkeypatch):
    """Draws the loss picture of metrics rows and returns the axes."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k)
    )

    def draw(rows, title="2026-01-31_001"):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pictures_module.draw_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png", title)
        assert decoded((tmp_path / "loss.png").read_bytes()).shape == (540, 960, 3)
        return figures[-1].axes[0]

    return draw


def evaluated(step: int, train: float, val: float) -> dict[str, float]:
    return {"step": step, "loss/train": train, "loss/val": val, "learning_rate": 0.1}


def steps_shown(axes) -> list[float]:
    low, high = axes.get_xlim()
    return [x for x in axes.get_xticks() if low <= x <= high]


def test_the_loss_picture_of_one_step_has_a_dot_and_whole_steps(draw_loss):
    each = {"step": 0, "loss/train_step": 4.0, "learning_rate": 0.1, "gradient_norm": 1.0}
    axes = draw_loss([evaluated(0, 4.1, 4.2), each, evaluated(1, 3.1, 3.2)])
    shown = {line.get_label(): line for line in axes.lines}
    assert shown["train, each step"].get_xydata().tolist() == [[0, 4.0]]
    assert shown["train"].get_xydata().tolist() == [[0, 4.1], [1, 3.1]]
    assert shown["val"].get_xydata().tolist() == [[0, 4.2], [1, 3.2]]
    assert [line.get_marker() for line in axes.lines] == ["o", "", ""]
    assert steps_shown(axes) == [0, 1]
    assert steps_shown(draw_loss([evaluated(7, 4.1, 4.2)])) == [7]


def test_the_loss_picture_holds_what_the_font_lacks_and_what_looks_like_mathematics(
    draw_loss, recwarn, caplog
):
    tag = "2026-01-31_001_中文_$x^2$_$\\frac$" + 60 * "W"
    assert draw_loss([evaluated(0, 4.1, 4.2), evaluated(9, 3.1, 3.2)], tag).get_title("left") == tag
    assert recwarn.list == [] == [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("loss", [0.0, 1e-9, 5e-324, 1e30, 1.7e308])
def test_the_loss_picture_holds_any_loss(draw_loss, recwarn, loss):
    axes = draw_loss([evaluated(0, -loss, 0.0), evaluated(9, loss, loss)])
    assert (
        axes.lines[1].get_ydata().tolist() == [-min(loss, 1e100), min(loss, 1e100)]
        if loss > 1e-300
        else [0, 0]
    )
    assert np.isfinite(axes.get_ylim()).all() and recwarn.list == []


def test_no_loss_picture_of_before_a_resume_stays(train, text_file):
    assert train("--data", text_file, *TINY, *QUIET_TRACKERS).code == 0
    run = only_run()
    before = (run / "eval/loss.png").read_bytes()
    assert train("--resume", "latest", "--max-iters", 8).code == 0
    assert (run / "eval/loss.png").read_bytes() != before

    class Done:
        run_id, eval_dir, metrics_path = run.name, run / "eval", run / "gone.jsonl"

    warnings: list[str] = []

    class FakeConsole:
        warn = staticmethod(warnings.append)

    pictures_module.try_loss_curve(Done, FakeConsole)
    assert warnings == [f"no loss curve was drawn: {run / 'gone.jsonl'}: no evaluation in it"]
    assert not (run / "eval/loss.png").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_in_no_curve(draw_loss, tmp_path, value):
    each = {"step": 4, "loss/train_step": value, "learning_rate": 0.1, "gradient_norm": value}
    axes = draw_loss([evaluated(0, 4.1, 4.2), evaluated(4, value, value), each, evaluated(9, 3.1, 3.2)])
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [],
        [[0, 4.1], [9, 3.1]],
        [[0, 4.2], [9, 3.2]],
    ]
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert (curves.val, curves.each_step, curves.gradient_norm) == ([(0, 4.2), (9, 3.2)], [], [])


# --- the attention picture ----------------------------------------------------------------------------


def colours(weights: np.ndarray, side: int) -> np.ndarray:
    """Return the expected pixels of a square of weights: (side, side, 3) uint8."""
    table = (colormaps["magma"](np.arange(256))[:, :3] * 255 + 0.5).astype(np.uint8)
    rows = [[table[round(255 * math.sqrt(w))] for w in row] for row in weights.tolist()]
    factor = side // len(weights)
    return np.array(rows).repeat(factor, axis=0).repeat(factor, axis=1)


def decoded(png: bytes) -> np.ndarray:
    return (imread(io.BytesIO(png), format="png")[..., :3] * 255 + 0.5).astype(np.uint8)


def test_the_attention_picture_holds_every_weight_at_its_place():
    weights = np.tril(np.random.default_rng(0).random((2, 3, 5, 5)))
    weights /= weights.sum(axis=-1, keepdims=True)
    pictures = [
        Image("attention", {"layer": str(layer), "head": str(head)}, weights[layer, head])
        for layer in range(2)
        for head in range(3)
    ]
    picture = decoded(pictures_module.draw_attention(pictures, "2026-01-31_001 中 $x$"))
    side = 160  # 5 weights of 32 pixels; 16 between two squares, 40 to the left of them, 80 above them
    assert picture.shape == (80 + 2 * (side + 16), 40 + 3 * (side + 16), 3)
    for layer in range(2):
        for head in range(3):
            top, left = 80 + layer * (side + 16), 40 + head * (side + 16)
            found = picture[top : top + side, left : left + side].astype(int)
            assert np.abs(found - colours(weights[layer, head], side)).max() <= 1
            assert (picture[top - 1, left : left + side] == (0x11, 0x13, 0x18)).all()


def test_of_many_layers_some_are_shown_with_the_first_and_the_last():
    assert pictures_module.evenly_spaced(1) == [0]
    assert pictures_module.evenly_spaced(12) == list(range(12))
    assert pictures_module.evenly_spaced(23) == list(range(0, 23, 2))
    pictures = [Image("attention", {"layer": str(i), "head": "0"}, np.eye(4)) for i in range(30)]
    assert decoded(pictures_module.draw_attention(pictures, "")).shape == (80 + 12 * 176, 40 + 176, 3)


def test_a_title_wider_than_the_attention_picture_is_cut_short():
    pictures = [Image("attention", {"layer": "0", "head": "0"}, np.eye(4))]
    picture = decoded(pictures_module.draw_attention(pictures, "2026-01-31_001_" + 60 * "e"))
    assert picture.shape == (80 + 176, 40 + 176, 3)
    beside = (picture[:40] == (0x11, 0x13, 0x18)).all(axis=(0, 2))
    assert beside[-8:].all() and not beside[-40:].all()  # all that there is ends near the right edge


def test_the_attention_picture_is_that_of_the_exported_weights_and_the_text_on_the_page(start):
    assert start("--learning-rate", 0.01).code == 0
    run = only_run()
    text = page_of(run).texts["pre"][-1].removeprefix("\n")
    assert len(text) == 8
    model = BigramLanguageModel().load_safetensors(run / "artifacts/export/model.safetensors").eval()
    idx = torch.tensor([Tokenizer(model.vocabulary).encode(text)])
    picture = decoded((run / "eval/attention.png").read_bytes())
    assert picture.shape == (80 + 176, 40 + 2 * 176, 3)
    for head, weights in enumerate(attention_weights(model, idx)[0]):
        left = 40 + head * 176
        found = picture[80:240, left : left + 160].astype(int)
        assert (
            np.abs(found - colours(weights, 160)).max() <= 2
        )  # where the root is half-way between two greys


# --- the page -----------------------------------------------------------------------------------------


@pytest.fixture
def run(start):
    """A finished run with some parameters that are not the defaults."""
    assert start("--run-tag", "my try", "--dropout", 0.25).code == 0
    return only_run()


def test_the_page_holds_every_parameter_and_first_those_that_differ(run):
    page = page_of(run)
    record = json.loads((run / "meta/full_config.json").read_text())
    changed, everything = page.tables[:2]
    head = ["parameter", "value", "default", "from"]
    assert changed[0] == everything[0] == head
    assert [row[0] for row in everything[1:]] == list(specs())
    shown = {row[0]: row[1:] for row in everything[1:]}
    for name, value in record["parameters"].items():
        expected = (
            "none" if value in (None, "") else str(value).lower() if isinstance(value, bool) else str(value)
        )
        assert shown[name][0] == expected
        assert shown[name][2] == record["origins"][name]
    differing = [name for name, spec in specs().items() if record["parameters"][name] != spec.default]
    assert [row[0] for row in changed[1:]] == differing
    assert ["dropout", "0.25", "0.0", "--dropout"] in changed
    assert page.texts["summary"][0] == f"all {len(specs())} parameters"


def test_a_run_of_defaults_says_so():
    values = {name: spec.default for name, spec in specs().items()}
    record = {"parameters": values, "origins": dict.fromkeys(values, "default")}
    page = Page(page_module.parameter_tables(record))
    assert page.texts["p"] == ["Every value is the default."] and len(page.tables) == 1


def test_the_page_holds_results_samples_and_provenance(run):
    page, final = page_of(run), json.loads((run / "eval/final.json").read_text())
    assert page.texts["h1"] == page.texts["title"] == [run.name]
    figures = [text.split("\n")[0] for text in page.texts["b"]]
    assert figures[0] == f"{final['best_val_loss']:.4f}"
    assert figures[1] == f"{final['best_perplexity']:.2f}"
    assert figures[2] == f"{final['best_bits_per_character']:.3f}"
    assert figures[3] == f"{final['val_loss']:.4f}"
    assert figures[4] == f"{final['tokens_per_second_overall']:,.0f}"
    assert figures[5] == text_module.format_duration(final["seconds_in_loop"])
    notes = page.texts["small"]
    assert notes[0] == f"nats per character, step\u00a0{final['best_step']}"
    assert notes[3] == f"train loss {final['train_loss']:.4f}" and notes[5] == "96 characters read"
    samples = (run / "eval/samples.txt").read_text(encoding="utf-8")
    for i, text in enumerate(page.texts["pre"][:3], 1):
        assert f"--- sample {i}\n{text.removeprefix(chr(10))}\n" in samples
    evaluations = [row for row in metrics(run) if "loss/val" in row]
    assert [row[:3] for row in page.tables[2][1:]] == [
        [f"{row['step']:,}", f"{row['loss/train']:.4f}", f"{row['loss/val']:.4f}"] for row in evaluations
    ]
    origin = dict(page.tables[3][1:])
    commit = (run / "meta/git.txt").read_text().splitlines()[0].removeprefix("commit: ")
    assert origin["git commit"] == commit and origin["torch"] == torch.__version__
    record = json.loads((run / "meta/full_config.json").read_text())
    assert origin["SHA-256 of the text"] == record["corpus"]["sha256"]


def test_one_of_a_thing_is_no_plural(start):
    flags = "--n-layer 1 --n-head 1 --max-iters 1 --batch-size 1 --block-size 1 --grad-accum-steps 1".split()
    result = start(*flags)
    assert result.code == 0 and "device   cpu, float32, 1 thread\n" in result.out
    assert "steps    1 of 1 x 1 character\n" in result.out
    page = page_of(only_run())
    lead, *_ = page.texts["p"]
    assert " (1 layer, 1 head, width 16, context 1), trained for 1 step on text.txt (" in lead
    assert [text for text in page.texts["small"] if text.endswith(" read")] == ["1 character read"]
    assert page.texts["summary"][1] == "2 evaluations"
    assert dict(page.tables[3][1:])["device"] == "cpu, float32, 1 thread"
    said = "\n".join([result.out.partition("a sample")[0], lead, *page.texts["small"], *page.texts["td"]])
    assert re.findall(r"(?<![\d.,])1 (?!of\b)\w+s\b", said) == []


def test_a_number_has_at_most_eight_digits():
    values = [None, 0.0, 4.19604, 999.99996, 26_738.04687, 123_456.789, 999_999.99, 1e6, -1234.56789]
    expected = [
        "-",
        "0.0000",
        "4.1960",
        "1000.0000",
        "26738.047",
        "123456.79",
        "1000000.0",
        "1e+06",
        "-1234.5679",
    ]
    assert [text_module.format_number(value) for value in values] == expected


def figures_of(final: dict) -> dict[str, str]:
    page = Page(page_module.cards(final))
    return dict(zip(page.texts["dt"], page.texts["b"], strict=True))


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"best_val_loss": 0.0, "best_perplexity": 1.0}, {"best val loss": "0.0000", "perplexity": "1.00"}),
        ({"best_val_loss": 1e30, "val_loss": 3e38}, {"best val loss": "1e+30", "last val loss": "3e+38"}),
        ({"best_perplexity": None}, {"perplexity": "-"}),
        ({"best_perplexity": 1.014e304}, {"perplexity": "1.01e+304"}),
        ({"best_bits_per_character": 1.4427e30}, {"bits per character": "1.44e+30"}),
        ({"seconds_in_loop": 0.0, "tokens_per_second_overall": None}, {"time": "0 s", "speed": "-"}),
        ({"tokens_per_second_overall": 0.4}, {"speed": "0.4"}),
        ({"tokens_per_second_overall": 17_163.4}, {"speed": "17,163"}),
    ],
)
def test_the_figures_on_the_page_stay_figures(run, values, expected):
    figures = figures_of(json.loads((run / "eval/final.json").read_text()) | values)
    assert {name: figures[name] for name in expected} == expected


def test_a_page_of_absurd_losses_is_whole(run):
    final = json.loads((run / "eval/final.json").read_text())
    huge = {"best_val_loss": 1.7e308, "val_loss": 1.7e308, "train_loss": 1.7e308, "best_perplexity": None}
    (run / "eval/final.json").write_text(json.dumps(final | huge))
    rows = [row | {key: 1e30 for key in row if key.startswith("loss/")} for row in metrics(run)]
    (run / "logs/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(build_page(run, ["a"], None))
    assert page.texts["b"][0] == "1.7e+308" and len(page.all("svg")) >= 3
    assert page.tables[2][1][1:3] == ["1e+30", "1e+30"]


def assert_harmless(page: Page) -> None:
    """Check that the page runs no code and requests nothing."""
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "srcset", "data", "action", "poster", "background"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        assert "url(" not in (attributes.get("style") or "")
    assert all("url(" not in text and "@import" not in text for text in page.texts["style"])
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_hostile_text_stays_text(run):
    record = json.loads((run / "meta/full_config.json").read_text())
    record["parameters"]["run_tag"] = record["origins"]["seed"] = record["corpus"]["path"] = HOSTILE
    record["corpus"]["path"] += "/<img src=x onerror=y>.txt"
    (run / "meta/full_config.json").write_text(json.dumps(record))
    (run / "meta/env.txt").write_text("command: <b onclick=x>&lt;</b>\n")
    page = Page(build_page(run, [HOSTILE, "\n\nbegins with lines"], HOSTILE))
    assert_harmless(page)
    assert page.texts["pre"] == ["\n" + HOSTILE, "\n\n\nbegins with lines", "\n" + HOSTILE]
    cells = [cell for table in page.tables for row in table for cell in row]
    assert cells.count(HOSTILE) == 3  # the tag in both tables of parameters, and the origin of the seed
    assert "<b onclick=x>&lt;</b>" in cells


def test_what_no_page_can_hold_is_shown_by_a_symbol():
    assert escape("a\0b\rc\x1bd\x7fe\x85f\ud800g\n\t🙂<&\"'") == (
        "a\u2400b\u240dc\u241bd\u2421e\ufffdf\ufffdg\n\t🙂&lt;&amp;&quot;&#x27;"
    )


def test_the_page_of_a_run_is_harmless(run):
    assert_harmless(page_of(run))


def test_the_page_of_a_resumed_run_shows_the_whole_curve(run, train):
    first = page_of(run)
    assert [x for x, _ in first.curve("each")] == [round(1000 * step / 6, 1) for step in range(6)]
    assert train("--resume", "latest", "--max-iters", 10).code == 0
    page = page_of(run)
    assert [x for x, _ in page.curve("each")] == [100 * step for step in range(10)]
    assert [x for x, _ in page.curve("val")] == [0, 200, 400, 600, 800, 1000]
    losses = [row["loss/train_step"] for row in metrics(run) if "loss/train_step" in row]
    heights = [y for _, y in page.curve("each")]
    assert np.argmin(losses) == np.argmax(heights) and np.argmax(losses) == np.argmin(heights)


def test_a_page_that_cannot_be_made_costs_one_line_and_no_stale_page_stays(run, train, monkeypatch):
    def fail(*_):
        raise KeyError("n_parameters")

    monkeypatch.setattr(page_module, "build_page", fail)
    result = train("--resume", "latest", "--max-iters", 8)
    assert (result.code, result.err) == (0, "warning: no report was written: 'n_parameters'\n")
    assert not (run / "eval/report.html").exists() and "report.html" not in result.out


def test_what_a_run_can_do_without_is_new_or_costs_one_line(tmp_path):
    path, warnings = tmp_path / "picture.png", []

    def fail(path: Path) -> None:
        assert not path.exists()
        raise ValueError("two lines:\nof which one is told")

    path.write_text("old")
    assert write_or_warn(path, fail, "no picture", warnings.append) is None
    assert warnings == ["no picture: two lines:"] and not path.exists()
    assert write_or_warn(path, lambda path: path.write_text("new"), "no picture", warnings.append) == 3
    assert len(warnings) == 1 and path.read_text() == "new"
    (tmp_path / "folder").mkdir()
    assert write_or_warn(tmp_path / "folder", fail, "no folder", warnings.append) is None
    assert len(warnings) == 2 and warnings[1].startswith("no folder: [Errno ")


def test_a_run_ends_with_where_its_page_is(start):
    result = start()
    assert f"report    {only_run() / 'eval' / 'report.html'}\n" in result.out


def test_an_attention_picture_that_cannot_be_drawn_costs_one_line(run, train, monkeypatch):
    def fail(*_):
        raise ImportError("no matplotlib")

    monkeypatch.setattr("utils_alg1.report.pictures.draw_attention", fail)
    result = train("--resume", "latest", "--max-iters", 8)
    assert (result.code, result.err) == (0, "warning: no attention picture was drawn: no matplotlib\n")
    assert not (run / "eval/attention.png").exists()
    page = page_of(run)
    assert "Attention" not in page.texts["h2"] and page.all("img") == []


# --- curves -------------------------------------------------------------------------------------------


def test_a_downsampled_curve_keeps_its_peaks_and_its_order():
    points = [(step, math.sin(step)) for step in range(100_000)]
    points[70_001] = (70_001, 50.0)
    points[3] = (3, -50.0)
    kept = downsample(points)
    assert len(kept) <= 800 and kept == sorted(kept)
    assert (70_001, 50.0) in kept and (3, -50.0) in kept and set(kept) <= set(points)
    assert downsample(points[:800]) == points[:800]


@pytest.mark.parametrize(
    "low, high, max_ticks, expected",
    [
        (0, 600, 5, [0, 200, 400, 600]),
        (1.93, 4.2, 6, [2.0, 2.5, 3.0, 3.5, 4.0]),
        (0, 1, 3, [0, 0.5, 1]),
        (9563, 12140, 4, [10000, 11000, 12000]),
        (5200, 14000, 4, [6000, 8000, 10000, 12000, 14000]),  # in steps of 5,000 there would be one
        (2, 2, 4, [2]),
        (3.0, 3.0000000000000004, 6, [3.0]),
    ],
)
def test_ticks_are_round_numbers(low, high, max_ticks, expected):
    assert ticks(low, high, max_ticks) == pytest.approx(expected)


def test_the_steps_of_a_run_are_whole_numbers():
    assert ticks(0, 1, 5, min_spacing=1) == ticks(0, 1, 3, min_spacing=1) == [0, 1]
    assert ticks(0, 2, 5, min_spacing=1) == [0, 1, 2]
    assert ticks(0, 3, 3, min_spacing=1) == [0, 1, 2, 3]


@pytest.mark.parametrize("low, high, min_spacing", [(0, 0.5, 1), (0.2, 1.9, 1), (7, 9.5, 3), (-0.5, 0.4, 1)])
def test_two_numbers_too_close_for_two_ticks_have_one(low, high, min_spacing):
    assert ticks(low, high, 3, min_spacing) == [low]


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0, 2.0, 2.5], "0 2.0 2.5"),
        ([0.0, 0.0005, 0.001], "0 0.0005 0.0010"),
        ([1e-5, 2e-5], "1e-5 2e-5"),
        ([0.0, 5e-10, 1e-9], "0 0.5e-9 1.0e-9"),
        ([10_000, 12_000], "10,000 12,000"),
        ([12_000.0, 12_000.5, 12_001.0], "12,000.0 12,000.5 12,001.0"),
        ([0, 1e6, 2e6], "0 1M 2M"),
        ([1e7, 1.25e7], "10.0M 12.5M"),
        ([5e29, 1e30], "0.5e30 1.0e30"),
        ([-1e100, 0, 1e100], "-1e100 0 1e100"),
        ([-0.3, -0.2, -0.1, 0.0], "-0.3 -0.2 -0.1 0"),
        ([0], "0"),
        ([2.97], "2.97"),
        ([0.00123456], "0.001235"),
        ([12_345.6], "12,346"),
    ],
)
def test_labels_have_the_fewest_digits_that_tell_them_apart(values, expected):
    assert tick_labels(values) == expected.split()


finite = st.floats(allow_nan=False, allow_infinity=False)
close = st.builds(lambda x, part: x * (1 + part), st.just(12_345.678), st.floats(-1e-3, 1e-3))
curves = st.one_of(st.lists(finite, min_size=1), st.lists(close, min_size=1))


def number_of(label: str) -> float:
    return float(label.replace(",", "").replace("M", "e6"))


@settings(max_examples=500)
@given(curves, curves, st.integers(0, 10**12), st.booleans())
@example([1.7e308, -1.7e308], [1e308], 1, False)
@example([0.30001, 0.30002], [0.0], 1, True)
@example([12_000.0, 12_002.0], [12_001.0], 3, False)
@example([1e30, 2e30], [1e30], 300, True)
@example([5e-324, 0.0], [-5e-324], 2, False)
def test_a_chart_of_any_curve_has_numbers_that_tell_its_places(first, second, n_steps, large):
    lines = [Line("a", "train", [*enumerate(first)]), Line("b", "val", [*enumerate(second)])]
    source = chart("T", "", lines, n_steps, large)
    drawing, _, numbers = source.partition("</svg>")
    assert "nan" not in drawing and "inf" not in drawing
    for kind, values in ("train", first), ("val", second):
        points = Page(source).curve(kind)
        assert len(points) == max(2, len(values))
        assert all(0 <= x <= 1000 and 0 <= y <= 1000 for x, y in points)
    for side in "x", "y":
        found = re.findall(rf'<span class={side} style="[a-z]+:([0-9.]+)%">([^<]+)</span>', numbers)
        places, labels = [float(place) for place, _ in found], [label for _, label in found]
        assert 1 <= len(labels) == len(set(labels)) <= 7 and max(map(len, labels)) <= 12
        assert len(labels) >= 2 or side == "y"
        assert all(0 <= place <= 100 for place in places)
        values = [number_of(label) for label in labels]
        assert values == sorted(values)
        if side == "x":
            assert all(value == int(value) for value in values)
        for value, place in zip(values, places, strict=True):  # each stands where its number belongs
            share = (place - places[0]) / (places[-1] - places[0] or 1)
            expected = values[0] + share * (values[-1] - values[0])
            assert abs(value - expected) <= 0.02 * abs(values[-1] - values[0])


def test_a_chart_places_its_points():
    source = chart("T", "", [Line("a", "train", [(0, 1.0), (50, 3.0), (100, 2.0)])], 200)
    page = Page(source)
    # The lowest and the highest value are a twentieth of their distance, 0.1, from the edges: 2.2 in all.
    assert page.curve("train") == [(0, 954.5), (250, 45.5), (500, 500)]
    assert chart("T", "", [Line("a", "train", [])], 200) == ""


def test_values_past_every_float32_are_drawn_at_the_edge():
    source = chart("T", "", [Line("a", "train", [(0, -1e308), (1, 0.0), (2, 1e300)])], 2)
    assert Page(source).curve("train") == [(0, 954.5), (500, 500), (1000, 45.5)]
    assert re.findall(r"<span class=y [^>]*>([^<]+)<", source) == [
        "-1.0e100",
        "-0.5e100",
        "0",
        "0.5e100",
        "1.0e100",
    ]


def test_values_that_hardly_differ_make_a_level_line_with_one_number():
    source = chart("T", "", [Line("a", "train", [(0, 0.30001), (1, 0.30002)])], 1)
    assert Page(source).curve("train") == [(0, 500), (1000, 500)]
    assert re.findall(r"<span class=y [^>]*>([^<]+)<", source) == ["0.3"]


# --- in a browser -------------------------------------------------------------------------------------


CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (path := shutil.which(name))
    ),
    None,
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine's PATH")


def browse(page: Path, folder: Path, *flags: str) -> tuple[str, list[str], list[str]]:
    """Open a page in a browser; return the final document, the console messages and the requested URLs.

    Requests of the browser itself, such as for updates, have no page as their origin and are left out.
    """
    log = folder / "network.json"
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--no-first-run", "--disable-background-networking", "--proxy-server=127.0.0.1:9"),
        *(f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr"),
        *("--virtual-time-budget=2000", "--dump-dom", *flags, page.resolve().as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    asked = [event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"]
    return done.stdout, said, asked


@needs_chromium
def test_a_browser_opens_the_page_without_a_request_or_an_error(run, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(build_page(run, [HOSTILE], HOSTILE), encoding="utf-8")
    document, said, asked = browse(page, tmp_path)
    assert "中文字 🙂👩‍🚀" in document and document.count("<section ") == 5
    assert (said, asked) == ([], [])

    # The same page with what it must not have: the browser would have told.
    bad = page.read_text(encoding="utf-8").replace(page_module.POLICY, "img-src *")
    page.write_text(bad.replace("</main>", "<img src='https://a.test/x.png'><script>no()</script></main>"))
    _, said, asked = browse(page, tmp_path)
    assert len(said) >= 1 and asked == ["https://a.test/x.png"]


@needs_chromium
def test_a_curve_of_one_point_is_a_dot(tmp_path):
    source = chart("T", "", [Line("a", "train", [(50, 3.0)])], 100)
    page, picture = tmp_path / "dot.html", tmp_path / "dot.png"
    page.write_text(f"<style>{page_module.STYLE} figure {{ width: 600px }}</style>{source}")
    browse(page, tmp_path, f"--screenshot={picture}", "--window-size=800,400")
    blue = (np.abs(decoded(picture.read_bytes()).astype(int) - (0x25, 0x63, 0xEB)).max(axis=2) < 8).nonzero()
    height, width = (np.ptp(axis) + 1 for axis in blue)
    assert 7 <= height <= 10 and 7 <= width <= 10 and len(blue[0]) >= 0.7 * height * width


@needs_chromium
def test_the_page_is_as_wide_as_a_phone(run, tmp_path):
    source = build_page(run, ["x" * 2000, HOSTILE], "y" * 64).replace("<details>", "<details open>")
    wide = chart("wide", "", [Line("", "train", [(0, -1.127874e-5), (1, -1.128074e-5)])], 1)
    source = source.replace("</main>", f"{wide}</main>")
    (tmp_path / "report.html").write_text(source, encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<iframe src=report.html style='width:400px;height:800px;border:0' onload='"
        "const page = this.contentDocument.documentElement;"
        'const left = [...page.querySelectorAll(".plot span")].map(s => s.getBoundingClientRect().left);'
        'document.title = [page.scrollWidth, page.clientWidth, Math.min(...left) >= 0].join(" ")\'></iframe>'
    )
    document, _, _ = browse(frame, tmp_path, "--allow-file-access-from-files", "--hide-scrollbars")
    assert re.search(r"<title>([^<]*)</title>", document)[1] == "400 400 true"
