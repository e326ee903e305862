"""Flushes and closes the background trackers of a run together, and decides how long they are waited for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable

from utils_alg1.tracking import tracker_process
from utils_alg1.tracking.background import BackgroundTracker

LOGGER = logging.getLogger("alg1")
NOTICE_AFTER = 3.0  # seconds of waiting for trackers to close after which the user is told
LOOK_EVERY = 1.0  # seconds between two looks at what the trackers have left
NOTICE_EVERY = 30.0  # seconds after which the user is told again how much is left


def _wait_for_all(events: Iterable[threading.Event], seconds: float) -> None:
    """Wait for all events together."""
    end = time.monotonic() + seconds
    for event in events:
        event.wait(max(0.0, end - time.monotonic()))


def flush_all(trackers: Iterable[BackgroundTracker], step: int) -> None:
    """Flush what was logged before `step`, and wait for it FLUSH_TIMEOUT seconds.

    A tracker whose last flush is not done, that is not open yet, or that is behind, is not waited for.
    """
    ready = [tracker for tracker in trackers if tracker.ready.is_set() and not tracker.left]
    for tracker in ready:
        tracker.start_flush(step)
    _wait_for_all([tracker.ready for tracker in ready], tracker_process.FLUSH_TIMEOUT)


def close_all(trackers: Iterable[BackgroundTracker], patient: bool = False) -> None:
    """Close all trackers; end those that are not closed in time (see `_deadline`), or on a signal."""
    trackers = list(trackers)
    reason = f"it did not close within {tracker_process.TIMEOUT:.0f} seconds"
    try:
        _wait_until_closed(trackers, patient)
    except (KeyboardInterrupt, SystemExit):  # the run is saved already, so there is nothing else to stop
        reason = "it was not waited for"
    for tracker in trackers:
        if not tracker.ended.is_set():
            tracker.give_up(reason)


def _wait_until_closed(trackers: list[BackgroundTracker], patient: bool) -> None:
    """Request the end of all trackers, and wait until each has ended or its deadline is over."""
    start = time.monotonic()  # requests to a full queue take time too
    notice_time = start + NOTICE_AFTER
    for tracker in trackers:
        tracker.start_close()
    _wait_for_all([tracker.ended for tracker in trackers], min(NOTICE_AFTER, tracker_process.TIMEOUT))
    while waiting := [
        tracker
        for tracker in trackers
        if not tracker.ended.is_set() and time.monotonic() < _deadline(tracker, start, patient)
    ]:
        if time.monotonic() >= notice_time:
            LOGGER.info("%s", _notice(waiting))
            notice_time += NOTICE_EVERY
        _wait_for_all([tracker.ended for tracker in waiting], min(LOOK_EVERY, tracker_process.TIMEOUT))


def _deadline(tracker: BackgroundTracker, start: float, patient: bool) -> float:
    """Return until when to wait for a tracker whose end was requested at `start`: TIMEOUT seconds.

    The `patient` give it TIMEOUT seconds for each of its answers. The others do not wait for one that has
    rows left, because a resume gives it the rest.
    """
    if patient:
        return max(start, tracker.answer_time) + tracker_process.TIMEOUT
    return start if tracker.left else start + tracker_process.TIMEOUT


def _notice(trackers: list[BackgroundTracker]) -> str:
    """Return what to say while these trackers are waited for."""
    names = " and ".join(tracker.name for tracker in trackers)
    left = max(tracker.left for tracker in trackers)
    limit = f"{left:.0%} of the steps" if left else f"at most {tracker_process.TIMEOUT:.0f} seconds"
    return f"waiting for {names} to take the rest, {limit} (Ctrl-C: do not wait)"
