"""The results of a run in eval/: final.json, the loss and attention pictures, and the report page."""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import json
import logging
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, needs_chromium
from conftest import QUIET_TRACKERS, TEXT, TINY, with_changes
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.image import imread

from data import load_data
from model import BigramLanguageModel
from parameters import specs
from utils import Tokenizer
from utils_alg1.base import text as text_module
from utils_alg1.base.files import write_or_warn
from utils_alg1.base.text import format_number, without_controls
from utils_alg1.report import page as page_module
from utils_alg1.report import pictures as pictures_module
from utils_alg1.report.baselines import count_baselines
from utils_alg1.report.page import MAX_POINTS, build_page, downsample, resumes
from utils_alg1.report.rendering import source
from utils_alg1.run_directory import list_runs
from utils_alg1.tracking.metrics_file import read_curves
from utils_alg1.tracking.observer import attention_weights

HOSTILE = (
    "</script><img src=x onerror=alert(1)></pre></main><style>*{display:none}</style>\n"
    "<!-- &amp; &#0; \"quotes\" 'more' 中文字 🙂👩‍🚀 \u202eback\u202c ا ب\n\ttab <svg/onload=alert(2)>"
)
VOID = {"meta", "link", "img", "input"}


@pytest.fixture
def start(train, text_file, monkeypatch):
    """Starts a tiny run without loss.png, which these tests do not need."""
    monkeypatch.setattr("utils_alg1.report.pictures.draw_loss_curve", lambda *_: None)
    return lambda *flags: train("--data", text_file, *TINY, *QUIET_TRACKERS, *flags)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run with some parameters that are not the defaults."""
    import train as script

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        flags = ["--run-tag", "my try", "--dropout", "0.25", "--learning-rate", "0.01", "--quiet"]
        assert script.main(with_changes(["--data", "text.txt", *TINY, *QUIET_TRACKERS, *flags])) == 0
    return folder


@pytest.fixture
def run(finished, workdir):
    """A copy of the finished run, in the working folder."""
    shutil.copytree(finished, workdir, dirs_exist_ok=True)
    return only_run()


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
        if tag in VOID:
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

    @property
    def data(self) -> dict:
        """What the script draws."""
        return json.loads(self.texts["script"][0])


def paragraphs(page: Page) -> list[str]:
    return [" ".join(text.split()) for text in page.texts["p"]]


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


def test_the_losses_of_counting_are_in_the_results_and_on_the_page(run):
    final, page = json.loads((run / "eval/final.json").read_text()), page_of(run)
    train_data, val_data, tokenizer = load_data("text.txt")
    counted = count_baselines(train_data, val_data, tokenizer.vocab_size, 8)
    losses = {"uniform": counted.uniform, "unigram": counted.unigram, "bigram": counted.bigram}
    assert {name: final[f"{name}_loss"] for name in losses} == losses
    assert final["counted_characters"] == final["train_characters"] == len(train_data) - 1
    figures = dict(zip(page.texts["dt"], page.texts["b"], strict=True))
    shown = {name: f"{loss:.4f}" for name, loss in losses.items()}
    assert {name: text.split("\n")[0] for name, text in figures.items() if name in losses} == shown
    assert figures["this model"] == f"{final['export_val_loss']:.4f}"
    assert ["uniform", counted.uniform] in page.data["references"]
    assert any(
        f"those of the part for training, {len(train_data) - 1:,} characters, with" in p
        for p in paragraphs(page)
    )


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"bigram_loss": 2.5, "export_val_loss": 2.0}, "The model is 0.50 nats better than counting pairs: "),
        ({"bigram_loss": 2.5, "export_val_loss": 2.5}, "The model is no better than counting pairs: "),
        (
            {"counted_characters": 90, "train_characters": 1000},
            "those of 90 characters of the part for training, spread evenly, with",
        ),
    ],
)
def test_the_page_tells_what_was_learned_beyond_counting(run, values, expected):
    final = json.loads((run / "eval/final.json").read_text()) | values
    (run / "eval/final.json").write_text(json.dumps(final))
    assert any(expected in text for text in paragraphs(Page(build_page(run, [], None))))


def test_bits_per_character_are_the_loss_to_the_base_of_two():
    assert text_module.bits_per_character(math.log(8)) == pytest.approx(3, rel=1e-15)
    assert text_module.format_loss(math.log(8)) == "2.0794 (perplexity 8.00, 3.000 bits per character)"


def test_a_perplexity_past_every_number_is_none():
    assert text_module.perplexity(1e4) is None


# --- the loss picture ---------------------------------------------------------------------------------


@pytest.fixture
def saved_figures(monkeypatch):
    """The figures that were saved, in their order."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k)
    )
    return figures


