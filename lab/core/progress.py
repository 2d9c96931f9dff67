"""Progress of long work: a bar with ETA on a terminal, a line a minute in the log elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)
T = TypeVar("T")
EVERY = 60.0  # seconds between two lines of the log: a batch job is looked at now and then


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar on stderr once the work outlasts two seconds; without a terminal, tell the
    log (`run.log`).
    """
    if not sys.stderr.isatty():
        yield from _logged(
            items, label, len(items) if total is None and isinstance(items, Sized) else total
        )
        return
    yield from tqdm(
        items, desc=label, total=total, delay=2.0, leave=False, dynamic_ncols=True, mininterval=0.5
    )


def _logged(items: Iterable[T], label: str, total: int | None) -> Iterator[T]:
    start = told = time.monotonic()
    for done, item in enumerate(items):
        if done and (now := time.monotonic()) - told >= EVERY:
            told, spent = now, now - start
            left = (
                f", about {tqdm.format_interval(spent / done * (total - done))} left"
                if total
                else ""
            )
            of = f" of {total}" if total else ""
            log.info("%s: %d%s in %s%s", label, done, of, tqdm.format_interval(spent), left)
        yield item
