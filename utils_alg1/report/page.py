"""eval/report.html: a self-contained page with the settings and the results of a run.

It is built from the files of the run and contains no script, no external request and no font. Charts are
SVG that scales with the page, and their labels are HTML text, so that they are readable on a phone. All text
from outside passes through `escape`.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from parameters import specs
from utils_alg1.base.files import read_json_object, read_text, write_atomically, write_or_warn
from utils_alg1.base.text import format_count, format_duration, format_number, replace_control_characters
from utils_alg1.report.charts import Line, chart
from utils_alg1.run_directory import RunDirectory, RunFolder
from utils_alg1.tracking.metrics_file import Curves, read_curves
from utils_alg1.utils_output import Console

MAX_EVALUATIONS = 200  # rows of the table of evaluations


def try_page(run: RunDirectory, samples: list[str], attention_text: str | None, console: Console) -> None:
    """Write eval/report.html; if that fails, print a warning.

    Args:
        run: the finished run.
        samples: generated texts.
        attention_text: the text shown in eval/attention.png; None if there is no such picture.
        console: receives the warning.
    """

    def write(path: Path) -> None:
        write_atomically(path, build_page(run.path, samples, attention_text).encode("utf-8"))

    write_or_warn(run.report_path, write, "no report was written", console.warn)


def build_page(run_dir: Path, samples: list[str], attention_text: str | None) -> str:
    """Build the page from the directory of a finished run.

    Raises:
        Alg1Error: eval/final.json or meta/full_config.json cannot be read.
        KeyError: a value is missing in one of them.
        OSError: another file is missing or cannot be read.
    """
    run = RunFolder(run_dir)
    final, record = read_json_object(run.final_path), read_json_object(run.record_path)
    curves = read_curves(run.metrics_path)
    sections = [
        f"<h1>{escape(run_dir.name)}</h1>",
        f"<p class=lead>{describe(final, record)}</p>",
        cards(final),
        loss_chart(curves, final),
        small_charts(curves, final["steps"]),
        section("Samples", sample_texts(samples, final)),
    ]
    if attention_text is not None:
        picture = (run.eval_dir / "attention.png").read_bytes()
        sections.append(section("Attention", attention(picture, attention_text)))
    sections += [
        section("Parameters", parameter_tables(record)),
        section("Evaluations", evaluation_table(curves)),
        section("Where it came from", provenance(run.meta_dir, record)),
    ]
    return PAGE.format(title=escape(run_dir.name), policy=POLICY, style=STYLE, body="\n".join(sections))


def escape(text: Any) -> str:
    """Convert to text that is safe anywhere in HTML."""
    return html.escape(replace_control_characters(str(text)))


def section(heading: str, body: str) -> str:
    """Return a section with a heading; its class is the first word of the heading."""
    return f'<section class="{heading.split()[0].lower()}"><h2>{heading}</h2>\n{body}</section>'


# --- figures ------------------------------------------------------------------------------------------


def describe(final: dict[str, Any], record: dict[str, Any]) -> str:
    """Describe model, training and text in two sentences."""
    p, corpus = record["parameters"], record["corpus"]
    return (
        f"{format_count(final['n_parameters'], 'parameter')} ({format_count(p['n_layer'], 'layer')},"
        f" {format_count(p['n_head'], 'head')}, width {p['n_embd']}, context {p['block_size']}),"
        f" trained for {format_count(final['steps'], 'step')} on"
        f" <bdi>{escape(Path(corpus['path']).name)}</bdi>"
        f" ({format_count(corpus['characters'], 'character')})."
        f" Finished {escape(final['finished_at'][:16].replace('T', ' '))}."
    )


def cards(final: dict[str, Any]) -> str:
    """Return the most important results in large digits."""
    speed = final["tokens_per_second_overall"]
    values = {
        "best val loss": (
            format_number(final["best_val_loss"]),
            f"nats per character, step&nbsp;{final['best_step']:,}",
        ),
        "perplexity": (format_number(final["best_perplexity"], 2), "at the best val loss"),
        "bits per character": (format_number(final["best_bits_per_character"], 3), "at the best val loss"),
        "last val loss": (
            format_number(final["val_loss"]),
            f"train loss {format_number(final['train_loss'])}",
        ),
        "speed": (f"{speed:,.{0 if speed >= 10 else 1}f}" if speed else "-", "characters per second"),
        "time": (
            format_duration(final["seconds_in_loop"]),
            f"{format_count(final['tokens'], 'character')} read",
        ),
    }
    items = [
        f"<div><dt>{name}</dt><dd><b>{value}</b><small>{note}</small></dd></div>"
        for name, (value, note) in values.items()
    ]
    return f"<dl class=cards>{''.join(items)}</dl>"


# --- curves -------------------------------------------------------------------------------------------


def loss_chart(curves: Curves, final: dict[str, Any]) -> str:
    """Return the chart of the losses, with a dot at the best validation loss."""
    best = [(float(final["best_step"]), float(final["best_val_loss"]))]
    lines = [
        Line("train, each step", "each", curves.each_step),
        Line("train", "train", curves.train),
        Line("val", "val", curves.val),
        Line("best", "best", best),
    ]
    return chart("Loss", "nats per character, over the steps", lines, final["steps"], large=True)


def small_charts(curves: Curves, n_steps: int) -> str:
    """Return the charts of learning rate, gradient norm and speed."""
    charts = [
        chart("Learning rate", "", [Line("", "train", curves.learning_rate)], n_steps),
        chart("Gradient norm", "", [Line("", "train", curves.gradient_norm)], n_steps),
        chart("Speed", "characters per second", [Line("", "train", curves.speed)], n_steps),
    ]
    return f"<div class=charts>{''.join(charts)}</div>"


# --- text and tables ----------------------------------------------------------------------------------


def sample_texts(samples: list[str], final: dict[str, Any]) -> str:
    """Return the generated texts and which weights generated them."""
    exported = final["export"]
    weights = f"the {escape(exported['weights'])} ones, of step {exported['step']:,}"
    texts = "".join(f"<pre dir=auto>\n{escape(sample)}</pre>" for sample in samples)
    return f"<p>Drawn from the exported weights, {weights}.</p>{texts}"


def attention(picture: bytes, text: str) -> str:
    """Return the attention picture (PNG) with its explanation and the text that it shows."""
    data = base64.b64encode(picture).decode("ascii")
    return (
        "<p>How much each character (a row of a square) attends to each one before it and to itself"
        " (a column): black is not at all, the lighter the more. The text, from the part held out for"
        f" evaluation:</p><pre dir=auto>\n{escape(text)}</pre>"
        '<img alt="attention weights of each layer and head"'
        f' src="data:image/png;base64,{data}">'
    )


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table; the cells are HTML."""
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class=scroll><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"