@pytest.fixture
def draw_loss(tmp_path, saved_figures):
    """Draws the loss picture of metrics rows and returns the axes."""

    def draw(rows, title="2026-01-31_001", *more):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pictures_module.draw_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png", title, *more)
        assert decoded((tmp_path / "loss.png").read_bytes()).shape == (540, 960, 3)
        return saved_figures[-1].axes[0]

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


def test_the_loss_picture_has_the_losses_of_counting_and_where_the_run_was_resumed(draw_loss):
    references = {"uniform": 4.1744, "unigram": 3.3, "bigram": 1.2}
    axes = draw_loss([evaluated(0, 4.1, 4.2), evaluated(9, 3.1, 3.2)], "a", references, [4, 7])
    level, upright = axes.lines[3:5], axes.lines[5:]
    assert [set(line.get_ydata()) for line in level] == [{4.1744}, {3.3}]  # 1.2 would flatten the curves
    assert [text.get_text() for text in axes.texts] == ["uniform 4.17", "unigram 3.30"]
    assert [text.get_position()[1] for text in axes.texts] == [4.1744, 3.3]
    assert [set(line.get_xdata()) for line in upright] == [{4}, {7}]
    assert [text.get_text() for text in axes.get_legend().get_texts()][2:] == ["val", "resumed"]


def test_a_step_that_a_run_was_resumed_at_is_one_mark_and_its_end_is_none():
    parts = [{"step": step, "command": c} for step, c in ((0, "a"), (4, "b"), (4, "c"), (6, "d"), (8, "e"))]
    assert resumes({"parts": parts}, 8) == [
        (4, "resumed", "resumed at step 4: b; c"),
        (6, "resumed", "resumed at step 6: d"),
    ]
    assert resumes({}, 8) == resumes({"parts": parts[:1]}, 8) == []


def test_a_text_of_one_character_has_losses_of_zero():
    tokens = np.zeros(50, np.uint8)
    found = count_baselines(tokens, tokens, 1, 8)
    assert [math.copysign(1, loss) for loss in (found.uniform, found.unigram, found.bigram)] == [1, 1, 1]
    assert [format_number(loss) for loss in (found.unigram, -0.0, -1e-9, -0.5)] == [
        *("0.0000", "0.0000", "0.0000", "-0.5000")
    ]


def test_the_loss_picture_holds_what_the_font_lacks_and_what_looks_like_mathematics(
    draw_loss, recwarn, caplog
):
    tag = "2026-01-31_001_中文_$x^2$_$\\frac$" + 60 * "W"
    assert draw_loss([evaluated(0, 4.1, 4.2), evaluated(9, 3.1, 3.2)], tag).get_title("left") == tag
    assert recwarn.list == [] == [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("loss", [0.0, 1e-45, 1e100])
def test_the_loss_picture_holds_any_loss(draw_loss, recwarn, loss):
    axes = draw_loss([evaluated(0, -loss, 0.0), evaluated(9, loss, loss)])
    assert axes.lines[1].get_ydata().tolist() == [-loss, loss]
    assert np.isfinite(axes.get_ylim()).all() and recwarn.list == []


def test_what_no_curve_can_show_is_in_none(draw_loss, tmp_path):
    rows = [evaluated(0, 4.1, 4.2), evaluated(9, 3.1, 3.2)]
    for step, value in enumerate([math.nan, math.inf, -math.inf, 1.7e308, 10**400], start=1):
        each = {"step": step, "loss/train_step": value, "learning_rate": 0.1, "gradient_norm": value}
        rows[-1:-1] = [evaluated(step, value, value), each]
    axes = draw_loss(rows)
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [],
        [[0, 4.1], [9, 3.1]],
        [[0, 4.2], [9, 3.2]],
    ]
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert curves.keys() == {"loss/train", "loss/val", "learning_rate"}


# --- the attention picture ----------------------------------------------------------------------------


def decoded(png: bytes) -> np.ndarray:
    return (imread(io.BytesIO(png), format="png")[..., :3] * 255 + 0.5).astype(np.uint8)


