"""Weights & Biases: one W&B run per stage of a run, all in the scenario's group."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from lab.core import record as records
from lab.tracking import views
from lab.tracking.views import ATTACK, EVAL, IMMUNIZE

MODES = ("auto", "online", "offline")
NOTICE = "notice: "  # starts a line of the tracker's log that the run's own process tells the user


def has_key() -> bool:
    """Whether the environment or the netrc file holds a W&B key; the key itself is never read
    here.
    """
    import netrc
    from urllib.parse import urlsplit

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        own = urlsplit(
            os.environ.get("WANDB_BASE_URL", "")
        ).netloc  # of a server of one's own, with its port
        return any(
            "wandb" in host or host == own for host in netrc.netrc(os.environ.get("NETRC")).hosts
        )
    except (OSError, ValueError, netrc.NetrcParseError):
        return False  # no readable netrc or address: only the environment can hold a key


class WandbBackend:
    """Group = scenario, job type = stage: ``immunize`` (live), ``attack`` (curves), ``eval``
    (figures, tables, images).

    Curves of a stage share one step axis, and their keys do not name the immunizer: runs overlay in
    one panel.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.config: dict[str, Any] = {}
        self.run: Any = None

    def start(self, config: dict[str, Any]) -> None:
        self.config = config
        self.run = self._open(IMMUNIZE)

    def _open(self, stage: str) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            x_disable_stats=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            init_timeout=float(self.options["init_timeout_s"]),
        )
        folder, config = self.options["folder"], self.config
        common: dict[str, Any] = {
            "dir": folder,
            "project": self.options["project"],
            "entity": self.options["entity"],
            "id": views.run_id(folder, stage),
            "group": config["scenario"]["name"],
            "job_type": stage,
            "name": f"{views.run_name(config, folder)} · {stage}",
            "tags": views.tags(config),
            "config": config,
            "notes": f"record: {Path(folder) / 'record.json'}",
            "settings": settings,
        }
        mode = self.options["mode"]
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        try:
            run = wandb.init(mode=mode, **common)
        except (wandb.Error, OSError, TimeoutError) as error:
            if mode == "offline":
                raise
            print(f"{NOTICE}{self._fell_back(error)}", file=sys.stderr, flush=True)
            self.options["mode"] = "offline"  # for the stages that follow too
            wandb.teardown()  # the service that could not connect still holds the run's id
            run = wandb.init(mode="offline", **common)
        if stage != EVAL:
            run.define_metric(f"{stage}/step", hidden=True)
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        return run

    def _fell_back(self, error: Exception) -> str:
        """Cause and fix; of the error only its type, as a message may hold what the server was
        sent.
        """
        cause = "cannot be reached or refuses the key" if has_key() else "needs a key to be online"
        runs = Path(self.options["folder"]).resolve() / "wandb"
        return (
            f"W&B {cause} ({type(error).__name__}), so the run is logged offline. Set a "
            "valid WANDB_API_KEY and check "
            "the network, or set tracker.wandb.mode=offline. "
            f"`wandb sync {shlex.quote(str(runs))}/offline-run-*` sends what was logged"
        )

    def _point(self, stage: str, step: float, values: dict[str, float]) -> None:
        self.run.log({f"{stage}/step": step} | {f"{stage}/{k}": v for k, v in values.items()})

    def log(self, prefix: str, step: int, values: dict[str, float]) -> None:
        where = prefix.removeprefix(f"{IMMUNIZE}/")
        self._point(IMMUNIZE, step, {f"{where}/{k}": v for k, v in values.items()})

    def publish(self, record: records.Record, report: Path) -> None:
        failed = record["status"] != "ok"
        self._curves(record, IMMUNIZE)
        self.run.finish(exit_code=int(failed))
        if views.curve_rows(record, ATTACK):
            self.run = self._open(ATTACK)
            self._curves(record, ATTACK)
            self.run.finish(exit_code=int(failed))
        self.run = self._open(EVAL)
        self._figures(record, report)

    def _curves(self, record: records.Record, stage: str) -> None:
        for step, values in views.curve_rows(record, stage):
            self._point(stage, step, values)

    def _figures(self, record: records.Record, report: Path) -> None:
        import wandb

        for name, (columns, rows) in views.tables(record).items():
            text = [
                [v if isinstance(v, float | int | None) else str(v) for v in row] for row in rows
            ]
            table = wandb.Table(columns=list[str | int](columns), data=text, allow_mixed_types=True)
            self.run.log({f"tables/{name}": table})
        for name, (png, caption) in views.grids(record, report.parent).items():
            self.run.log({f"images/{name}": wandb.Image(str(png), caption=caption)})
        for name, png in views.plots(record, report.parent).items():
            self.run.log({f"plots/{name}": wandb.Image(str(png))})
        self._references(record, report)
        self.run.summary.update(views.summary_values(record))
        self.run.summary.update({k: record[k] for k in ("status", "immunizer", "content_hash")})

    def _references(self, record: records.Record, report: Path) -> None:
        """The record and the immunized weights as artifacts that point to the files; nothing is
        uploaded or copied.
        """
        import wandb

        folder, name = report.parent.resolve(), views.run_id(self.options["folder"], "record")
        facts = {k: record[k] for k in ("schema", "status", "content_hash")}
        artifact = wandb.Artifact(name, type="record", metadata=facts)
        for path in (
            folder / "record.json",
            report.resolve(),
            *(p for p, _ in views.grids(record, folder).values()),
        ):
            artifact.add_reference(path.as_uri(), name=path.relative_to(folder).as_posix())
        self.run.log_artifact(artifact)
        files = {name: path.resolve() for name, path in views.weights(record).items()}
        if files:
            sums = {
                n: json.loads((p.parent / "meta.json").read_text())["sha256"][p.name]
                for n, p in files.items()
            }
            artifact = wandb.Artifact(
                f"{name}-weights", type="immunized-weights", metadata={"sha256": sums}
            )
            for name, path in files.items():
                artifact.add_reference(path.as_uri(), name=f"{name}.safetensors", checksum=False)
            self.run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=1 if failed else 0)
