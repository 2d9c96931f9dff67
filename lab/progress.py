"""Progress bars: with ETA on a terminal, silent elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar on stderr that shows only where the work outlasts two seconds on a terminal."""
    quiet = not sys.stderr.isatty()
    yield from tqdm(
        items, desc=label, total=total, disable=quiet, delay=2.0, leave=False, dynamic_ncols=True, mininterval=0.5
    )