def test_the_attention_picture_holds_every_weight_at_its_place(saved_figures):
    weights = np.tril(np.random.default_rng(0).random((2, 3, 5, 5)))
    weights /= weights.sum(axis=-1, keepdims=True)
    png = pictures_module.draw_attention(weights, "2026-01-31_001 中 $x$", "$ \n\u0301中")
    picture = decoded(png).astype(int)
    (axes,) = saved_figures[-1].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["head 0", "head 1", "head 2"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 0", "layer 1"]
    columns, rows = (
        {tick - 2 + i: symbol for tick in ticks for i, symbol in enumerate("$␣↵\ufffd中")}
        for ticks in (axes.get_xticks(), axes.get_yticks())
    )
    labels = {text.get_position(): text.get_text() for text in axes.texts}
    above, beside = ({(x, -1): c for x, c in columns.items()}, {(-1, y): c for y, c in rows.items()})
    assert labels == above | beside and len(axes.texts) == 5 * (3 + 2)
    assert pictures_module.displayed_width(png) == round(picture.shape[1] * 0.8)

    def pixel(x: float, y: float) -> np.ndarray:
        across, up = axes.transData.transform((x, y))
        return picture[len(picture) - 1 - int(up), int(across)]

    for (layer, head, row, column), weight in np.ndenumerate(weights):
        x, y = axes.get_xticks()[head] - 2 + column, axes.get_yticks()[layer] - 2 + row
        expected = np.array(colormaps["magma"](math.sqrt(weight))[:3]) * 255
        assert np.abs(pixel(x, y) - expected).max() <= 2
    between = (axes.get_xticks()[0] + axes.get_xticks()[1]) / 2
    assert pixel(between, 2).tolist() == [0x11, 0x13, 0x18]


def test_of_many_layers_some_are_shown_with_the_first_and_the_last(saved_figures):
    assert pictures_module.evenly_spaced(1) == [0]
    assert pictures_module.evenly_spaced(12) == list(range(12))
    assert pictures_module.evenly_spaced(23) == list(range(0, 23, 2))
    png = pictures_module.draw_attention(np.eye(32)[None, None].repeat(30, axis=0), "long " * 60, "abcd" * 8)
    (axes,) = saved_figures[-1].axes
    assert len(decoded(png)) == pytest.approx(3000, abs=2)
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert len(shown) == 12 and (shown[0], shown[-1]) == ("layer 0", "layer 29")


def test_the_attention_picture_is_that_of_the_exported_weights_and_the_text_on_the_page(run):
    text = page_of(run).texts["pre"][-1].removeprefix("\n")
    assert len(text) == 8
    model = BigramLanguageModel().load_safetensors(run / "artifacts/export/model.safetensors").eval()
    idx = torch.tensor([Tokenizer(model.vocabulary).encode(text)])
    expected = pictures_module.draw_attention(attention_weights(model, idx), run.name, text)
    assert (run / "eval/attention.png").read_bytes() == expected


# --- the page -----------------------------------------------------------------------------------------


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


def test_a_run_of_defaults_says_so(run):
    record = json.loads((run / "meta/full_config.json").read_text())
    record["parameters"] = {name: spec.default for name, spec in specs().items()}
    (run / "meta/full_config.json").write_text(json.dumps(record))
    page = Page(build_page(run, [], None))
    assert "Every value is the default." in page.texts["p"] and len(page.tables[0]) == 1 + len(specs())


def test_the_page_holds_results_samples_and_provenance(run):
    page, final = page_of(run), json.loads((run / "eval/final.json").read_text())
    assert page.texts["h1"] == page.texts["title"] == [run.name]
    figures = [text.split("\n")[0] for text in page.texts["b"]]
    assert figures[0] == f"{final['export_val_loss']:.4f}"
    assert figures[1] == f"{final['export_perplexity']:.2f}"
    assert figures[2] == f"{final['export_bits_per_character']:.3f}"
    assert figures[3] == f"{final['best_val_loss']:.4f}"
    assert figures[4] == f"{final['val_loss']:.4f}"
    assert figures[5] == f"{final['tokens_per_second_overall']:,.0f}"
    assert figures[6] == text_module.format_duration(final["seconds_in_loop"])
    notes = page.texts["small"]
    assert notes[0] == f"nats per character, of the export (step\u00a0{final['export']['step']})"
    assert notes[3] == f"step\u00a0{final['best_step']}"
    assert notes[4] == f"train loss {final['train_loss']:.4f}" and notes[6] == "96 characters read"
    read = f"{final['val_characters']:,} characters of the part held out"
    assert any(f"is the mean over all {read}" in " ".join(text.split()) for text in page.texts["p"])
    samples = (run / "eval/samples.txt").read_text(encoding="utf-8")
    for i, text in enumerate(page.texts["pre"][:3], 1):
        assert f"--- sample {i}\n{text.removeprefix(chr(10))}\n" in samples
    evaluations = [row for row in metrics(run) if "loss/val" in row]
    assert [row[:3] for row in page.tables[2][1:]] == [
        [f"{row['step']:,}", f"{row['loss/train']:.4f}", f"{row['loss/val']:.4f}"] for row in evaluations
    ]
    origin = dict(page.tables[3])
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
    lead = " ".join(page.texts["p"][0].split())
    assert " (1 layer, 1 head, width 16, context 1), trained for 1 step on text.txt (" in lead
    assert [text for text in page.texts["small"] if text.endswith(" read")] == ["1 character read"]
    assert page.texts["summary"][1] == "2 evaluations"
    assert dict(page.tables[3])["device"] == "cpu, float32, 1 thread"
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


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"export_val_loss": 0.0, "export_perplexity": 1.0}, {"val loss": "0.0000", "perplexity": "1.00"}),
        ({"best_val_loss": 1e30, "val_loss": 3e38}, {"best evaluation": "1e+30", "last evaluation": "3e+38"}),
        ({"export_perplexity": None}, {"perplexity": "-"}),
        ({"export_perplexity": 1.014e304}, {"perplexity": "1.01e+304"}),
        ({"export_bits_per_character": 1.4427e30}, {"bits per character": "1.44e+30"}),
        ({"seconds_in_loop": 0.0, "tokens_per_second_overall": None}, {"time": "0 s", "speed": "-"}),
        ({"tokens_per_second_overall": 0.4}, {"speed": "0.4"}),
        ({"tokens_per_second_overall": 17_163.4}, {"speed": "17,163"}),
    ],
)
def test_the_figures_on_the_page_stay_figures(run, values, expected):
    final = json.loads((run / "eval/final.json").read_text()) | values
    (run / "eval/final.json").write_text(json.dumps(final))
    page = Page(build_page(run, [], None))
    figures = dict(zip(page.texts["dt"], page.texts["b"], strict=True))
    assert {name: figures[name] for name in expected} == expected


def sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def assert_harmless(page: Page) -> None:
    """Check that the page runs no code but its own, which its policy names, and requests nothing."""
    assert not {"iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "srcset", "data", "action", "poster", "background"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    *data, model, script = page.texts["script"]
    (style,) = page.texts["style"]
    assert page.all("script") == [
        {"type": "application/json", "id": "data"},
        {"type": "application/json", "id": "playground"},
        {"type": "text/plain", "id": "model"},
        {},
    ]
    assert all(map(json.loads, data)) and model == source("model.js")
    assert script == source("elements.js", "report.js", "playground.js")
    assert "url(" not in style and "@import" not in style
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{sha256(style)}';"
        f" script-src 'sha256-{sha256(script)}'; worker-src blob:"
    )


def test_hostile_text_stays_text(run):
    record = json.loads((run / "meta/full_config.json").read_text())
    record["parameters"]["run_tag"] = record["origins"]["seed"] = record["corpus"]["path"] = HOSTILE
    record["parameters"]["<script>alert(3)</script>"] = 1
    record["corpus"]["path"] += "/<img src=x onerror=y>.txt"
    record["parts"][0]["command"] = "<i onclick=x>&gt;</i>"
    (run / "meta/full_config.json").write_text(json.dumps(record))
    (run / "meta/env.txt").write_text("python: <b onclick=x>&lt;</b>\n")
    (run / "meta/notes.md").write_text(HOSTILE, encoding="utf-8")
    with (run / "logs/samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "samples": HOSTILE}) + "\n")
    with (run / "logs/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, HOSTILE: 1.0}) + "\n")
    page = Page(build_page(run, [HOSTILE, "\n\nbegins with lines"], HOSTILE))
    assert_harmless(page)
    assert page.data["curves"][HOSTILE] == [[6, 1.0]]
    texts = page.texts["pre"]
    assert texts[:2] + texts[3:] == [
        "\n" + HOSTILE,
        "\n\n\nbegins with lines",
        *2 * ["\n" + HOSTILE],
        "\n" + HOSTILE,
    ]
    cells = [cell for table in page.tables for row in table for cell in row]
    assert cells.count(HOSTILE) == 3  # the tag in both tables of parameters, and the origin of the seed
    assert "<b onclick=x>&lt;</b>" in cells and "<i onclick=x>&gt;</i>" in cells
    assert "<script>alert(3)</script>" in cells


def test_what_no_page_can_hold_is_shown_by_a_symbol(run):
    page = Page(build_page(run, ["a\0b\rc\x1bd\x7fe\x85f\ud800g\n\t🙂<&\"'"], None))
    assert page.texts["pre"][:1] == ["\na\u2400b\u240dc\u241bd\u2421e\ufffdf\ufffdg\n\t🙂<&\"'"]
    assert "Attention" not in page.texts["h2"] and page.all("img") == []


def test_a_value_that_is_missing_is_no_blank(run):
    record = json.loads((run / "meta/full_config.json").read_text())
    del record["corpus"]["sha256"]
    (run / "meta/full_config.json").write_text(json.dumps(record))
    with pytest.raises(Exception, match="sha256"):
        build_page(run, [], None)


def test_a_resumed_run_shows_the_whole_curve(run, train):
    picture = (run / "eval/loss.png").read_bytes()
    assert_harmless(page_of(run))
    result = train("--resume", "latest", "--max-iters", 10)
    assert result.code == 0 and f"report    {run / 'eval' / 'report.html'}\n" in result.out
    data = page_of(run).data
    assert data["steps"] == 10 and [step for step, _ in data["curves"]["loss/val"]] == [0, 2, 4, 6, 8, 10]
    losses = [[row["step"], row["loss/train_step"]] for row in metrics(run) if "loss/train_step" in row]
    assert data["curves"]["loss/train_step"] == losses and len(losses) == 10
    assert data["curves"]["best"] == [min(data["curves"]["loss/val"], key=lambda point: point[1])]
    assert (run / "eval/loss.png").read_bytes() != picture
    command = json.loads((run / "meta/full_config.json").read_text())["parts"][1]["command"]
    assert data["marks"] == [[6, "resumed", f"resumed at step 6: {command}"]]
    assert ["resumed at step 6", command] in page_of(run).tables[3]
    assert any("are where the run was resumed" in text for text in paragraphs(page_of(run)))


def test_samples_are_kept_on_the_way_and_a_resumed_run_has_those_of_one_that_was_not_interrupted(
    start, train, text_file, monkeypatch
):
    every = ("--sample-interval", 2, "--checkpoint-interval", 1)
    assert start(*every).code == 0
    whole, path = (only_run() / "logs/samples.jsonl").read_bytes(), "logs/samples.jsonl"
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4, 6] and {len(row["samples"]) for row in rows} == {200}

    assert start(*every, "--runs-dir", "others", "--max-iters", 3).code == 0
    (run,) = list_runs("others")
    with (run / path).open("ab") as file:
        file.write(whole.splitlines(keepends=True)[3] + b'{"step": 4, "sam')  # as a kill leaves it
    assert train("--resume", run, "--max-iters", 6).code == 0
    assert (run / path).read_bytes() == whole
    shown = page_of(run).texts["pre"][3:7]
    assert [text.removeprefix("\n") for text in shown] == [without_controls(row["samples"]) for row in rows]


def test_of_many_samples_six_are_shown_with_the_loss_of_their_step(run):
    rows = [{"step": step, "samples": f"text {step}"} for step in range(21)]
    (run / "logs/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(build_page(run, [], None))
    assert page.texts["pre"] == [f"\ntext {step}" for step in (0, 4, 8, 12, 16, 20)]
    losses = {row["step"]: f"val loss {row['loss/val']:.4f}" for row in metrics(run) if "loss/val" in row}
    assert [text for text in page.texts["small"] if text.startswith("val loss")] == [losses[0], losses[4]]
    assert any("the same prompt (↵) and" in text for text in paragraphs(page))
    (run / "logs/samples.jsonl").unlink()  # a run of an earlier version has none
    assert "While it learned" not in Page(build_page(run, [], None)).texts["h3"]


def test_what_a_person_wrote_into_the_notes_is_on_the_page(run):
    path = run / "meta/notes.md"
    template = path.read_text(encoding="utf-8")
    assert "Notes" not in page_of(run).texts["h2"]
    for text in (template.replace(run.name, "renamed"), "", " \n"):
        path.write_text(text, encoding="utf-8")
        assert "Notes" not in Page(build_page(run, [], None)).texts["h2"]
    path.write_bytes(template.encode() + b"It <b>learns</b>.\xff\n")
    page = Page(build_page(run, [], None))
    assert "Notes" in page.texts["h2"]
    assert page.texts["pre"][-1] == f"\n{template}It <b>learns</b>.\ufffd"
    path.unlink()
    assert "Notes" not in Page(build_page(run, [], None)).texts["h2"]


def test_what_cannot_be_made_costs_one_line_each_and_nothing_outdated_stays(run, train, monkeypatch):
    def fail(*_):
        raise ImportError("no matplotlib\nand so on")

    monkeypatch.setattr("utils_alg1.report.pictures.draw_loss_curve", fail)
    monkeypatch.setattr("utils_alg1.report.pictures.draw_attention", fail)
    monkeypatch.setattr(page_module, "build_page", fail)
    result = train("--resume", "latest", "--max-iters", 8)
    assert result.code == 0 and "report.html" not in result.out
    assert result.err.splitlines() == [
        f"warning: {run}/eval/{name} was not written: no matplotlib"
        for name in ("loss.png", "attention.png", "report.html")
    ]
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["final.json", "samples.txt"]


def test_an_optional_file_that_cannot_be_written_costs_one_line(tmp_path):
    path, warnings = tmp_path / "picture.png", []
    path.write_text("old")
    write_or_warn(path, lambda path: path.write_text("new"), warnings.append)
    assert warnings == [] and path.read_text() == "new"
    (tmp_path / "folder").mkdir()
    write_or_warn(tmp_path / "folder", Path.touch, warnings.append)
    assert len(warnings) == 1 and warnings[0].startswith(f"{tmp_path}/folder was not written: [Errno ")


def test_a_loss_picture_without_an_evaluation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no evaluation in it"):
        pictures_module.draw_loss_curve(tmp_path / "gone.jsonl", tmp_path / "loss.png", "")


# --- curves -------------------------------------------------------------------------------------------


def test_a_downsampled_curve_keeps_its_peaks_and_its_order():
    points = [(step, math.sin(step)) for step in range(100_000)]
    points[70_001] = (70_001, 50.0)
    points[3] = (3, -50.0)
    kept = downsample(points)
    assert len(kept) <= MAX_POINTS and kept == sorted(kept)
    assert (70_001, 50.0) in kept and (3, -50.0) in kept and set(kept) <= set(points)
    assert downsample(points[:800]) == points[:800]


def test_the_page_of_a_long_run_is_small(run):
    rows = [{"step": step, "loss/train_step": math.sin(step), "gradient_norm": 1.5} for step in range(50_000)]
    rows += [evaluated(step, math.cos(step), math.sin(step)) for step in range(0, 50_000, 50)]
    (run / "logs/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = build_page(run, ["a"], None)
    page = Page(source)
    assert len(source) < 250_000
    assert {name: len(points) <= MAX_POINTS for name, points in page.data["curves"].items()}
    assert len(page.tables[2]) == 1 + 200 and page.tables[2][-1][0] == "49,950"
    assert page.texts["summary"][1].strip() == "200 of 1,000 evaluations"


# --- in a browser -------------------------------------------------------------------------------------


@needs_chromium
def test_a_browser_opens_the_page_without_a_request_or_an_error(run, tmp_path, chromium):
    def count(selector: str) -> int:
        return chromium.evaluate(f"document.querySelectorAll('{selector}').length")

    source = build_page(run, [HOSTILE], HOSTILE)
    page = tmp_path / "report.html"
    page.write_text(source, encoding="utf-8")
    chromium.open(page)
    assert "中文字 🙂👩‍🚀" in chromium.evaluate("document.body.textContent") and count("section") == 7
    assert count("#charts svg") == 3  # losses, learning rate and gradient norm: no speed in six steps
    assert (count("polyline"), count("circle")) == (4, 2)
    assert (chromium.said, chromium.asked) == ([], [])

    # What its policy forbids does not happen, and the browser tells; what it would allow is seen here.
    source = source.replace("</main>", "<img src='https://a.test/x.png'><script>no()</script></main>")
    page.write_text(source, encoding="utf-8")
    chromium.open(page)
    said = chromium.said
    assert len(said) >= 2 and all("Content Security Policy" in line for line in said) and chromium.asked == []
    page.write_text(source.replace("img-src data:", "img-src *"), encoding="utf-8")
    chromium.open(page)
    assert chromium.asked == ["https://a.test/x.png"]


def in_browser(chromium: Browser, folder: Path, code: str) -> list:
    """Run code in a page with the report's script and style but no curves; return what its `result` holds.

    There, `place()` returns an empty <svg> of 600 x 300 pixels.
    """
    style, script = source("report.css"), source("elements.js", "report.js")
    page = f"""<!doctype html><meta charset=utf-8>
        <style>{style} main {{ width: 600px; padding: 0 }} main svg {{ height: 300px }}</style>
        <main></main>
        <script id=data type="application/json">{{"steps": 1, "curves": {{}}}}</script>
        <script>{script}
        const place = () => add(document.querySelector("main"), "svg");
        const result = [];
        {code}
        </script>"""
    (folder / "test.html").write_text(page, encoding="utf-8")
    chromium.open(folder / "test.html")
    assert chromium.said == []
    return chromium.evaluate("result")


LABELS = [  # lowest and highest value, number of ticks, least distance; the labels
    ((0, 600, 5, 0), "0 200 400 600"),
    ((1.93, 4.2, 7, 0), "2.0 2.5 3.0 3.5 4.0"),
    ((9563, 12140, 5, 0), "10,000 11,000 12,000"),
    ((5200, 14000, 5, 0), "6,000 8,000 10,000 12,000 14,000"),
    ((0, 1, 5, 1), "0 1"),
    ((0, 3, 3, 1), "0 1 2 3"),
    ((0, 1e6, 3, 1), "0 500,000 1,000,000"),
    ((0, 5e-4, 5, 0), "0 1e-4 2e-4 3e-4 4e-4 5e-4"),
    ((0, 1e30, 2, 0), "0 5e29 1e30"),
    ((-1e100, 1e100, 2, 0), "-1e100 0 1e100"),
    ((12000.0, 12002.0, 5, 0), "12,000.0 12,000.5 12,001.0 12,001.5 12,002.0"),
    ((2.97, 2.97, 5, 0), "2.97"),
    ((0.30001, 0.30002, 5, 0), "0.30001"),
    ((0, 0, 5, 0), "0"),
    ((12345.6, 12345.6, 5, 0), "12,346"),
    ((0, 5e-324, 5, 0), "0"),
]


@needs_chromium
def test_a_chart_places_its_points_between_round_numbers(tmp_path, chromium):
    code = f"""
      for (const [a] of {json.dumps(LABELS)}) result.push(labels(ticks(...a)).join(" "));
      const svg = place();
      const lines = [
        {{ name: "a", kind: "train", points: [[0, 1], [50, 3], [100, 2]] }},
        {{ name: "b", kind: "best", points: [[100, 2]] }},
      ];
      const stepAt = draw(svg, lines, 200);
      result.push(svg.querySelector("polyline").getAttribute("points"));
      result.push(svg.querySelectorAll("circle").length, Math.round(stepAt(44)), Math.round(stepAt(584)));
      result.push(valuesAt(lines, 60));"""
    *found, points, n_circles, first_step, last_step, values = in_browser(chromium, tmp_path, code)
    assert found == [expected for _, expected in LABELS]
    # The plot is 540 pixels wide from 44 on and 268 high from 6 on; the lowest and the highest value are a
    # twentieth of their distance, 0.1, from its edges: 2.2 in all.
    assert points == "44.0,261.8 179.0,18.2 314.0,140.0" and n_circles == 1
    assert (first_step, last_step, values) == (0, 200, "a 3 at step 50")


@needs_chromium
def test_a_chart_has_lines_at_references_and_where_the_run_was_resumed(tmp_path, chromium):
    code = """
      const lines = [{ name: "a", kind: "train", points: [[0, 1], [50, 3], [100, 2]] }];
      const marks = [[50, "resumed", "first"], [60, "resumed", "second"], [200, "resumed", "third"]];
      addChart(document.querySelector("main"), "Loss", "", lines, 200, [["half", 0]], marks);
      const svg = document.querySelector("svg");
      for (const path of svg.querySelectorAll(".reference, .mark")) result.push(path.getAttribute("d"));
      for (const name of ["half 0.00", "resumed"]) {
        const found = [...svg.querySelectorAll("text")].filter(text => text.textContent === name);
        result.push(found.map(text => [Number(text.getAttribute("x")), text.getAttribute("text-anchor")]));
      }
      const { left } = svg.getBoundingClientRect();
      for (const x of [44 + 135, 44 + 300]) {
        svg.dispatchEvent(new PointerEvent("pointermove", { clientX: left + x }));
        result.push(document.querySelector("output").textContent);
      }"""
    *paths, reference, labels, near, far = in_browser(chromium, tmp_path, code)
    # The reference is the lowest value: a twentieth of 3 from the lower edge, of 3.3 in all.
    assert paths[:3] == ["M179 6V326", "M206 6V326", "M584 6V326"]
    assert float(paths[3].removeprefix("M44 ").removesuffix("H584")) == pytest.approx(326 - 320 * 0.15 / 3.3)
    assert reference == [[580, "end"]]
    assert labels == [[183, "start"], [580, "end"]]  # that of the second would lie upon the first one's
    assert (near, far) == ("a 3 at step 50; first", "a 2 at step 100")


def random_curves() -> list[list[list[float]]]:
    """Curves of values of every size, some of which hardly differ."""
    draw = np.random.default_rng(0)
    curves = [[[0, -1e100], [1, 0.0], [2, 1e100]], [[3, 5e-324]], [[0, 0.30001], [1, 0.30002]], [[0, 12.5]]]
    for _ in range(200):
        n, size = int(draw.integers(1, 20)), 10.0 ** draw.integers(-12, 40)
        spread = draw.choice([1.0, 1e-3, 1e-5])
        curves.append([[step, size * (draw.normal() * spread + 1)] for step in range(n)])
    return curves


@needs_chromium
def test_a_chart_of_any_curve_has_numbers_that_tell_its_places(tmp_path, chromium):
    curves = random_curves()
    code = f"""
      for (const points of {json.dumps(curves)}) {{
        const svg = place();
        draw(svg, [{{ name: "a", kind: "val", points }}], Math.max(1, points.at(-1)[0]));
        const attribute = (element, name) => Number(element.getAttribute(name));
        const texts = [...svg.querySelectorAll("text")];
        const numbers = texts.map(t => [t.textContent, attribute(t, "x"), attribute(t, "y")]);
        const left = Math.min(...texts.map(t => t.getBoundingClientRect().left));
        const circle = svg.querySelector("circle");
        const line = svg.querySelector("polyline");
        const dot = () => [attribute(circle, "cx"), attribute(circle, "cy")].join();
        const drawn = line ? line.getAttribute("points") : dot();
        result.push({{ numbers, left: left - svg.getBoundingClientRect().left, points: drawn }});
        svg.remove();
      }}"""
    for curve, drawn in zip(curves, in_browser(chromium, tmp_path, code), strict=True):
        numbers = list(map(float, drawn["points"].replace(" ", ",").split(",")))
        points = list(zip(numbers[::2], numbers[1::2], strict=True))
        assert len(points) == len(curve) and drawn["left"] >= 0
        assert all(0 <= x <= 600 and 0 <= y <= 300 for x, y in points)
        values = np.array([value for _, value in curve])
        heights = np.array([-y for _, y in points])
        assert heights[values.argmax()] == heights.max() and heights[values.argmin()] == heights.min()
        across = [n for n in drawn["numbers"] if n[2] == 294]
        up = [n for n in drawn["numbers"] if n[2] != 294]
        assert 2 <= len(across) <= 7 and 1 <= len(up) <= 9
        for numbers, axis in (across, 1), (up, 2):
            labels = [label for label, *_ in numbers]
            assert len(set(labels)) == len(labels) and max(map(len, labels)) <= 12
            values = [float(label.replace(",", "")) for label in labels]
            assert values == sorted(values)
            places = [number[axis] for number in numbers]
            for value, place in zip(values, places, strict=True):  # each stands where its number belongs
                share = (place - places[0]) / (places[-1] - places[0] or 1)
                expected = values[0] + share * (values[-1] - values[0])
                assert abs(value - expected) <= 0.02 * abs(values[-1] - values[0])


@needs_chromium
def test_the_page_is_as_wide_as_a_phone(run, tmp_path, chromium):
    final = json.loads((run / "eval/final.json").read_text()) | {"steps": 6_000_000}
    (run / "eval/final.json").write_text(json.dumps(final))  # its labels are the widest
    source = build_page(run, ["x" * 2000, HOSTILE], "y" * 64).replace("<details>", "<details open>")
    (tmp_path / "report.html").write_text(source, encoding="utf-8")
    chromium.open(tmp_path / "report.html", width=400)
    assert chromium.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [400, 400]
    places = chromium.evaluate("""[...document.querySelectorAll("svg text")].map(text => {
        const { left, right } = text.getBoundingClientRect();
        return [left, right];
    })""")
    assert len(places) > 10 and all(left >= 0 and right <= 400 for left, right in places)
    move = 'new PointerEvent("pointermove", { clientX: 200 })'
    chromium.evaluate(f'document.querySelector("svg").dispatchEvent({move})')
    told = chromium.evaluate('document.querySelector("output").textContent')
    assert told.startswith("train, each step ") and re.search(r"val [\d.]+ at step ", told)
