"""The tracker's own process: reads one JSON message a line on stdin, writes to W&B or trackio.

Messages: ``start`` (the run's config), ``log`` (live points), ``finish`` (paths of record and
report). When stdin closes without ``finish`` the run was killed and the tracker's run ends as
crashed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Protocol

from lab.core import record as records
from lab.tracking.trackio_backend import TrackioBackend
from lab.tracking.wandb_backend import WandbBackend


class Backend(Protocol):
    def start(self, config: dict[str, Any]) -> None: ...
    def log(self, prefix: str, step: int, values: dict[str, float]) -> None: ...
    def publish(self, record: records.Record, report: Path) -> None: ...
    def close(self, failed: bool) -> None: ...


BACKENDS: dict[str, type[Any]] = {"wandb": WandbBackend, "trackio": TrackioBackend}


def main(argument: str) -> int:
    options = json.loads(argument)
    backend: Backend = BACKENDS[options["name"]](options)
    finished = False
    for line in sys.stdin:
        message = json.loads(line)
        if message["event"] == "start":
            backend.start(message["config"])
        elif message["event"] == "log":
            backend.log(message["prefix"], message["step"], message["values"])
        else:
            record = records.read(Path(message["record"]))
            backend.publish(record, Path(message["report"]))
            finished = record["status"] == "ok"
            break
    backend.close(failed=not finished)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
