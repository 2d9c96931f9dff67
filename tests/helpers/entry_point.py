"""`run.py` as a user calls it, in this process."""

import signal
import sys

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


def call_entry(monkeypatch, capfd, *arguments):
    """(exit code, stdout, stderr); the handlers of signals are as before afterwards."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    code = 0
    try:
        entry.main()
    except SystemExit as done:
        code = done.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, *capfd.readouterr()


def record_of(out, folder):
    """The record that the last line of ``out`` names."""
    last = out.strip().splitlines()[-1]
    assert last.startswith("record: ")
    return records.read(folder / last.removeprefix("record: "))
