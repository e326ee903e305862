"""The life of a TensorBoard event file."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils_alg1.base.errors import Guard
from utils_alg1.base.files import write_atomically

PROJECTOR_FOLDER = "projector"  # beside the event files


class TensorBoardWriter:
    """Opens, feeds and closes a `SummaryWriter`. No failure of it reaches the caller.

    Args:
        log_dir: folder of the event files.
        purge_step: when a run is resumed, hide the points of this step and later ones.
        warn: told once, when TensorBoard fails or is not installed.
    """

    def __init__(
        self,
        log_dir: str | Path,
        purge_step: int | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ):
        self._guard = Guard("TensorBoard", warn)
        self._log_dir = Path(log_dir)
        self._writer = self._guard.attempt(self._open, self._log_dir, purge_step)
        if purge_step is not None and self.enabled:
            self._guard.attempt(self._purge_embeddings, purge_step)

    @staticmethod
    def _open(log_dir: Path, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # Event files are read in the order of their names, which start with whole seconds: a file of this
        # second could sort after ours, and its points would then outlive the purge.
        log_dir.mkdir(parents=True, exist_ok=True)
        # Some readers take a folder's first purge for its beginning, and hide nothing.
        if not any(log_dir.glob("events.out.tfevents.*")):
            purge_step = 0
        while any(log_dir.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.02)
        return SummaryWriter(str(log_dir), purge_step=purge_step)

    @property
    def enabled(self) -> bool:
        """Whether points are still being written."""
        return self._guard.enabled and self._writer is not None

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write one point of a curve."""
        if self.enabled:
            self._guard.attempt(self._writer.add_scalar, tag, value, step)

    def add_histogram(self, tag: str, counts: Any, edges: Any, step: int) -> None:
        """Write a histogram that is already counted: n counts between n + 1 edges."""
        if self.enabled:
            self._guard.attempt(self._add_histogram, tag, counts, edges, step)

    def _add_histogram(self, tag: str, counts: Any, edges: Any, step: int) -> None:
        import numpy as np

        middles = (edges[:-1] + edges[1:]) / 2
        self._writer.add_histogram_raw(
            tag,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(counts.sum()),
            sum=float(np.dot(counts, middles)),
            sum_squares=float(np.dot(counts, middles**2)),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def add_image(self, tag: str, pixels: Any, step: int) -> None:
        """Write a picture: (H, W) or (H, W, 3) uint8."""
        if self.enabled:
            layout = "HW" if pixels.ndim == 2 else "HWC"
            self._guard.attempt(self._writer.add_image, tag, pixels, step, dataformats=layout)

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Write a text, shown as it is: every line and space of it."""
        if self.enabled:
            # TensorBoard reads Markdown; lines that are indented are code to it, which it leaves alone.
            code = "    " + text.replace("\n", "\n    ")
            self._guard.attempt(self._writer.add_text, tag, code, step)

    def add_hparams(self, name: str, values: Mapping[str, Any]) -> None:
        """Write the run's hyperparameters: texts, numbers and truth values by name; a None is left out.

        `name` is that of the run's row. TensorBoard keeps what a folder's first call has said.
        """
        if self.enabled:
            self._guard.attempt(self._add_hparams, name, values)

    def _add_hparams(self, name: str, values: Mapping[str, Any]) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # "api" beside it needs TensorFlow

        # SummaryWriter.add_hparams would make a run of its own for them, and refuses None. The summary
        # belongs to no step, so that no purge hides it.
        known = {key: value for key, value in values.items() if value is not None}
        self._writer.file_writer.add_summary(hparams_pb(known, trial_id=name))

    def add_embedding(self, tag: str, vectors: Any, labels: list[str], step: int) -> None:
        """Write (V, C) vectors for the projector; the labels stay on one line and have no tabs."""
        if self.enabled:
            self._guard.attempt(self._add_embedding, tag, vectors, labels, step)

    # SummaryWriter.add_embedding forgets, once reopened, what it has written before. Here the files are the
    # memory: the projector's list is made anew from those that lie there.

    def _add_embedding(self, tag: str, vectors: Any, labels: list[str], step: int) -> None:
        folder = self._log_dir / PROJECTOR_FOLDER / tag
        folder.mkdir(parents=True, exist_ok=True)
        rows = ("\t".join(f"{value:.7g}" for value in row) for row in vectors.tolist())
        write_atomically(folder / "labels.tsv", "".join(f"{label}\n" for label in labels).encode())
        write_atomically(folder / f"step_{step:09d}.tsv", "".join(f"{row}\n" for row in rows).encode())
        self._list_embeddings()

    def _purge_embeddings(self, purge_step: int) -> None:
        for path in self._embedding_files():
            if _step_of(path) >= purge_step:
                path.unlink()
        if (self._log_dir / PROJECTOR_FOLDER).exists():
            self._list_embeddings()

    def _embedding_files(self) -> list[Path]:
        return sorted((self._log_dir / PROJECTOR_FOLDER).glob("*/step_*.tsv"))

    def _list_embeddings(self) -> None:
        from google.protobuf import text_format
        from tensorboard.plugins import projector
        from tensorboard.plugins.projector.metadata import PROJECTOR_FILENAME

        files = self._embedding_files()
        newest = {path.parent: path for path in files}
        config = projector.ProjectorConfig()
        for path in files:
            # The projector sorts the names and opens with the first, so the newest needs one before "step".
            last = path == newest[path.parent]
            entry = config.embeddings.add()
            entry.tensor_name = f"{path.parent.name}:{f'newest_step_{_step_of(path)}' if last else path.stem}"
            entry.tensor_path = path.relative_to(self._log_dir).as_posix()
            entry.metadata_path = (path.parent / "labels.tsv").relative_to(self._log_dir).as_posix()
        text = text_format.MessageToString(config)
        write_atomically(self._log_dir / PROJECTOR_FILENAME, text.encode())

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        if self.enabled:
            self._guard.attempt(self._writer.flush)

    def close(self) -> None:
        """Flush and close; what is written after that is dropped."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._guard.attempt(writer.close)


def _step_of(path: Path) -> int:
    """The step of an embedding's file."""
    return int(path.stem.removeprefix("step_"))
