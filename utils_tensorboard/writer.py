"""The event files of TensorBoard in a folder, and the list of embeddings for its projector."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils_alg1.base.files import write_atomically
from utils_alg1.base.guard import Guard, guarded
from utils_alg1.base.pictures import LABEL_SIDE, draw_labels, to_png
from utils_tensorboard.event_file import has_events, open_events

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PROJECTOR_FOLDER = "projector"  # beside the event files
MAX_LABELS = 1024  # drawn in place of points; of more, only the one under the pointer is shown

Results = Mapping[str, str]  # heading -> tag


class TensorBoardWriter:
    """Opens a `SummaryWriter`, closes it, and never raises.

    The first failure (TensorBoard not installed, disk full, anything that it raises) is one warning; after
    it, `enabled` is False and every call does nothing. For a resumed run, the points of `purge_step` and
    later ones are hidden. The folder is created, unless it `must_exist`.
    """

    def __init__(
        self,
        log_dir: str | Path,
        purge_step: int | None = None,
        warn: Callable[[str], None] = warnings.warn,
        must_exist: bool = False,
    ):
        self._guard = Guard("TensorBoard", warn)
        self._writer: Any = self._guard.attempt(_open, Path(log_dir), purge_step, must_exist)

    @property
    def enabled(self) -> bool:
        """Whether points are still being written."""
        return self._guard.enabled and self._writer is not None

    @guarded
    def attempt(self, write: Callable[..., None], *args: Any) -> None:
        """Call `write(summary_writer, *args)`, such as `attempt(SummaryWriter.add_scalar, "a", 1.0, 0)`."""
        write(self._writer, *args)

    @guarded
    def add_hparams(
        self, name: str, values: Mapping[str, Any], main: Collection[str] = (), results: Results | None = None
    ) -> None:
        """Write the run's hyperparameters: str, int, float and bool by name; None is left out.

        TensorBoard keeps only the first call's values in a folder.

        Args:
            name: that of the run's row.
            main: the names of the columns to show first, of which TensorBoard shows five.
            results: heading and tag of the curves whose last values are shown; None shows those of all.
        """
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # "api" beside it needs TensorFlow

        # SummaryWriter.add_hparams would create a run of its own, and refuses None. This summary has no
        # step, so no purge hides it.
        known = {key: value for key, value in values.items() if value is not None}
        summaries = [hparams_pb(known, trial_id=name)]
        if results is not None:
            summaries.append(_table_layout(known, main, results))
        for summary in summaries:
            self._writer.file_writer.add_summary(summary)

    @guarded
    def flush(self) -> None:
        """Flush the event file, so that readers see every point so far."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close; later calls do nothing."""
        if self._writer is not None:
            self._guard.attempt(self._writer.close)
        self._writer = None


def _open(log_dir: Path, purge_step: int | None, must_exist: bool) -> SummaryWriter:
    if not must_exist:
        log_dir.mkdir(parents=True, exist_ok=True)
    require_folder(log_dir)
    if purge_step is not None and (log_dir / PROJECTOR_FOLDER).exists():
        for path, step in _embedding_steps(log_dir).items():
            if step >= purge_step:
                path.unlink()
        _list_embeddings(log_dir)
    # Some readers ignore the purge of a folder that has not been purged before.
    if not has_events(log_dir):
        purge_step = 0
    return open_events(log_dir, purge_step)


def _table_layout(values: Mapping[str, Any], main: Collection[str], results: Results) -> Any:
    """Return the summary that tells the columns of the page HParams; see `TensorBoardWriter.add_hparams`."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.api_pb2 import Experiment, HParamInfo, MetricInfo, MetricName
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    experiment = Experiment(
        # Those that "differ" come first.
        hparam_infos=[HParamInfo(name=name, differs=name in main) for name in values],
        metric_infos=[
            MetricInfo(name=MetricName(tag=tag), display_name=heading) for heading, tag in results.items()
        ],
    )
    about = metadata.create_summary_metadata(HParamsPluginData(experiment=experiment))
    value = Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=about, tensor=metadata.NULL_TENSOR)
    return Summary(value=[value])


def require_folder(folder: Path) -> None:
    """Raise FileNotFoundError for a folder that was deleted: what is created in it would make it anew."""
    folder.stat()


def write_embedding(log_dir: Path, tag: str, vectors: Any, labels: list[str], step: int) -> None:
    """Write (V, C) vectors for the projector, with V labels without newlines or tabs."""
    folder = log_dir / PROJECTOR_FOLDER / tag
    require_folder(log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = ("\t".join(f"{value:.7g}" for value in row) for row in vectors.tolist())
    for name, lines in (("labels", labels), (f"step_{step:09d}", rows)):
        write_atomically(folder / f"{name}.tsv", "".join(f"{line}\n" for line in lines).encode())
    if len(labels) <= MAX_LABELS:
        write_atomically(folder / "labels.png", to_png(draw_labels(labels)))
    _list_embeddings(log_dir)


def _embedding_steps(log_dir: Path) -> dict[Path, int]:
    """Return the files of embeddings in a folder, in order, with the step of each."""
    return {path: int(path.stem.removeprefix("step_")) for path in sorted(log_dir.rglob("step_*.tsv"))}


def _list_embeddings(log_dir: Path) -> None:
    """Write the projector's list of the embeddings in a folder.

    (SummaryWriter.add_embedding does not know, in a resumed run, which were written before.)
    """
    from google.protobuf import text_format
    from tensorboard.plugins import projector
    from tensorboard.plugins.projector.metadata import PROJECTOR_FILENAME

    steps = _embedding_steps(log_dir)
    newest = {path.parent: path for path in steps}
    config = projector.ProjectorConfig()
    for path, step in steps.items():
        # The projector sorts the names and opens the first, so the newest gets one before "step".
        name = f"newest_step_{step}" if path == newest[path.parent] else path.stem
        folder = path.parent.relative_to(log_dir)
        entry = config.embeddings.add(
            tensor_name=f"{folder.relative_to(PROJECTOR_FOLDER).as_posix()}:{name}",
            tensor_path=(folder / path.name).as_posix(),
            metadata_path=(folder / "labels.tsv").as_posix(),
        )
        if (path.parent / "labels.png").exists():
            entry.sprite.image_path = (folder / "labels.png").as_posix()
            entry.sprite.single_image_dim.extend([LABEL_SIDE, LABEL_SIDE])
    write_atomically(log_dir / PROJECTOR_FILENAME, text_format.MessageToString(config).encode())
