"""Waits for conditions with a bound; nothing in the suites sleeps and hopes."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# How often a condition is looked at. Short against everything measured here (heartbeats of 200 ms).
_INTERVAL_SECONDS = 0.02


def wait_for(what: str, condition: Callable[[], T | None], timeout_seconds: float = 30.0) -> T:
    """Returns the first value of `condition` that is neither None nor False.

    Raises: AssertionError naming `what` after `timeout_seconds`.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        value = condition()
        if value is not None and value is not False:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_seconds:g} s for {what}")
        time.sleep(_INTERVAL_SECONDS)


def hold(seconds: float) -> None:
    """Lets real time pass where the passing of time is what is tested (a freeze, an absence)."""
    time.sleep(seconds)