def parameter_tables(record: dict[str, Any]) -> str:
    """Return a table of the parameters that differ from their defaults, and a collapsed one of all."""
    values, origins = record["parameters"], record["origins"]
    rows = {
        name: [
            f"<code>{escape(name)}</code>",
            value_cell(value),
            default_of(name),
            escape(origins.get(name, "")),
        ]
        for name, value in values.items()
    }
    head = ("parameter", "value", "default", "from")
    changed = [
        rows[name] for name, value in values.items() if name not in specs() or value != specs()[name].default
    ]
    first = table(head, changed) if changed else "<p>Every value is the default.</p>"
    return f"{first}{collapsed(f'all {len(rows)} parameters', table(head, rows.values()))}"


def default_of(name: str) -> str:
    """Return the default of a parameter for a cell; "" if the parameter does not exist any more."""
    return value_cell(specs()[name].default) if name in specs() else ""


def value_cell(value: Any) -> str:
    """Return the value of a parameter for a cell."""
    if value is None or value == "":
        return "<i>none</i>"
    return escape(str(value).lower() if isinstance(value, bool) else value)


def collapsed(title: str, body: str) -> str:
    """Return content that the reader opens with a click on its title."""
    return f"<details><summary>{title}</summary>{body}</details>"


def evaluation_table(curves: Curves) -> str:
    """Return a collapsed table of the evaluations, evenly spaced ones if there are too many."""
    train, rates = dict(curves.train), dict(curves.learning_rate)
    every = math.ceil(len(curves.val) / MAX_EVALUATIONS) or 1
    selected = curves.val[::-1][::every][::-1]  # counted from the end, to include the last one
    rows = [
        [
            f"{step:,}",
            format_number(train.get(step)),
            format_number(val),
            f"{rates[step]:.3g}" if step in rates else "-",
        ]
        for step, val in selected
    ]
    title = f"{len(selected)} of " if every > 1 else ""
    return collapsed(
        title + format_count(len(curves.val), "evaluation"),
        table(("step", "train loss", "val loss", "learning rate"), rows),
    )


