"""The guard of what training can do without: trackers, and looking at the model."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

from utils_alg1.base.errors import describe
from utils_alg1.base.threads import lacks_threads, thread_limit

P = ParamSpec("P")


class Guard:
    """Catches what optional code raises: the first exception is one warning, and later calls do nothing.

    Args:
        name: of the optional part, which begins the warning: "Aim is switched off, training continues: ...".
        warn: called with the warning.
        explain: returns what the warning says of an exception.

    Attributes:
        enabled: whether nothing has failed so far.
    """

    def __init__(
        self, name: str, warn: Callable[[str], None], explain: Callable[[BaseException], str] = describe
    ):
        self.name = name
        self.enabled = True
        self._warn, self._explain = warn, explain
        self._lock = threading.Lock()

    def attempt(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a function and return its result; None if it fails or the guard is disabled."""
        if not self.enabled:
            return None
        try:
            return function(*args, **kwargs)
        except (Exception, SystemExit) as error:  # third-party trackers raise anything
            self.fail(thread_limit() if lacks_threads(error) else self._explain(error))
            return None

    def fail(self, reason: str) -> None:
        """Disable, with a warning that names the reason."""
        self.disable(f"{self.name} is switched off, training continues: {reason}")

    def disable(self, warning: str) -> None:
        """Disable, with this warning; a guard that is already disabled does not warn again."""
        with self._lock:  # several threads may find the same failure
            was_enabled, self.enabled = self.enabled, False
        if was_enabled:
            self._warn(warning)


def guarded(method: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
    """Decorate a method of a class with `enabled` and a `Guard` named `_guard`: it never raises.

    While `enabled` is False, the method does nothing.
    """

    @functools.wraps(method)
    def guarded_method(self: Any, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.enabled:
            self._guard.attempt(method, self, *args, **kwargs)

    return guarded_method
