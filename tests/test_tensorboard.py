"""TensorBoard: what its own reader and its own server find in a run, and the classes used on their own."""

from __future__ import annotations

import html
import http.client
import io
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import threading
import time
import types
from pathlib import Path
from urllib.parse import quote

import numpy as np
import PIL.Image
import pytest
import torch
from browser import needs_chromium
from conftest import TEXT, TINY, lasting_metrics, recorded_run, with_changes
from google.protobuf import text_format
from tensorboard import plugin_util
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins import projector
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray

import train as script
from parameters import MAIN_PARAMETERS
from utils_alg1.base.pictures import draw_labels
from utils_alg1.base.summaries import HISTOGRAM_BINS, Embedding, Histogram, Image, model_histograms
from utils_alg1.network.tensor_file import read_tensors
from utils_alg1.run_directory import list_runs
from utils_alg1.tracking.metrics_file import read_metrics
from utils_alg1.training.trainer import Trainer
from utils_tensorboard import server as server_module
from utils_tensorboard.event_file import new_path
from utils_tensorboard.instructions import address, instructions
from utils_tensorboard.logger import MetricLogger
from utils_tensorboard.reading import last_steps
from utils_tensorboard.server import serve_tensorboard
from utils_tensorboard.writer import TensorBoardWriter, write_embedding

STEPS, EVAL_INTERVAL, HISTOGRAM_INTERVAL = 6, 2, 3  # those of TINY
EVALUATIONS = [0, 2, 4, 6]
HISTOGRAMS = [0, 3]
LOOKS = (
    "--activation-interval 2 --attention-interval 3 --embedding-interval 3 --sample-interval 2"
    " --gradient-norm-interval 2 --speed-interval 3"
).split()
TENSORBOARD_ONLY = ["--data", "text.txt", *TINY, *LOOKS, "--no-aim"]
PAGES = {"_hparams_/session_start_info", "_hparams_/experiment", "custom_scalars__config__"}
NO_SAMPLING = dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0)


def read_events(folder: Path) -> EventAccumulator:
    """Everything that TensorBoard's own reader finds, with no sampling."""
    return EventAccumulator(str(folder), size_guidance=NO_SAMPLING).Reload()


def scalars(events: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def lasting(curves: dict[str, list]) -> dict[str, list]:
    """Those that two runs of the same seed share."""
    return {tag: points for tag, points in curves.items() if tag != "Tokens_Per_Second"}


def images(events: EventAccumulator) -> dict[tuple[str, int], np.ndarray]:
    """Every picture, decoded, by tag and step."""
    return {
        (tag, e.step): np.asarray(PIL.Image.open(io.BytesIO(e.encoded_image_string)))
        for tag in events.Tags()["images"]
        for e in events.Images(tag)
    }


def texts(folder: Path) -> list[tuple[str, int, str]]:
    """Every text, as it was handed over, with tag and step; found as the server finds it."""
    events = plugin_event_accumulator.EventAccumulator(str(folder), {"tensors": 0}).Reload()
    return [
        (tag.removesuffix("/text_summary"), e.step, make_ndarray(e.tensor_proto).item().decode())
        for tag in events.PluginTagToContent("text")
        for e in events.Tensors(tag)
    ]


def embeddings(folder: Path) -> dict[str, tuple[np.ndarray, list[str]]]:
    """What the projector's list leads to: vectors and labels by name."""
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), projector.ProjectorConfig())
    return {
        entry.tensor_name: (
            np.loadtxt(folder / entry.tensor_path, delimiter="\t", ndmin=2),
            (folder / entry.metadata_path).read_text(encoding="utf-8").removesuffix("\n").split("\n"),
        )
        for entry in config.embeddings
    }


def curves(metrics_path: Path) -> dict[str, list[tuple[int, float]]]:
    """The rows of a metrics file as TensorBoard should show them: in float32."""
    tags = {
        "loss/train_step": "Loss/train_step",
        "loss/train": "Loss/train",
        "loss/val": "Loss/val",
        "learning_rate": "Learning_Rate",
        "tokens": "Tokens",
        "gradient_norm": "Optimizer/gradient_norm",
        "tokens_per_second": "Tokens_Per_Second",
    }
    found: dict[str, list[tuple[int, float]]] = {tag: [] for tag in tags.values()}
    for row in read_metrics(metrics_path):
        for key in row.keys() & tags.keys():
            found[tags[key]].append((int(row["step"]), float(np.float32(row[key]))))
    losses = found["Loss/val"]
    lowest = np.minimum.accumulate([loss for _, loss in losses])
    found["Results/best_val"] = [(step, low) for (step, _), low in zip(losses, lowest, strict=True)]
    return found


# --- a run, read back ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with TensorBoard, and what it was told."""
    return recorded_run(tmp_path_factory.mktemp("tensorboard"), *TENSORBOARD_ONLY)


