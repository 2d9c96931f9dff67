"""The run's side of tracking: a bounded queue per tracker, drained by a thread into a child
process.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lab.core.options import choice, number
from lab.core.sources import ROOT
from lab.tracking.wandb_backend import MODES, NOTICE

log = logging.getLogger(__name__)
_QUEUE = 10_000  # messages; a tracker that falls further behind loses live points, never the record


class _Child:
    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        self.name = str(config["name"])
        self.timeout = float(config["timeout_s"])
        self.lost = 0
        self.deadline = math.inf
        self._queue: queue.Queue[str | None] = queue.Queue(_QUEUE)
        self._output = folder / f"tracker-{self.name}.log"
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        }
        # a W&B service that this process has started knows the ids of other runs, and dies with it
        env.pop("WANDB_SERVICE", None)
        with open(self._output, "wb") as handle:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lab.tracking.worker", json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=handle,
                stderr=handle,
                env=env,
                start_new_session=True,  # Ctrl-C ends the run, which then ends the tracker in order
            )
        self._thread = threading.Thread(
            target=self._drain, name=f"tracker-{self.name}", daemon=True
        )
        self._thread.start()

    def _drain(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            while (line := self._queue.get()) is not None:
                pipe.write(line.encode() + b"\n")
                pipe.flush()
            pipe.close()
        except OSError:
            self.lost += 1 + self._queue.qsize()  # the child is gone; `finish` says so

    def send(self, message: dict[str, Any]) -> None:
        try:
            self._queue.put_nowait(json.dumps(message))
        except queue.Full:
            self.lost += 1

    def close(self, last: dict[str, Any]) -> None:
        """The last message, for which live points give way; the deadline runs from now on, for all
        trackers at once.
        """
        self.deadline = time.monotonic() + self.timeout
        for line in (json.dumps(last), None):
            while True:
                try:
                    self._queue.put_nowait(line)
                    break
                except queue.Full:
                    self._forget()

    def _forget(self) -> None:
        """Drop the message that waits longest but one: the first may be the start, which the child
        needs.
        """
        with self._queue.mutex:
            waiting = self._queue.queue
            if len(waiting) > 1:  # else the child has just read one
                del waiting[1]
                self.lost += 1

    def finish(self) -> None:
        """Wait for the child, ``timeout`` seconds after ``close`` at most; one warning at most."""
        told = []
        try:
            self._thread.join(max(self.deadline - time.monotonic(), 0.0))
            code = self._process.wait(max(self.deadline - time.monotonic(), 0.0))
            if code != 0 or self.lost:
                told.append(f"failed (exit code {code}, {self.lost} messages lost)")
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            told.append(
                f"took over {self.timeout:.0f} s and was ended; raise tracker.{self.name}.timeout_s"
            )
        told += self._notices()
        if told:
            log.warning(
                "tracker %s: %s; the record is complete, see %s",
                self.name,
                "; ".join(told),
                self._output,
            )

    def _notices(self) -> list[str]:
        """What the child wants the user to know; its log is all that is left of one that was
        killed.
        """
        try:
            lines = self._output.read_text(errors="replace").splitlines()
        except OSError:
            return []
        return [line.removeprefix(NOTICE) for line in lines if line.startswith(NOTICE)]


def _check(key: str, config: dict[str, Any]) -> None:
    """Raises `UserError` for a value that would end in a tracker that fails."""
    number(f"{key}.timeout_s", config.get("timeout_s"), above=0)
    if config.get("name") == "wandb":
        choice(f"{key}.mode", config.get("mode"), MODES)
        number(f"{key}.init_timeout_s", config.get("init_timeout_s"), above=0)


class Trackers:
    """All trackers of one run. Methods never raise and never wait, but for ``finish`` (bounded).

    Raises:
        UserError: an option that a tracker cannot work with; before any of them starts.
    """

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        self._children: list[_Child] = []
        plain = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(plain, dict)
        configs = {str(name): sub for name, sub in (plain.get("tracker") or {}).items()}
        for name, config in configs.items():  # all of them before the first one starts
            _check(f"tracker.{name}", config)
        for name, config in configs.items():
            try:
                child = _Child({"folder": str(folder), **config}, folder)
            except OSError as error:
                log.warning(
                    "tracker %s could not start (%s); the run goes on without it", name, error
                )
                continue
            child.send(
                {"event": "start", "config": {k: v for k, v in plain.items() if k != "tracker"}}
            )
            self._children.append(child)

    def log(self, prefix: str, step: int, values: dict[str, float]) -> None:
        """Live points of one curve family, e.g. ``immunize/CASE/seed0``."""
        finite = {k: v for k, v in values.items() if math.isfinite(v)}
        for child in self._children:
            child.send({"event": "log", "prefix": prefix, "step": step, "values": finite})

    def finish(self, record: Path, report: Path) -> None:
        """Hand over the record and wait, at most the tracker's ``timeout_s``."""
        for child in self._children:
            child.close({"event": "finish", "record": str(record), "report": str(report)})
        for child in self._children:
            child.finish()
        self._children = []
