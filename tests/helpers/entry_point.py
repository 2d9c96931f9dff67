"""`run.py` as a user calls it, in this process."""

import signal
import sys
from typing import NamedTuple

from hydra.core.global_hydra import GlobalHydra

import run as entry
from lab.core import record as records

FAST = [
    "experiment=house_price",
    "seeds=[0]",
    "immunize.epochs=2",
    "tracker=none",
    "budget.horizon=5",
    "budget.multiple=2",
    "budget.points=5",
]


class Told(NamedTuple):
    """What a call has written."""

    out: str
    err: str


def call_entry(monkeypatch, capfd, *arguments, code=0):
    """A call that ends with ``code`` (None: with any); the handlers of signals stay as they are."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    found = 0
    try:
        entry.main()
    except SystemExit as done:
        found = done.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    told = Told(*capfd.readouterr())
    assert code in (None, found), f"exit code {found}\n{told.out}\n{told.err}"
    return told


def record_of(out, folder):
    """The record that the last line of ``out`` names."""
    last = out.strip().splitlines()[-1]
    assert last.startswith("record: ")
    return records.read(folder / last.removeprefix("record: "))