@pytest.fixture(scope="module")
def events(run) -> EventAccumulator:
    return read_events(run / "logs/tensorboard")


def test_a_run_has_exactly_these_tags(run, events):
    tensors, _ = read_tensors(run / "artifacts/checkpoints/step_000000006.safetensors")
    names = [name.removeprefix("model.") for name in tensors if name.startswith("model.")]
    assert len(names) > 10
    losses = {"Loss/train_step", "Loss/train", "Loss/val"}
    others = {"Learning_Rate", "Optimizer/gradient_norm", "Tokens_Per_Second", "Tokens", "Results/best_val"}
    assert set(events.Tags()["scalars"]) == losses | others
    assert set(events.Tags()["histograms"]) == {
        *(f"{kind}/{name}" for name in names for kind in ("Parameters", "Gradients")),
        *(f"Outputs/blocks.0{name}" for name in ("", ".sa", ".ffwd.net.1")),
    }
    assert set(events.Tags()["images"]) == {"Views/attention"}
    assert set(events.Tags()["tensors"]) == {"Samples/text_summary", *PAGES}


def test_a_run_has_one_point_for_each_step_that_was_due(events):
    steps = {tag: [step for step, _ in points] for tag, points in scalars(events).items()}
    assert steps == {
        "Loss/train_step": list(range(STEPS)),
        "Loss/train": EVALUATIONS,
        "Loss/val": EVALUATIONS,
        "Learning_Rate": EVALUATIONS,
        "Tokens": EVALUATIONS,
        "Results/best_val": EVALUATIONS,
        "Optimizer/gradient_norm": [0, 2, 4],
        "Tokens_Per_Second": [3, 6],
    }
    for tag in events.Tags()["histograms"]:
        due = [0, 2, 4, 6] if tag.startswith("Outputs") else HISTOGRAMS
        assert [e.step for e in events.Histograms(tag)] == due
    assert {step for _, step in images(events)} == {0, 3, 6}


def test_tensorboard_shows_what_the_metrics_file_says(run, events):
    assert scalars(events) == curves(run / "logs/metrics.jsonl")
    assert len({value for _, value in scalars(events)["Loss/train_step"]}) == STEPS


def test_histograms_are_those_of_numpy(run, events):
    checked = 0
    drawn = [tag for tag in events.Tags()["histograms"] if not tag.startswith("Outputs")]
    with np.load(run / "values.npz") as values:
        for tag in drawn:
            group, name = tag.split("/", 1)
            kind = {"Parameters": "parameter", "Gradients": "gradient"}[group]
            for event in events.Histograms(tag):
                histogram, tensor = event.histogram_value, values[f"{name} {kind} {event.step}"].ravel()
                if tensor.min() == tensor.max():
                    continue
                counts, edges = np.histogram(tensor.astype(float), HISTOGRAM_BINS)
                assert histogram.num == sum(histogram.bucket) == tensor.size
                assert (histogram.min, histogram.max) == (tensor.min(), tensor.max())
                assert histogram.bucket == counts.tolist()
                np.testing.assert_allclose(histogram.bucket_limit, edges[1:])
                assert histogram.bucket_limit[-1] == tensor.max()
                middles = (edges[1:] + edges[:-1]) / 2
                np.testing.assert_allclose(histogram.sum, counts @ middles, atol=1e-12)
                np.testing.assert_allclose(histogram.sum_squares, counts @ middles**2)
                checked += 1
    assert checked > 40


def hyperparameters(folder: Path) -> tuple[str, dict]:
    """The row of the run and what stands in it, found as the server finds it: what was said first."""
    events = plugin_event_accumulator.EventAccumulator(str(folder)).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    info = HParamsPluginData.FromString(content).session_start_info
    return info.group_name, {name: getattr(v, v.WhichOneof("kind")) for name, v in info.hparams.items()}


def test_the_table_of_hyperparameters_has_what_shapes_a_training_under_the_runs_name(run):
    name, values = hyperparameters(run / "logs/tensorboard")
    assert name == run.name
    assert {
        "n_embd": 16,
        "optimizer": "adamw",
        "qk_norm": False,
        "max_iters": STEPS,
    }.items() <= values.items()
    assert values["vocab_size"] == len(set(TEXT))
    assert not values.keys() & {"histogram_interval", "port", "runs_dir", "output", "device", "aim"}


def test_what_is_not_the_references_stands_behind_the_losses(events):
    """TensorBoard sorts its first page by the part of a tag before the slash."""
    ours = {tag for tags in events.Tags().values() if isinstance(tags, list) for tag in tags} - PAGES
    theirs = {tag for tag in ours if tag.startswith(("Loss/", "Parameters/", "Gradients/", "Learning_Rate"))}
    assert len(ours - theirs) == 9
    assert all(tag.lower() > "loss/" for tag in ours - theirs)