def provenance(meta_dir: Path, record: dict[str, Any]) -> str:
    """Return a table of the text, the device, the git commit and the environment."""
    corpus, runtime = record["corpus"], record["runtime"]
    rows = {
        "text": f"{corpus['path']}, {format_count(corpus['characters'], 'character')},"
        f" {corpus['vocab_size']} distinct",
        "SHA-256 of the text": corpus["sha256"],
        "device": f"{runtime['device']}, {runtime['dtype']}, {format_count(runtime['threads'], 'thread')}",
        **{f"git {name}": value for name, value in read_lines(meta_dir / "git.txt").items()},
        **read_lines(meta_dir / "env.txt"),
    }
    return table(("", ""), [[escape(name), escape(value)] for name, value in rows.items()])


def read_lines(path: Path) -> dict[str, str]:
    """Read a file of `name: value` lines; return an empty dict if it cannot be read."""
    try:
        pairs = (line.partition(": ") for line in read_text(path).splitlines())
    except Exception:
        return {}
    return {name: value for name, separator, value in pairs if separator}


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no external requests

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --card: #f5f6f8; --ink: #1b1f27; --soft: #5f6775;
  --rule: #dde0e6; --each: #b9bfca; --train: #2563eb; --val: #d9660b; --best: #15803d; }
@media (prefers-color-scheme: dark) { :root { --ground: #14161a; --card: #1e2127; --ink: #e6e8ec;
  --soft: #9aa2b1; --rule: #343942; --each: #565d6b; --train: #6ea0ff; --val: #ff9d4d; --best: #4ade80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; unicode-bidi: isolate; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p { margin: .25rem 0 .75rem; }
small { font-size: .8rem; }
.lead, small, th { color: var(--soft); }
bdi, td:nth-child(2) { overflow-wrap: anywhere; }

.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem;
  margin: 1rem 0 1.75rem; }
.cards div { background: var(--card); border-radius: .5rem; padding: .6rem .75rem; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; }
dd b { display: block; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
dd small { display: block; line-height: 1.3; }

figure { margin: 0; --left: max(3.25rem, calc(var(--widest) * .45rem + .5rem)); }
figcaption { font-weight: 600; margin-bottom: .5rem; }
figcaption small { font-weight: 400; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr));
  gap: 1.5rem 1rem; margin-top: 1.75rem; }
.plot { position: relative; height: 9rem; margin: 0 .75rem 1.75rem var(--left); }
.large .plot { height: 20rem; }
.plot svg { position: absolute; width: 100%; height: 100%; overflow: visible; }
.plot span { position: absolute; font-size: .75rem; color: var(--soft); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.plot .y { right: calc(100% + .5rem); transform: translateY(-50%); }
.plot .x { top: calc(100% + .35rem); transform: translateX(-50%); }
path, polyline { fill: none; vector-effect: non-scaling-stroke; stroke-width: 2px; stroke-linejoin: round;
  stroke-linecap: round; }
path.grid { stroke: var(--rule); stroke-width: 1px; }
polyline.each { stroke: var(--each); stroke-width: 1px; }
polyline.train { stroke: var(--train); }
polyline.val { stroke: var(--val); }
polyline.best { stroke: var(--best); }
polyline.dot { stroke-width: 9px; }
.key { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0 0 0 var(--left);
  padding: 0; font-size: .85rem; }
.key li::before { content: ""; display: inline-block; width: 1.1rem; height: .2rem; border-radius: .1rem;
  margin-right: .4rem; vertical-align: middle; }
.key .each::before { background: var(--each); }
.key .train::before { background: var(--train); }
.key .val::before { background: var(--val); }
.key .best::before { background: var(--best); width: .55rem; height: .55rem; border-radius: 50%; }

pre { background: var(--card); border-radius: .5rem; padding: .75rem; margin: .5rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; unicode-bidi: isolate; font-size: .85rem; line-height: 1.45;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
img { display: block; max-width: 100%; height: auto; border-radius: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:empty { display: none; }
td:nth-child(4) { white-space: nowrap; }
@media (max-width: 36rem) {  /* "from" says where a value is the default */
  table { font-size: .8rem; }
  .parameters details :is(td, th):nth-child(3) { display: none; }
}
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--train); }
"""
