"""Tracks a run in Aim: each kind of data under the name and context that Aim's pages group by."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils_alg1.base.errors import HINTS, describe
from utils_alg1.base.guard import Guard, guarded
from utils_alg1.base.summaries import Kind, Tracker

LOCK_TIMEOUT = 10.0  # seconds
LOCK_POLL = 0.2  # seconds
NO_LOCKS = os.strerror(errno.ENOLCK)
# What RocksDB, SQLite and Aim say of a lock that another process holds.
HELD = f"lock hold by|lock file(?!.*{NO_LOCKS})|database is locked|Cannot acquire lock"
REPAIR = "move it away: the next --resume sends the run to a new one"
# What a failure means, by what RocksDB, SQLite, Aim and the system say: the first pattern found counts.
# Damage comes first, because its message may quote any other.
MEANINGS = (
    (
        "Corruption: |malformed|not a database"
        "|codec can't decode|invalid literal"  # the number of its version
        "|File exists|Not a directory",  # a file is where a folder should be
        f"{{folder}} is damaged ({{text}}); {REPAIR}",
    ),
    # Aim hides why.
    ("upgrade failed", f"{{folder}} cannot be opened ({{text}}); if the disk is not full, {REPAIR}"),
    ("codec can't encode", "the path of {folder} is not UTF-8, which Aim needs; start in another folder"),
    (HELD, "another program holds {folder} ({text}); end it"),
    (NO_LOCKS, "{folder} is on a file system without locks; start in a folder of another one"),
    *(
        (pattern, f"cannot use {{folder}} ({{text}}); {hint}")
        for pattern, hint in (
            ("disk is full", HINTS[errno.ENOSPC]),
            ("readonly database", HINTS[errno.EACCES]),
            (f"{os.strerror(errno.EIO)}|disk I/O error", "check the disk"),
            *((os.strerror(number), hint) for number, hint in HINTS.items()),
        )
    ),
)

Context = dict[str, str] | None  # tells curves of one name apart, such as {"subset": "train"}

# Name and context in Aim. A scalar that is not listed keeps its own name and has no context.
NAMES: dict[str, tuple[str, Context]] = {
    "loss/train_step": ("loss", {"subset": "train_step"}),
    "loss/train": ("loss", {"subset": "train"}),
    "loss/val": ("loss", {"subset": "val"}),
}
PARAMETERS = (
    "best_val_loss",
)  # scalars that are no curve in Aim: their last values are parameters of the run
EXPERIMENT = "alg1"  # of runs without a tag


class AimTracker(Tracker):
    """Tracks one run in the Aim repository of a folder (its subfolder `.aim`).

    The first failure (Aim not installed, disk full, anything that Aim raises) is one warning; after it,
    `enabled` is False and every call does nothing.

    Args:
        run_name: shown in Aim's lists.
        run_dir: kept in the run's metadata.
        repo: folder that holds `.aim`, where `aim up` is started.
        run_hash: continue this run; if the repository no longer has it, a new run is started.
        tag: a new run's tag and experiment in Aim; one without is of EXPERIMENT.
    """

    def __init__(
        self,
        run_name: str,
        run_dir: str | Path,
        repo: str | Path = ".",
        run_hash: str | None = None,
        warn: Callable[[str], None] = warnings.warn,
        tag: str = "",
    ):
        self._run: Any = None
        self._folder = Path(repo).absolute() / ".aim"
        self._guard = Guard("Aim", warn, self._explain)
        self._run = self._guard.attempt(_open_run, self._folder.parent, run_hash, run_name, tag)
        self.track_metadata("run_dir", str(run_dir))

    def _explain(self, error: BaseException) -> str:
        """Return what a failure of Aim means, and what to do about it; see MEANINGS."""
        first, *_ = error.args or [""]  # RocksDB's errors hold bytes
        text = first.decode(errors="replace") if isinstance(first, bytes) else describe(error)
        text = text.replace(f"{self._folder}/", "")
        meanings = (meaning for pattern, meaning in MEANINGS if re.search(pattern, text))
        return next(meanings, "{text}").format(folder=self._folder, text=text)

    @property
    def enabled(self) -> bool:
        """Whether points are still being tracked."""
        return self._guard.enabled and self._run is not None

    @property
    def run_hash(self) -> str | None:  # type: ignore[override]
        """The run's hash in Aim, to continue it by."""
        return self._run.hash if self._run is not None else None

    @guarded  # also for what is computed here: pixels and pictures
    def log(self, kind: Kind, payload: Any, step: int) -> None:
        match kind:
            case "scalars":
                for key, value in payload.items():
                    name, context = NAMES.get(key, (key, None))
                    if key in PARAMETERS:
                        self.track_metadata(key, value)
                    else:
                        self.track_metric(name, value, step, context)
            case "histograms":
                for h in payload:
                    self.track_distribution(h.name, (h.counts, h.edges), step, {"kind": h.kind})
            case "images":
                for image in payload:
                    self.track_image(image.name, image.pixels(), step)
            case "texts":
                for name, text in payload.items():
                    self.track_text(name, text, step)
            case "embedding":
                from utils_aim.pictures import draw_embedding

                self.track_image(payload.name, draw_embedding(payload), step)

    def track_config(self, config: dict[str, Any]) -> None:
        """Keep all parameters, as `run["hparams"]`."""
        self.track_metadata("hparams", config)

    @guarded
    def track_metadata(self, key: str, value: Any) -> None:
        """Keep one value: text, a number, or lists and dictionaries of them."""
        self._run[key] = _utf8(value)

    @guarded
    def track_metric(self, name: str, value: float, step: int, context: Context = None) -> None:
        """Track one point of a curve; it replaces a point of the same step and context."""
        self._run.track(value, name=name, step=step, context=context)

    @guarded
    def track_distribution(self, name: str, values: Any, step: int, context: Context = None) -> None:
        """Track a distribution.

        `values` are numbers of any shape (those not finite are left out), or `(counts, edges)` of a
        histogram with evenly spaced edges.
        """
        import aim
        import numpy as np

        if isinstance(values, tuple):
            counts, edges = values
            distribution = aim.Distribution(hist=counts, bin_range=(float(edges[0]), float(edges[-1])))
        else:
            samples = np.asarray(values, dtype=np.float64)
            samples = samples[np.isfinite(samples)]
            if not samples.size:
                return
            distribution = aim.Distribution(samples)
        self._run.track(distribution, name=name, step=step, context=context)

    @guarded
    def track_image(self, name: str, pixels: Any, step: int, context: Context = None) -> None:
        """Track an image: (H, W) or (H, W, 3) uint8."""
        import aim
        from PIL import Image

        self._run.track(aim.Image(Image.fromarray(pixels)), name=name, step=step, context=context)

    @guarded
    def track_text(self, name: str, text: str, step: int, context: Context = None) -> None:
        """Track a text."""
        import aim

        self._run.track(aim.Text(text), name=name, step=step, context=context)

    def close(self) -> None:
        """Close the run; later calls do nothing. (There is nothing to flush: Aim writes at once.)"""
        run, self._run = self._run, None
        if run is not None and self._guard.enabled:
            self._guard.attempt(run.close)
            with contextlib.suppress(Exception):  # otherwise `aim up` does it later
                from aim.sdk.index_manager import RepoIndexManager

                # Aim's queries read an index, so that only now they find the run.
                RepoIndexManager.get_index_manager(run.repo).index(run.hash)
                run.repo.container_pool.clear()  # releases the index's lock
        if run is not None and not self._guard.enabled:
            with contextlib.suppress(Exception, SystemExit):  # the failure was reported already
                run.close()  # try again, to release Aim's locks
        # All is closed: Aim must not clean up at exit. After a full disk its hook can hang forever, and from
        # Python 3.12 on it fails to start a thread. (To import Aim now could fail or hang.)
        if cleanup := sys.modules.get("aim.ext.cleanup"):
            atexit.unregister(cleanup.AutoClean.cleanup)


def _utf8(value: Any) -> Any:
    """Return a value with the bytes of paths that are not UTF-8 escaped: Aim encodes all texts."""
    if isinstance(value, dict):
        return {key: _utf8(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_utf8, value)]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _open_run(repo: Path, run_hash: str | None, run_name: str, tag: str) -> Any:
    """Open a run in Aim and name it. Waits while another process holds Aim's lock to open its own."""
    import aim
    from aim.sdk.errors import MissingRunError

    end = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            aim.Repo.from_path(str(repo), init=True)
            # System tracking takes a thread and disk space; terminal capture replaces sys.stdout.
            run = aim.Run(
                run_hash,
                repo=str(repo),
                system_tracking_interval=None,
                capture_terminal_logs=False,
                log_system_params=False,
            )
            run.name = _utf8(run_name)
            if run_hash is None:  # what the user has changed since is kept
                run.experiment = tag or EXPERIMENT
                if tag:
                    run.add_tag(tag)
            return run
        except MissingRunError:  # it was deleted: start a new run
            run_hash = None
        except Exception as error:
            if not re.search(HELD, str(error)) or time.monotonic() > end:
                raise
            time.sleep(LOCK_POLL)
