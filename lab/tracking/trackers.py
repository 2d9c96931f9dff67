"""The adapter between a run and its trackers: every call is made on a thread, under a timeout."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from lab.core import record as records
from lab.core.config import bind

log = logging.getLogger(__name__)
_ABANDON_S = 5.0


class Tracker:
    """Shows one run somewhere; its methods may raise and take as long as they like.

    Attributes:
        timeout_s: seconds that one call, and the end of a run, may take before the run goes on
            without this tracker.
        location: a line that says where the run can be seen, known after `publish`.
    """

    timeout_s: float
    location = ""

    def start(self, config: dict[str, Any], folder: Path) -> None:
        """Open the view of the run in ``folder``; ``config`` is the resolved one."""

    def log(self, prefix: str, step: int, values: dict[str, float]) -> None:
        """Show live points of one curve family, e.g. ``immunize/CASE/seed0``."""

    def publish(self, record: records.Record, report: Path) -> None:
        """Show the finished record and close the view."""

    def abandon(self) -> None:
        """End what would keep the process waiting at its exit, after a call that hangs."""


class _TrackerThread:
    """Makes the calls of one tracker, one after another, on a daemon thread."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.began = math.inf  # of the call at work
        self.ended = threading.Event()
        _start_thread(self._work)

    def _work(self) -> None:
        while not self.ended.is_set():
            call = self.calls.get()
            self.began = time.monotonic()
            try:
                call()
            except Exception as error:  # its message may hold what a server was sent
                self.drop(f"failed ({type(error).__name__})")
            self.began = math.inf

    def submit(self, method: Callable[..., None], *arguments: Any) -> None:
        if time.monotonic() - self.began > self.tracker.timeout_s:
            self.drop()
        if not self.ended.is_set():
            self.calls.put(partial(method, *arguments))

    def drop(self, reason: str = "") -> None:
        """Go on without the tracker; warn once."""
        if self.ended.is_set():
            return
        late = f"took longer than tracker.{self.name}.timeout_s={self.tracker.timeout_s:g}"
        rest = "the run goes on without it, its record is complete"
        log.warning("tracker %s %s; %s", self.name, reason or late, rest)
        _start_thread(self._abandon).join(_ABANDON_S)
        self.ended.set()

    def _abandon(self) -> None:
        with suppress(Exception):
            self.tracker.abandon()


def _start_thread(function: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


class Trackers:
    """All trackers of one run. Methods never raise and never wait, but for ``finish`` (bounded).

    Raises:
        UserError: an option that a tracker cannot work with; before any of them starts.
    """

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        config: Any = OmegaConf.to_container(cfg, resolve=True)
        trackers: dict[str, Tracker] = {
            name: bind(get_class(node.pop("_target_")), node, f"tracker.{name}")
            for name, node in config.pop("tracker").items()
        }
        self._threads = [_TrackerThread(name, tracker) for name, tracker in trackers.items()]
        for thread in self._threads:
            thread.submit(thread.tracker.start, config, folder)

    def log(self, prefix: str, step: int, values: dict[str, float]) -> None:
        """Show live points of one curve family, e.g. ``immunize/CASE/seed0``."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        for thread in self._threads:
            thread.submit(thread.tracker.log, prefix, step, finite)

    def finish(self, record: Path, report: Path) -> list[str]:
        """Hand over the record and wait, at most each tracker's ``timeout_s``.

        Returns:
            where the run can be seen, a line for each tracker that says so.
        """
        began, content = time.monotonic(), records.read(record)
        for thread in self._threads:
            thread.submit(thread.tracker.publish, content, report)
            thread.submit(thread.ended.set)
        for thread in self._threads:
            left = began + thread.tracker.timeout_s - time.monotonic()
            if not thread.ended.wait(max(left, 0)):
                thread.drop()
        return [t.tracker.location for t in self._threads if t.tracker.location]
