"""`logs/samples.jsonl`, the texts that a run draws on its way: writing, reading and cutting it back.

A text is drawn every sample_interval steps, always from the same prompt and seed. A power cut may cost the
newest ones: nothing waits for the disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from utils_alg1.base.summaries import Kind, Tracker
from utils_alg1.tracking.metrics_file import cut_rows, disk_errors, read_metrics

NAME = "samples"  # of the text in a row, as in the trackers


class SamplesFile(Tracker):
    """Writes a JSON object per line for each set of texts. Raises Alg1Error (exit code 4) if it cannot."""

    def __init__(self, path: Path):
        self._path = path

    def log(self, kind: Kind, payload: Any, step: int) -> None:
        if kind == "texts" and payload:
            with disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **payload}) + "\n")


def read_samples(path: Path) -> list[tuple[int, str]]:
    """Return the steps and the texts, up to the first damaged row; [] if there is no file."""
    return [(int(row["step"]), str(row[NAME])) for row in read_metrics(path) if NAME in row]


def cut_samples(path: Path, step: int) -> None:
    """Remove the texts of `step` and later ones, which a run resumed at `step` draws again."""
    cut_rows(path, step)
