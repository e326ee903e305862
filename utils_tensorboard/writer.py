"""A wrapper of `SummaryWriter` that never raises."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils_alg1.base.errors import Guard, guarded
from utils_alg1.base.files import write_atomically

PROJECTOR_FOLDER = "projector"  # beside the event files


class TensorBoardWriter:
    """Writes TensorBoard event files.

    The first failure (TensorBoard not installed, disk full, anything that it raises) is one warning; after
    it, `enabled` is False and every call does nothing.

    Args:
        log_dir: folder of the event files.
        purge_step: for a resumed run, hide the points of this step and later ones.
        warn: called once, on failure.
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
        if purge_step is not None:
            self._purge_embeddings(purge_step)

    @staticmethod
    def _open(log_dir: Path, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # Event files are read in the order of their names, which start with the time in whole seconds: an
        # older file of this second could sort after ours, and its points would not be purged.
        log_dir.mkdir(parents=True, exist_ok=True)
        # Some readers ignore the purge of a folder that has not been purged before.
        if not any(log_dir.glob("events.out.tfevents.*")):
            purge_step = 0
        while any(log_dir.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.02)
        return SummaryWriter(str(log_dir), purge_step=purge_step)

    @property
    def enabled(self) -> bool:
        """Whether points are still being written."""
        return self._guard.enabled and self._writer is not None

    @guarded
    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write one point of a curve."""
        self._writer.add_scalar(tag, value, step)

    @guarded
    def add_histogram(self, tag: str, counts: Any, edges: Any, step: int) -> None:
        """Write a histogram of n counts between n + 1 edges."""
        import numpy as np

        centers = (edges[:-1] + edges[1:]) / 2
        self._writer.add_histogram_raw(
            tag,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(counts.sum()),
            sum=float(np.dot(counts, centers)),
            sum_squares=float(np.dot(counts, centers**2)),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    @guarded
    def add_image(self, tag: str, pixels: Any, step: int) -> None:
        """Write an image: (H, W) or (H, W, 3) uint8."""
        self._writer.add_image(tag, pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

    @guarded
    def add_text(self, tag: str, text: str, step: int) -> None:
        """Write a text, shown with every line and space of it."""
        # TensorBoard renders Markdown, where indented lines are code and stay as they are.
        self._writer.add_text(tag, "    " + text.replace("\n", "\n    "), step)

    @guarded
    def add_hparams(self, name: str, values: Mapping[str, Any]) -> None:
        """Write the run's hyperparameters: str, int, float and bool by name; None is left out.

        `name` is that of the run's row. TensorBoard keeps only the first call's values in a folder.
        """
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # "api" beside it needs TensorFlow

        # SummaryWriter.add_hparams would create a run of its own, and refuses None. This summary has no
        # step, so no purge hides it.
        known = {key: value for key, value in values.items() if value is not None}
        self._writer.file_writer.add_summary(hparams_pb(known, trial_id=name))

    # SummaryWriter.add_embedding does not know, in a resumed run, which embeddings were written before. Here
    # the projector's list is rebuilt from the files in the folder.

    @guarded
    def add_embedding(self, tag: str, vectors: Any, labels: list[str], step: int) -> None:
        """Write (V, C) vectors for the projector, with V labels without newlines or tabs."""
        folder = self._log_dir / PROJECTOR_FOLDER / tag
        folder.mkdir(parents=True, exist_ok=True)
        rows = ("\t".join(f"{value:.7g}" for value in row) for row in vectors.tolist())
        write_atomically(folder / "labels.tsv", "".join(f"{label}\n" for label in labels).encode())
        write_atomically(folder / f"step_{step:09d}.tsv", "".join(f"{row}\n" for row in rows).encode())
        self._list_embeddings()

    @guarded
    def _purge_embeddings(self, purge_step: int) -> None:
        for path in self._embedding_files():
            if _step_of(path) >= purge_step:
                path.unlink()
        if (self._log_dir / PROJECTOR_FOLDER).exists():
            self._list_embeddings()

    def _embedding_files(self) -> list[Path]:
        return sorted((self._log_dir / PROJECTOR_FOLDER).rglob("step_*.tsv"))

    def _list_embeddings(self) -> None:
        from google.protobuf import text_format
        from tensorboard.plugins import projector
        from tensorboard.plugins.projector.metadata import PROJECTOR_FILENAME

        files = self._embedding_files()
        newest = {path.parent: path for path in files}
        config = projector.ProjectorConfig()
        for path in files:
            # The projector sorts the names and opens the first, so the newest gets one before "step".
            last = path == newest[path.parent]
            tag = path.parent.relative_to(self._log_dir / PROJECTOR_FOLDER).as_posix()
            entry = config.embeddings.add()
            entry.tensor_name = f"{tag}:{f'newest_step_{_step_of(path)}' if last else path.stem}"
            entry.tensor_path = path.relative_to(self._log_dir).as_posix()
            entry.metadata_path = (path.parent / "labels.tsv").relative_to(self._log_dir).as_posix()
        text = text_format.MessageToString(config)
        write_atomically(self._log_dir / PROJECTOR_FILENAME, text.encode())

    @guarded
    def flush(self) -> None:
        """Flush the event file, so that readers see every point so far."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close; later calls do nothing."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._guard.attempt(writer.close)


def _step_of(path: Path) -> int:
    """Return the step of an embedding's file."""
    return int(path.stem.removeprefix("step_"))