def test_the_pages_of_results_and_of_own_charts_begin_with_the_losses(run):
    """What the server's pages HParams and Custom Scalars are made of."""
    events = plugin_event_accumulator.EventAccumulator(str(run / "logs/tensorboard")).Reload()
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = HParamsPluginData.FromString(content).experiment
    shown = [(info.display_name, info.name.tag) for info in experiment.metric_infos]
    assert shown == [
        ("best val loss", "Results/best_val"),
        ("val loss", "Loss/val"),
        ("train loss", "Loss/train"),
    ]
    named = {info.name: info.differs for info in experiment.hparam_infos}
    assert named.keys() == hyperparameters(run / "logs/tensorboard")[1].keys()
    assert {name for name, first in named.items() if first} == set(MAIN_PARAMETERS)
    (layout,) = events.Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(make_ndarray(layout.tensor_proto).item()).category
    (chart,) = category.chart
    tags = read_events(run / "logs/tensorboard").Tags()["scalars"]
    found = [tag for regex in chart.multiline.tag for tag in tags if re.match(regex, tag)]
    assert (category.title, chart.title, found) == ("Loss", "train and val", ["Loss/train", "Loss/val"])


def test_a_hyperparameter_that_is_none_is_left_out(tmp_path):
    writer = TensorBoardWriter(tmp_path, warn=pytest.fail)
    writer.add_hparams("mine", {"a": None, "b": 0.5, "c": "x", "d": True, "e": 3})
    writer.close()
    assert hyperparameters(tmp_path) == ("mine", {"b": 0.5, "c": "x", "d": True, "e": 3.0})


def test_no_purge_hides_the_hyperparameters(tmp_path):
    for purge_step in (None, 0, 5):
        writer = TensorBoardWriter(tmp_path, purge_step, warn=pytest.fail)
        writer.add_hparams("mine", {"session": str(purge_step)})
        MetricLogger(writer).log("scalars", {"a": 1.0}, 7)
        writer.close()
    assert hyperparameters(tmp_path) == ("mine", {"session": "None"})


def test_pictures_texts_and_embeddings_are_those_that_were_shown(run, events):
    logged = pickle.loads((run / "logged.pkl").read_bytes())
    pictures = {
        ("Views/attention", step): image.pixels()
        for (name, step), data in logged.items()
        if name == "images"
        for image in data
    }
    found = images(events)
    assert found.keys() == pictures.keys()
    for key, pixels in pictures.items():
        assert found[key].shape == (*pixels.shape, 3)  # TensorBoard has no grey ones
        assert (found[key] == pixels[..., None]).all()
    assert texts(run / "logs/tensorboard") == [
        ("Samples", step, "    " + logged["texts", step]["samples"].replace("\n", "\n    "))
        for step in (0, 2, 4, 6)
    ]
    projected = embeddings(run / "logs/tensorboard")
    names = ["step_000000000", "step_000000003", "newest_step_6"]
    assert list(projected) == [f"Token_Embeddings:{name}" for name in names]
    for (vectors, labels), step in zip(projected.values(), (0, 3, 6), strict=True):
        embedding = logged["embedding", step]
        assert vectors.shape == (len(set(TEXT)), 16)
        np.testing.assert_allclose(vectors, embedding.vectors, rtol=1e-6)
        assert labels == embedding.labels
    assert labels[:2] == ["\\n", "\\x20"]


@pytest.mark.parametrize("text", ["one\n  two\n\n<b>*three*</b> & # four", "\n\nfirst", "a\u2028b|c|d"])
def test_a_text_is_legible_in_tensorboard(tmp_path, text):
    logger = MetricLogger(TensorBoardWriter(tmp_path, warn=pytest.fail))
    logger.log("texts", {"samples": text}, 3)
    logger.close()
    ((tag, step, markdown),) = texts(tmp_path)
    assert (tag, step) == ("Samples", 3)
    page = plugin_util.markdown_to_safe_html(markdown)
    (inside,) = re.findall("<pre><code>(.*)\n</code></pre>", page, re.DOTALL)
    assert html.unescape(inside).strip("\n") == text.strip("\n")


def test_with_every_interval_at_0_there_are_only_the_losses(train, text_file):
    off = [value if value.startswith("--") else "0" for value in LOOKS]
    flags = [*off, "--histogram-interval", 0, "--eval-interval", 4]
    assert train("--data", "text.txt", *TINY, *flags, "--no-aim").code == 0
    (path,) = list_runs("runs")
    events = read_events(path / "logs/tensorboard")
    tags = events.Tags()
    assert [step for step, _ in scalars(events)["Loss/val"]] == [0, 4, 6]
    losses = {"Loss/train_step", "Loss/train", "Loss/val", "Results/best_val"}
    assert set(tags["scalars"]) == losses | {"Learning_Rate", "Tokens"}
    assert tags["histograms"] == tags["images"] == []
    assert set(tags["tensors"]) == PAGES
    assert [p.name for p in (path / "logs/tensorboard").iterdir() if "tfevents" not in p.name] == []


