"""Weights & Biases: one W&B run per run, in the scenario's group."""

from __future__ import annotations

import logging
import netrc
import os
import shlex
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from lab.core import record as records
from lab.core.config import Positive, Text, config
from lab.tracking import views
from lab.tracking.trackers import Tracker

log = logging.getLogger(__name__)


def has_key() -> bool:
    """Return True if the environment or the netrc file holds a W&B key; the key is not read."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        server = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc  # one's own, with its port
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, ValueError, netrc.NetrcParseError):
        return False  # no readable netrc or address: only the environment can hold a key
    return any("wandb" in host or host == server for host in hosts)


@config
class WandbTracker(Tracker):
    """W&B's view: live curves, then curves, figures, tables, images, record and report.

    Curves of a stage share one step axis, and their keys do not name the immunizer: runs overlay in
    one panel. Without a key, or without a server, the run is logged offline below its run folder.

    Attributes:
        mode: ``auto`` takes WANDB_MODE, else online with a key and offline without one.
        project, entity: where runs go; None is the key's default entity.
        init_timeout_s: seconds to reach the server before the run is logged offline.
        timeout_s: see `lab.tracking.trackers.Tracker`.
    """

    mode: Literal["auto", "online", "offline"] = "auto"
    project: Text
    entity: Text | None = None
    init_timeout_s: Positive = 20.0
    timeout_s: Positive = 60.0

    def start(self, config: dict[str, Any], folder: Path) -> None:
        import wandb

        common: dict[str, Any] = {
            "dir": str(folder),
            "project": self.project,
            "entity": self.entity,
            "id": views.run_id(folder),
            "group": config["scenario"]["name"],
            "name": views.run_name(config, folder),
            "tags": views.tags(config),
            "config": config,
            "notes": f"record: {folder / 'record.json'}",
            "settings": wandb.Settings(
                silent=True,
                console="off",
                x_disable_stats=True,
                disable_git=True,
                disable_code=True,
                save_code=False,
                init_timeout=float(self.init_timeout_s),
            ),
        }
        mode: Any = self.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        try:
            self.run: Any = wandb.init(mode=mode, **common)
        except (wandb.Error, OSError, TimeoutError) as error:
            if mode == "offline":
                raise
            log.warning(  # of the error only its type: it may hold what the server was sent
                "tracker wandb: W&B %s (%s), so the run is logged offline. Check WANDB_API_KEY and "
                "the network, or set tracker.wandb.mode=offline. `wandb sync %s/offline-run-*` "
                "sends what was logged",
                "cannot be reached or refuses the key" if has_key() else "needs a key",
                type(error).__name__,
                shlex.quote(str(folder.resolve() / "wandb")),
            )
            wandb.teardown()  # the service that could not connect still holds the run's id
            self.run = wandb.init(mode="offline", **common)
        for stage in views.STAGES:
            self.run.define_metric(f"{stage}/step", hidden=True)
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def log(self, prefix: str, step: int, values: dict[str, float]) -> None:
        points = {f"{prefix}/{key}": value for key, value in values.items()}
        self.run.log({f"{prefix.split('/')[0]}/step": step, **points})

    def publish(self, record: records.Record, report: Path) -> None:
        import wandb

        for stage, step, values in views.curve_points(record):
            self.run.log({f"{stage}/step": step, **values})
        views.log_media(wandb, self.run, record, report.parent, allow_mixed_types=True)
        facts = {k: record[k] for k in ("schema", "status", "content_hash")}
        artifact = wandb.Artifact(f"{self.run.id}-record", type="record", metadata=facts)
        for path in (report.with_name("record.json"), report):
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)
        self.run.summary.update(views.summary_values(record))
        self.run.summary.update({k: record[k] for k in ("status", "immunizer", "content_hash")})
        self.run.finish(exit_code=int(record["status"] != "ok"))
        if self.run.offline:
            place = shlex.quote(os.path.relpath(self.run.settings.sync_dir))
            self.location = f"W&B: offline; upload with `wandb sync {place}`"
        else:
            self.location = f"W&B: {self.run.url}"
        wandb.teardown()  # waits until W&B's service has written its files

    def abandon(self) -> None:
        """Kill W&B's service: Python would wait at its exit for an upload that hangs."""
        import wandb

        for process in psutil.Process().children():
            if "wandb" in process.name():
                process.kill()
        wandb.teardown()  # the next run of this process starts a service of its own
