"""The adapter between a run and its trackers: every call is made on a thread, under a timeout."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from lab.core import record as records
from lab.core.config import user_error

log = logging.getLogger(__name__)
_ABANDON_S = 5.0


class Tracker:
    """Shows one run somewhere; its methods may raise and take as long as they like.

    Attributes:
        timeout_s: seconds that one call, and the end of a run, may take before the run goes on
            without this tracker.
    """

    timeout_s: float

    def start(self, config: dict[str, Any], folder: Path) -> None:
        """Open the view of the run in ``folder``."""
        raise NotImplementedError

    def log(self, prefix: str, step: int, values: dict[str, float]) -> None:
        """Show live points of one curve family, e.g. ``immunize/CASE/seed0``."""
        raise NotImplementedError

    def publish(self, record: records.Record, report: Path) -> None:
        """Show the finished record and close the view."""
        raise NotImplementedError

    def abandon(self) -> None:
        """End what would keep the process waiting at its exit, after a call that hangs."""


class _TrackerThread:
    """Makes the calls of one tracker, one after another, on a daemon thread."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.began = math.inf  # of the call at work
        self.ended = threading.Event()
        threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True).start()

    def _work(self) -> None:
        while not self.ended.is_set():
            call = self.calls.get()
            self.began = time.monotonic()
            try:
                call()
            except Exception as error:  # its message may hold what a server was sent
                self.drop(f"failed ({type(error).__name__})")
            self.began = math.inf

    def submit(self, call: Callable[[], None]) -> None:
        if time.monotonic() - self.began > self.tracker.timeout_s:
            self.drop_hanging()
        self.calls.put(call)

    def drop_hanging(self) -> None:
        limit = f"tracker.{self.name}.timeout_s={self.tracker.timeout_s:g}"
        self.drop(f"took longer than {limit}")

    def drop(self, reason: str) -> None:
        """Go on without the tracker; warn once."""
        if self.ended.is_set():
            return
        log.warning(
            "tracker %s %s; the run goes on without it, its record is complete", self.name, reason
        )
        ending = threading.Thread(target=self._abandon, daemon=True)
        ending.start()
        ending.join(_ABANDON_S)
        self.ended.set()

    def _abandon(self) -> None:
        with suppress(Exception):
            self.tracker.abandon()


class Trackers:
    """All trackers of one run. Methods never raise and never wait, but for ``finish`` (bounded).

    Raises:
        UserError: an option that a tracker cannot work with; before any of them starts.
    """

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
        config = {key: value for key, value in plain.items() if key != "tracker"}
        trackers = {str(name): _build(str(name), cfg.tracker[name]) for name in cfg.tracker or {}}
        self._threads = [_TrackerThread(name, tracker) for name, tracker in trackers.items()]
        for thread in self._threads:
            thread.submit(lambda tracker=thread.tracker: tracker.start(config, folder))

    def log(self, prefix: str, step: int, values: dict[str, float]) -> None:
        """Show live points of one curve family, e.g. ``immunize/CASE/seed0``."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        for thread in self._threads:
            thread.submit(lambda tracker=thread.tracker: tracker.log(prefix, step, finite))

    def finish(self, record: Path, report: Path) -> None:
        """Hand over the record and wait, at most each tracker's ``timeout_s``."""
        deadlines = {
            thread: time.monotonic() + thread.tracker.timeout_s for thread in self._threads
        }
        for thread in self._threads:
            thread.submit(lambda t=thread.tracker: t.publish(records.read(record), report))
            thread.submit(thread.ended.set)
        for thread, deadline in deadlines.items():
            if not thread.ended.wait(max(deadline - time.monotonic(), 0)):
                thread.drop_hanging()
        self._threads = []


def _build(name: str, config: DictConfig) -> Tracker:
    try:
        tracker: Tracker = instantiate(config, _convert_="all")
    except InstantiationException as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        target = get_class(config["_target_"])
        raise user_error(error.__cause__, f"tracker.{name}", target) from None
    return tracker
