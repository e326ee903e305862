"""One Aim run, wrapped so that no failure of Aim's reaches training."""

from __future__ import annotations

import atexit
import contextlib
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils_alg1.base.errors import Guard

LOCK_PATIENCE = 10.0  # seconds
LOCK_POLL = 0.2  # seconds


class AimTracker:
    """Tracks one run in the Aim repository of a folder (`.aim` in it).

    Any failure (Aim not installed, its disk full, anything that it raises) is one warning; after it,
    `enabled` is False and every call does nothing.

    Args:
        run_name: shown in Aim's lists.
        run_dir: the run's directory, kept among the run's metadata.
        repo: folder that holds `.aim`; where `aim up` is typed.
        run_hash: continue this run; a new one is begun when the repository no longer has it.
        warn: told once, on failure.
    """

    def __init__(
        self,
        run_name: str,
        run_dir: str | Path,
        repo: str | Path = ".",
        run_hash: str | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ):
        self._guard = Guard("Aim", warn)
        self._run = self._guard.attempt(self._open, Path(repo).absolute(), run_hash)
        if self._run is not None:
            self._guard.attempt(setattr, self._run, "name", run_name)
        self.track_metadata("run_dir", str(run_dir))

    def _open(self, repo: Path, run_hash: str | None) -> Any:
        """Open the run; another one that opens its own at this moment is waited for."""
        end = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                return self._open_at_once(repo, run_hash)
            except Exception as error:  # of RocksDB's, which has no public type
                if "lock file" not in str(error) or time.monotonic() > end:
                    raise
            time.sleep(LOCK_POLL)

    @staticmethod
    def _open_at_once(repo: Path, run_hash: str | None) -> Any:
        import aim
        from aim.sdk.errors import MissingRunError

        # System tracking and terminal capture are off: the first takes a thread and disk for figures that
        # nobody asked for, the second replaces sys.stdout.
        options: dict[str, Any] = {
            "repo": str(repo),
            "system_tracking_interval": None,
            "capture_terminal_logs": False,
            "log_system_params": False,
        }
        aim.Repo.from_path(str(repo), init=True)
        if run_hash is not None:
            try:
                return aim.Run(run_hash, **options)
            except MissingRunError:
                pass  # its repository was cleaned: begin a new run
        return aim.Run(**options)

    @property
    def enabled(self) -> bool:
        """Whether points are still being tracked."""
        return self._guard.enabled and self._run is not None

    @property
    def run_hash(self) -> str | None:
        """Aim's name for the run, to continue it by."""
        return self._run.hash if self._run is not None else None

    def track_config(self, config: dict[str, Any]) -> None:
        """Keep all parameters, as `run["hparams"]`."""
        self.track_metadata("hparams", config)

    def track_metadata(self, key: str, value: Any) -> None:
        """Keep one value: text, a number, or lists and dictionaries of them."""
        if self.enabled:
            self._guard.attempt(self._run.__setitem__, key, value)

    def track_metric(self, name: str, value: float, step: int, context: dict[str, str] | None = None) -> None:
        """Track one point of a curve; a point of the same step and context is replaced."""
        if self.enabled:
            self._guard.attempt(self._run.track, value, name=name, step=step, context=context)

    def track_distribution(
        self, name: str, values: Any, step: int, context: dict[str, str] | None = None
    ) -> None:
        """Track a distribution.

        `values` are numbers of any shape (those not finite are left out), or `(counts, edges)` of a
        histogram that is already counted, with evenly spaced edges.
        """
        if self.enabled:
            self._guard.attempt(self._track_distribution, name, values, step, context)

    def _track_distribution(self, name: str, values: Any, step: int, context: dict[str, str] | None) -> None:
        import aim
        import numpy as np

        if isinstance(values, tuple):
            counts, edges = values
            bin_range = (float(edges[0]), float(edges[-1]))
            distribution = aim.Distribution(hist=counts, bin_range=bin_range)
        else:
            samples = np.asarray(values, dtype=np.float64).ravel()
            samples = samples[np.isfinite(samples)]
            if not samples.size:
                return
            distribution = aim.Distribution(samples)
        self._run.track(distribution, name=name, step=step, context=context)

    def track_image(self, name: str, pixels: Any, step: int, context: dict[str, str] | None = None) -> None:
        """Track a picture: (H, W) or (H, W, 3) uint8."""
        if self.enabled:
            self._guard.attempt(self._track_image, name, pixels, step, context)

    def _track_image(self, name: str, pixels: Any, step: int, context: dict[str, str] | None) -> None:
        import aim
        from PIL import Image

        self._run.track(aim.Image(Image.fromarray(pixels)), name=name, step=step, context=context)

    def track_text(self, name: str, text: str, step: int, context: dict[str, str] | None = None) -> None:
        """Track a text."""
        if self.enabled:
            self._guard.attempt(self._track_text, name, text, step, context)

    def _track_text(self, name: str, text: str, step: int, context: dict[str, str] | None) -> None:
        import aim

        self._run.track(aim.Text(text), name=name, step=step, context=context)

    def close(self) -> None:
        """End the run; what is tracked after that is dropped."""
        run, self._run = self._run, None
        if run is not None and self._guard.enabled:
            self._guard.attempt(run.close)
            with contextlib.suppress(Exception):  # `aim up` does it otherwise
                _index(run)
        _forget_exit_hook()
        if run is not None and not self._guard.enabled:
            with contextlib.suppress(Exception, SystemExit):  # a failure was reported already
                run.close()  # once more, so that Aim lets go of its locks


def _index(run: Any) -> None:
    """Let Aim's queries see a finished run at once: they read an index that `aim up` brings up to date."""
    from aim.sdk.index_manager import RepoIndexManager

    RepoIndexManager.get_index_manager(run.repo).index(run.hash)
    run.repo.container_pool.clear()  # lets go of the index's lock


def _forget_exit_hook() -> None:
    """Keep Aim from cleaning up at exit: all is closed by then, and the hook is a danger of its own.

    After a full disk it can hang for ever, and from Python 3.12 on it fails for want of a thread.
    """
    cleanup = sys.modules.get("aim.ext.cleanup")  # to import it now could fail as well, or hang
    if cleanup is not None:
        atexit.unregister(cleanup.AutoClean.cleanup)