def test_a_run_without_tensorboard_writes_no_events(train, text_file):
    assert train(*TENSORBOARD_ONLY, "--no-tensorboard").code == 0
    (path,) = list_runs("runs")
    assert list((path / "logs/tensorboard").iterdir()) == []


# --- a run that was interrupted -----------------------------------------------------------------------


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(n, function)` calls the function in the update of step n, once."""
    optimizer_step = Trainer.optimizer_step

    def arrange(n, function):
        def patched(trainer):
            if trainer.step == n:
                monkeypatch.setattr(Trainer, "optimizer_step", optimizer_step)
                function()
            optimizer_step(trainer)

        monkeypatch.setattr(Trainer, "optimizer_step", patched)

    return arrange


class Killed(BaseException):
    """Ends a run as no handler expects."""


def check_resumed(path: Path, run: Path) -> None:
    """TensorBoard shows the same of both runs, each step once."""
    ours, whole = read_events(path / "logs/tensorboard"), read_events(run / "logs/tensorboard")
    assert scalars(ours) == curves(path / "logs/metrics.jsonl")
    assert lasting(scalars(ours)) == lasting(scalars(whole))
    for tag in whole.Tags()["images"]:
        assert [e.step for e in ours.Images(tag)] == [0, 3, 6]
    assert [e.step for e in ours.Histograms("Outputs/blocks.0.sa")] == [0, 2, 4, 6]
    assert texts(path / "logs/tensorboard") == texts(run / "logs/tensorboard")
    a, b = images(ours), images(whole)
    assert a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)
    a, b = embeddings(path / "logs/tensorboard"), embeddings(run / "logs/tensorboard")
    assert list(a) == list(b)
    assert all((a[name][0] == b[name][0]).all() and a[name][1] == b[name][1] for name in a)


def test_a_stopped_run_goes_on_as_one_clean_curve(train, text_file, run, at_step):
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert train(*TENSORBOARD_ONLY).code == 130
    (path,) = list_runs("runs")
    rows = list(read_metrics(path / "logs/metrics.jsonl"))
    assert [row["step"] for row in rows if "loss/train_step" in row] == [0, 1, 2]
    assert train("--resume", "latest").code == 0
    assert lasting_metrics(path / "logs/metrics.jsonl") == lasting_metrics(run / "logs/metrics.jsonl")
    check_resumed(path, run)


def test_a_killed_run_goes_on_as_one_clean_curve(train, text_file, run, at_step):
    def kill():
        raise Killed

    at_step(5, kill)
    with pytest.raises(Killed):
        script.main(with_changes([*TENSORBOARD_ONLY, "--quiet"]))
    (path,) = list_runs("runs")
    before = scalars(read_events(path / "logs/tensorboard"))["Loss/train_step"]
    assert [step for step, _ in before] == [0, 1, 2, 3, 4, 5]  # further than the newest checkpoint
    assert train("--resume", "latest").code == 0
    assert lasting_metrics(path / "logs/metrics.jsonl") == lasting_metrics(run / "logs/metrics.jsonl")
    check_resumed(path, run)
    events = read_events(path / "logs/tensorboard")
    assert [e.step for e in events.Histograms("Parameters/lm_head.bias")] == HISTOGRAMS


# --- histograms ---------------------------------------------------------------------------------------


def one_parameter(values) -> torch.nn.Module:
    model = torch.nn.Module()
    model.p = torch.nn.Parameter(torch.tensor(values, dtype=torch.float32))
    return model


@pytest.mark.parametrize(
    "values",
    [
        [1.0, 2.0, 2.0, 7.0],
        [-1e30, 0.0, 1e30],
        [3e38, -3e38],
        [1e-40, 2e-40],
        [float("nan"), 1.0, 5.0, float("inf"), float("-inf")],
        [[1.0, 2.0], [3.0, 4.0]],
    ],
    ids=str,
)
def test_a_histogram_counts_the_finite_values(tmp_path, values):
    (histogram,) = model_histograms(one_parameter(values))
    finite = torch.tensor(values).numpy().ravel()
    finite = finite[np.isfinite(finite)]
    assert histogram.counts.shape == (HISTOGRAM_BINS,)
    assert histogram.counts.sum() == finite.size
    assert (histogram.edges[0], histogram.edges[-1]) == (finite.min(), finite.max())
    np.testing.assert_allclose(np.diff(histogram.edges), np.ptp(finite.astype(float)) / HISTOGRAM_BINS)
    assert read_one(tmp_path, values).num == finite.size


@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, -3.0, 1e30, -1e30, 1e-38])
def test_the_histogram_of_one_value_is_around_it(tmp_path, value):
    (histogram,) = model_histograms(one_parameter([value] * 5))
    (bin_,) = np.flatnonzero(histogram.counts)
    assert histogram.counts[bin_] == 5
    assert histogram.edges[bin_] <= np.float32(value) <= histogram.edges[bin_ + 1]
    assert (np.diff(histogram.edges) > 0).all()
    assert read_one(tmp_path, [value] * 5).num == 5


@pytest.mark.parametrize("values", [[], [float("nan")], [float("inf"), float("-inf"), float("nan")]], ids=str)
def test_there_is_no_histogram_of_nothing(values):
    assert list(model_histograms(one_parameter(values))) == []


def read_one(folder: Path, values) -> object:
    """What TensorBoard reads back of the histogram of one parameter."""
    logger = MetricLogger(TensorBoardWriter(folder, warn=pytest.fail))
    logger.log_model_histograms(one_parameter(values), 4)
    logger.close()
    (event,) = read_events(folder).Histograms("Parameters/p")
    assert event.step == 4
    return event.histogram_value


def test_a_parameter_and_its_gradient_are_two_histograms():
    model = one_parameter([1.0, 2.0])
    model.q = torch.nn.Parameter(torch.ones(3))
    model.p.grad = torch.tensor([8.0, 9.0])
    model.q.grad = torch.full((3,), float("nan"))
    found = {(h.name, h.kind): (h.edges[0], h.edges[-1]) for h in model_histograms(model)}
    assert found == {("p", "parameter"): (1, 2), ("p", "gradient"): (8, 9), ("q", "parameter"): (0.5, 1.5)}


# --- writer and logger on their own -------------------------------------------------------------------


def test_a_logger_on_its_own_writes_the_same_tags(tmp_path):
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.ones(1, 2)
    logger = MetricLogger(TensorBoardWriter(tmp_path / "new" / "folder", warn=pytest.fail))
    assert logger.writer.enabled
    logger.log_training_loss(1.5, 3)
    logger.log_evaluation_metrics(train_loss=1.25, val_loss=2.25, lr=0.5, step=4)
    logger.log_model_histograms(model, 5)
    logger.close()
    assert not logger.writer.enabled
    events = read_events(tmp_path / "new" / "folder")
    assert scalars(events) == {
        "Loss/train_step": [(3, 1.5)],
        "Loss/train": [(4, 1.25)],
        "Loss/val": [(4, 2.25)],
        "Learning_Rate": [(4, 0.5)],
    }
    assert set(events.Tags()["histograms"]) == {"Parameters/weight", "Gradients/weight"}


def test_a_name_without_a_tag_of_its_own_is_the_tag_and_an_unknown_kind_is_ignored(tmp_path):
    logger = MetricLogger(TensorBoardWriter(tmp_path, warn=pytest.fail))
    logger.log("scalars", {"new/metric": 1.5, "loss/val": 2.5}, 3)
    logger.log("histograms", [Histogram("p", "update", np.array([1, 2]), np.arange(3.0))], 3)
    logger.log("images", [Image("mask", np.eye(2)[None, None], "a", "b")], 3)
    logger.log("texts", {"notes": "a"}, 3)
    logger.log("embedding", Embedding("new/positions", np.eye(2, dtype=np.float32), ["a", "b"]), 3)
    logger.log("a kind of the future", object(), 3)
    assert logger.writer.enabled
    logger.close()
    events = read_events(tmp_path)
    assert scalars(events) == {"new/metric": [(3, 1.5)], "Loss/val": [(3, 2.5)]}
    assert events.Tags()["histograms"] == ["update/p"]
    assert images(events).keys() == {("mask", 3)}
    assert texts(tmp_path) == [("notes", 3, "    a")]
    ((name, (vectors, labels)),) = embeddings(tmp_path).items()
    assert (name, vectors.tolist(), labels) == ("new/positions:newest_step_3", [[1, 0], [0, 1]], ["a", "b"])


def test_a_flush_lets_a_reader_see_every_point(tmp_path):
    logger = MetricLogger(TensorBoardWriter(tmp_path, warn=pytest.fail))
    for step in range(100):
        logger.log("scalars", {"a": float(step)}, step)
    logger.flush()
    assert scalars(read_events(tmp_path))["a"] == [(step, float(step)) for step in range(100)]
    logger.close()


def test_what_is_written_after_the_end_is_dropped(tmp_path):
    writer = TensorBoardWriter(tmp_path, warn=pytest.fail)
    logger = MetricLogger(writer)
    logger.log("scalars", {"a": 1.0}, 0)
    logger.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    logger.log("scalars", {"a": 2.0}, 1)
    logger.log("embedding", Embedding("e", np.zeros((2, 2)), ["a", "b"]), 1)
    writer.add_hparams("mine", {"a": 1})
    logger.flush()
    logger.close()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_purge_hides_that_step_and_later_ones_however_fast_it_follows(tmp_path):
    for session in range(3):
        purge_step = session if session else None
        logger = MetricLogger(TensorBoardWriter(tmp_path, purge_step, warn=pytest.fail))
        for step in range(session, 6):
            logger.log("scalars", {"a": float(session)}, step)
            logger.log("texts", {"t": str(session)}, step)
        logger.close()
        kept = [(step, text.strip()) for _, step, text in texts(tmp_path)]
        assert kept == [(step, str(min(step, session))) for step in range(6)]
    assert scalars(read_events(tmp_path))["a"] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_the_last_steps_are_those_that_a_purge_has_left(tmp_path):
    log_points(tmp_path, None, range(6), 1.0)
    assert last_steps(tmp_path) == {"a": 5}
    log_points(tmp_path, 3, range(0), 1.0)
    assert last_steps(tmp_path) == {"a": 2}
    log_points(tmp_path, 0, range(0), 1.0)
    assert last_steps(tmp_path) == last_steps(tmp_path / "none") == {}


def test_a_purge_forgets_the_embeddings_of_that_step_and_later_ones(tmp_path):
    def write(purge_step: int | None, *steps: int) -> list[str]:
        writer = TensorBoardWriter(tmp_path, purge_step, pytest.fail)
        for step in steps:
            MetricLogger(writer).log("embedding", Embedding("E", np.full((2, 3), step), ["a", "b"]), step)
        writer.close()
        names = list(embeddings(tmp_path))
        # The projector opens with the first name of the alphabet.
        assert [name for name in names if "newest" in name] == sorted(names)[:1] == names[-1:]
        return [re.fullmatch("E:(?:newest_)?step_0*(.+)", name)[1] for name in names]

    assert write(0, 5, 10, 15) == ["5", "10", "15"]
    assert write(None, 20) == ["5", "10", "15", "20"]
    assert write(10, 12) == ["5", "12"]
    assert write(6) == ["5"]
    assert embeddings(tmp_path)["E:newest_step_5"][0].tolist() == [[5, 5, 5], [5, 5, 5]]
    assert write(0) == []


def test_the_projector_shows_characters_in_place_of_points(tmp_path):
    labels = ["a", "\\n", "日", "Ω", "b"]
    write_embedding(tmp_path, "E", np.eye(5), labels, 3)
    config = text_format.Parse((tmp_path / "projector_config.pbtxt").read_text(), projector.ProjectorConfig())
    (entry,) = config.embeddings
    assert list(entry.sprite.single_image_dim) == [48, 48]
    sheet = np.asarray(PIL.Image.open(tmp_path / entry.sprite.image_path))[..., 3]
    assert sheet.shape == (3 * 48, 3 * 48)  # as many across as down
    squares = sheet.reshape(3, 48, 3, 48).swapaxes(1, 2).reshape(9, 48, 48)
    assert [bool((square > 128).any()) for square in squares] == [True] * 5 + [False] * 4
    assert (squares[2] == draw_labels(["\u2022"])[..., 3]).all()  # the font lacks it
    assert (squares[3] != squares[2]).any()


def test_of_very_many_embeddings_the_projector_shows_points(tmp_path):
    write_embedding(tmp_path, "E", np.zeros((1025, 2)), ["a"] * 1025, 3)
    assert [path.name for path in tmp_path.rglob("*.png")] == []
    assert "sprite" not in (tmp_path / "projector_config.pbtxt").read_text()


def log_points(folder: Path, purge_step: int | None, steps: range, value: float) -> None:
    logger = MetricLogger(TensorBoardWriter(folder, purge_step, warn=pytest.fail))
    for step in steps:
        logger.log("scalars", {"a": value}, step)
    logger.close()


@pytest.mark.parametrize("behind", [0, 1, 3600, 10**9], ids=lambda seconds: f"{seconds} s")
def test_points_under_a_clock_that_is_behind_are_seen_after_the_others(tmp_path, monkeypatch, behind):
    log_points(tmp_path, None, range(6), 1.0)
    watcher = EventAccumulator(str(tmp_path), size_guidance=NO_SAMPLING).Reload()  # as a running server
    clock = types.SimpleNamespace(time=lambda: time.time() - behind)
    monkeypatch.setattr("utils_tensorboard.event_file.time", clock)
    for session in (2.0, 3.0):
        log_points(tmp_path, 4, range(4, 8), session)
        seen = [(step, 1.0) for step in range(4)] + [(step, session) for step in range(4, 8)]
        assert scalars(watcher.Reload())["a"] == seen
        assert scalars(read_events(tmp_path))["a"] == seen
    first, second, third = (int(path.name.split(".")[3]) for path in sorted(tmp_path.iterdir()))
    assert (second, third) == (first + 1, first + 2)
    newest_file = sorted(tmp_path.iterdir())[-1]
    wall_times = [e.wall_time for e in EventAccumulator(str(newest_file)).Reload().Scalars("a")]
    assert wall_times == pytest.approx([time.time()] * 4, abs=600)  # the axis of times is not shifted


def test_an_event_file_of_this_second_does_not_hide_the_next_one(tmp_path):
    for name in ("events.out.tfevents.1700000000.host.9.9", "events.out.tfevents.x", "other"):
        (tmp_path / name).touch()
    seconds: list[int] = []
    for _ in range(3):
        path = new_path(tmp_path)
        path.touch()
        seconds.append(int(path.name.split(".")[3]))
    assert int(time.time()) - 600 < seconds[0] <= time.time()  # no later than needed
    assert seconds == [seconds[0] + i for i in range(3)]


def test_what_is_written_does_not_bring_a_deleted_folder_or_file_back(tmp_path):
    folder = tmp_path / "logs"
    logger = MetricLogger(TensorBoardWriter(folder, warn=pytest.fail))
    logger.log("scalars", {"a": 1.0}, 0)
    for path in folder.iterdir():
        path.unlink()
    logger.log("scalars", {"a": 1.0}, 1)
    logger.flush()
    assert list(folder.iterdir()) == []
    folder.rmdir()
    logger.log("scalars", {"a": 1.0}, 2)
    logger.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["before", "listed"])
def test_a_folder_that_is_deleted_while_it_is_opened_is_not_made_anew(tmp_path, monkeypatch, moment):
    folder = tmp_path / "logs"
    if moment == "listed":
        folder.mkdir()
        monkeypatch.setattr("utils_tensorboard.event_file.socket.gethostname", lambda: folder.rmdir() or "h")
    warnings: list[str] = []
    writer = TensorBoardWriter(folder, None, warnings.append, must_exist=True)
    assert not writer.enabled
    assert list(tmp_path.iterdir()) == []
    (warning,) = warnings
    assert warning.startswith("TensorBoard is switched off, training continues: No such file or directory: ")


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path):
    (tmp_path / "file").touch()
    warnings: list[str] = []
    writer = TensorBoardWriter(tmp_path / "file" / "logs", warn=warnings.append)
    assert not writer.enabled
    MetricLogger(writer).log("scalars", {"a": 1.0}, 0)
    writer.close()
    (warning,) = warnings
    assert warning.startswith("TensorBoard is switched off, training continues: Not a directory: ")


def test_used_on_its_own_a_failure_is_a_python_warning(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="TensorBoard is switched off"):
        TensorBoardWriter(tmp_path / "file" / "logs")


class Broken:
    """Raises in every method that is used of a SummaryWriter."""

    def fail(self, *_, **__):
        raise RuntimeError("boom")

    file_writer = property(fail)
    add_scalar = add_histogram_raw = add_image = add_text = flush = close = fail


@pytest.mark.parametrize(
    "work",
    [
        lambda logger: logger.log("scalars", {"a": 1.0}, 0),
        lambda logger: logger.log("embedding", Embedding("e", None, ["a"]), 0),
        lambda logger: logger.writer.add_hparams("mine", {"a": 1}),
        lambda logger: logger.writer.attempt(lambda events: events.add_text("t", "text", 0)),
        lambda logger: logger.flush(),
        lambda logger: logger.close(),
    ],
)
def test_no_method_raises_and_the_first_failure_is_the_only_warning(tmp_path, work):
    warnings: list[str] = []
    logger = MetricLogger(TensorBoardWriter(tmp_path, warn=warnings.append))
    logger.writer._writer.close()
    logger.writer._writer = Broken()
    for _ in range(2):
        work(logger)
    assert not logger.writer.enabled
    (warning,) = warnings
    assert warning.startswith("TensorBoard is switched off, training continues: ")


# --- instructions -------------------------------------------------------------------------------------


def test_the_instructions_name_the_folder_and_the_port():
    assert instructions()[0] == "tensorboard --logdir=runs --port=6006"
    assert instructions("my-runs", 7007) == (
        "tensorboard --logdir=my-runs --port=7007",
        "then open http://localhost:7007/?tagFilter=Loss&smoothing=0",
    )


# --- server -------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def is_served(process: subprocess.Popen, port: int) -> bool:
    """Wait until the server answers; False if it ended or does not answer within half a minute."""
    end = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < end:
        if answers("127.0.0.1", port):
            return True
        time.sleep(0.1)
    return False


def ask(port: int, path: str) -> object:
    """An answer of TensorBoard's HTTP API, straight from this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path)
    response = connection.getresponse()
    assert response.status == 200, path
    return json.loads(response.read())


def test_the_server_answers_with_the_points_of_a_run_on_loopback_only(run, events):
    said: list[str] = []
    port = free_port()
    with serve_tensorboard(run.parent, port, said.append, pytest.fail) as process:
        assert process is not None and is_served(process, port)
        assert not answers("127.0.0.2", port)
        name = f"{run.name}/logs/tensorboard"
        end = time.monotonic() + 60
        while not (tags := ask(port, "/data/plugin/scalars/tags")) and time.monotonic() < end:
            assert process.poll() is None
        assert set(tags[name]) == set(events.Tags()["scalars"])
        for tag, points in scalars(events).items():
            query = f"/data/plugin/scalars/scalars?tag={quote(tag, safe='')}&run={quote(name, safe='')}"
            assert [(step, value) for _, step, value in ask(port, query)] == points
        (listed,) = ask(port, "/data/plugin/projector/runs")
        info = ask(port, f"/data/plugin/projector/info?run={quote(listed, safe='')}")
        assert listed == name
        assert [entry["tensorName"] for entry in info["embeddings"]] == list(
            embeddings(run / "logs/tensorboard")
        )
        assert info["embeddings"][0]["tensorShape"] == [len(set(TEXT)), 16]
    assert said == [
        f"TensorBoard is at http://127.0.0.1:{port}/?tagFilter=Loss&smoothing=0 while this run lasts"
    ]
    assert process.poll() is not None
    assert not answers("127.0.0.1", port)


@needs_chromium
def test_the_address_opens_on_the_losses_not_smoothed(run, chromium):
    port = free_port()
    with serve_tensorboard(run.parent, port, str, pytest.fail) as process:
        assert process is not None and is_served(process, port)
        end = time.monotonic() + 60
        while not ask(port, "/data/plugin/scalars/tags") and time.monotonic() < end:
            time.sleep(0.1)
        chromium.open(address(port, "127.0.0.1"), 1400, 1200)
        titles = "[...document.querySelectorAll('tb-truncated-path.tag')].map(tag => tag.title)"
        chromium.wait(f"{titles}.slice(0, 3).join() === 'Loss/train,Loss/train_step,Loss/val'")
        smoothing = "document.querySelector('input.slider-input[aria-labelledby=scalars-smoothing-label]')"
        chromium.wait(f"{smoothing}?.value === '0'")


def test_a_busy_port_is_a_warning(tmp_path):
    warnings: list[str] = []
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with serve_tensorboard(tmp_path, port, pytest.fail, warnings.append) as process:
            assert process is None
    (warning,) = warnings
    assert warning.startswith(f"TensorBoard is not served on port {port}: Address already in use")
    assert warning.endswith("; try --port N")


def test_a_server_that_cannot_be_started_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module.sys, "executable", str(tmp_path / "no-python"))
    warnings: list[str] = []
    port = free_port()
    with serve_tensorboard(tmp_path, port, pytest.fail, warnings.append):
        pass
    (warning,) = warnings
    assert warning.startswith(f"TensorBoard is not served on port {port}: No such file")


def test_a_server_that_ends_early_is_a_warning(tmp_path):
    warnings: list[str] = []
    with serve_tensorboard(tmp_path, free_port(), str, warnings.append) as process:
        process.kill()
        process.wait()
    assert warnings == [f"the TensorBoard server ended early (exit code {-signal.SIGKILL})"]


@pytest.mark.parametrize("ctrl_c", [False, True])
def test_a_server_that_does_not_end_is_killed(tmp_path, monkeypatch, ctrl_c):
    monkeypatch.setattr(server_module, "STOP_TIMEOUT", 60 if ctrl_c else 0.1)
    deaf = tmp_path / "deaf.sh"
    deaf.write_text("#!/bin/sh\ntrap '' TERM\ntouch ready\nwhile :; do sleep 0.1; done\n")
    deaf.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server_module.sys, "executable", str(deaf))
    with serve_tensorboard(tmp_path, free_port(), str, pytest.fail) as process:
        while not Path("ready").exists():
            assert process.poll() is None
            time.sleep(0.01)
        if ctrl_c:
            threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
    assert process.poll() == -signal.SIGKILL


@pytest.fixture
def servers(monkeypatch) -> list[subprocess.Popen]:
    """Every TensorBoard process that is started."""
    started: list[subprocess.Popen] = []
    real = subprocess.Popen

    def start(command, **options):
        process = real(command, **options)
        if "tensorboard.main" in command:
            started.append(process)
        return process

    monkeypatch.setattr(server_module.subprocess, "Popen", start)
    return started


def test_a_run_serves_tensorboard_while_it_lasts(train, text_file, servers):
    port = free_port()
    result = train(*TENSORBOARD_ONLY, "--serve-tensorboard", "--port", port)
    assert (result.code, result.err) == (0, "")
    assert (
        f"TensorBoard is at http://127.0.0.1:{port}/?tagFilter=Loss&smoothing=0 while this run lasts"
        in result.out.splitlines()
    )
    (process,) = servers
    assert process.poll() is not None
    assert process.args[3:] == ["--logdir=runs", "--host=127.0.0.1", f"--port={port}"]
