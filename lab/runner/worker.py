"""One process of a run that `lab.cluster.launch` started: ``accelerate launch … -m
lab.runner.worker --config FILE``.

The config is resolved already. The folder of the file is the run's: record, report and log are
written by process 0, what the others print goes to ``ranks/N.log``. ``ranks/N.json`` says how each
process ended.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# seconds from the request to stop to the end by force, for a process that waits inside a device
# call
_GRACE = 90


class Rank:
    """This process: its number, the file that tells of it, and whether the user asked for the
    end.
    """

    def __init__(self, folder: Path) -> None:
        self.number = int(os.environ.get("RANK", "0"))
        self.path = folder / f"{self.number}.json"
        self.stopped = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, state: str, failure: dict[str, Any] | None = None) -> None:
        from lab.core.hashing import write_atomically

        body: dict[str, Any] = {"state": state, "pid": os.getpid(), "failure": failure}
        try:
            write_atomically(self.path, (json.dumps(body) + "\n").encode())
        except OSError as unwritable:
            if not self.path.is_file():
                raise
            told = failure and (failure["told"] or failure["traceback"])
            print(
                f"process {self.number} {state}, and {self.path}: {unwritable}. {told or ''}",
                file=sys.stderr,
            )
            body["failure"] = failure and {**failure, "traceback": ""}
            self._write_over(json.dumps(body) + "\n")

    def _write_over(self, text: str) -> None:
        """A full disk has no room for a second file, but the block of the one that is there can be
        written over.
        """
        with contextlib.suppress(OSError), open(self.path, "r+", encoding="utf-8") as file:
            file.write(text)
            file.truncate()

    def watch(self) -> None:
        """End in order when stdin closes: the parent closed it, or is no more."""

        def wait() -> None:
            while os.read(0, 4096):
                pass
            self.stopped.set()
            _thread.interrupt_main()
            time.sleep(_GRACE)
            os._exit(1)

        threading.Thread(target=wait, name="parent", daemon=True).start()


def _quiet(folder: Path, number: int) -> None:
    """Only process 0 speaks; this also keeps progress bars away, which want a terminal."""
    if number == 0:
        return
    handle = os.open(folder / f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)


def _logging(folder: Path, number: int) -> None:
    """As conf/hydra/job_logging/quiet.yaml has it for a run in one process."""
    stderr, stamped = (
        logging.StreamHandler(),
        logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"),
    )
    stderr.setFormatter(logging.Formatter("%(levelname)s: %(message)s") if number == 0 else stamped)
    stderr.setLevel(logging.WARNING if number == 0 else logging.INFO)
    handlers: list[logging.Handler] = [stderr]
    if number == 0:
        file = logging.FileHandler(folder / "run.log", delay=True)
        file.setFormatter(stamped)
        handlers.append(file)
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)


def _device(cfg: Any) -> None:
    """Take this process's GPU.

    Raises:
        UserError: it cannot do what the config asks for, or all processes would sit on one.
    """
    import torch

    from lab.core.errors import UserError

    if not torch.cuda.is_available():
        return
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    placed = cfg.backbone.get("device", "auto")
    if placed not in ("auto", "cuda") and cfg.launch.num_processes != 1:
        told = "would put every process there; with launch=multi_gpu each takes its own: use auto."
        raise UserError("backbone.device", placed, told)
    for key, value in (
        ("backbone.dtype", cfg.backbone.get("dtype")),
        ("immunize.precision", cfg.immunize.get("precision")),
    ):
        if value in ("bf16", "bfloat16") and torch.cuda.get_device_capability() < (8, 0):
            raise UserError(
                key, value, f"{torch.cuda.get_device_name()} has no bfloat16; use float32."
            )


def _unfit(cfg: Any) -> Exception | None:
    """What `_device` raises."""
    try:
        _device(cfg)
    except Exception as error:
        return error
    return None


def _failure(error: BaseException, ranks: Any, number: int, echo: bool) -> dict[str, Any]:
    from lab.core.errors import RankFailed, UserError, config_key_of
    from lab.runner.losses import facts, own_facts

    if (
        isinstance(error, RankFailed) and not echo
    ):  # another process's stage, without which the run went on to its end
        return facts(error) | {
            "part": error.key,
            "key": None,
            "value": None,
            "fix": None,
            "step": None,
            "echo": False,
        }
    user = error if isinstance(error, UserError) else None
    cell = getattr(ranks, "now", None)
    return own_facts(error, number) | {
        "part": config_key_of(error),
        "key": user and user.key,
        "value": user and str(user.value),
        "fix": user and user.fix,
        "step": getattr(error, "step", None),
        "cell": cell and cell.key,
        "echo": echo,
    }


def work(config: Path, rank: Rank) -> int:
    """Do this process's part; returns its exit code."""
    from omegaconf import DictConfig, OmegaConf

    from lab.core.errors import RankFailed
    from lab.runner.batch import interruptible
    from lab.runner.experiment import run_once
    from lab.runner.spread import DistributedExecutor, SerialExecutor

    folder = config.parent
    ranks: SerialExecutor = SerialExecutor()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        with interruptible():
            cfg = OmegaConf.load(config)
            assert isinstance(cfg, DictConfig)
            unfit = _unfit(cfg)
            if several:  # also to tell the others of a device that does not do: they wait here
                try:
                    ranks = DistributedExecutor(cfg.launch.timeout_s, cfg.launch.check_every)
                    ranks.stopped = rank.stopped.is_set
                except Exception:
                    if unfit is None:
                        raise
            if unfit is not None:
                raise unfit
            if isinstance(ranks, DistributedExecutor):
                ranks.check(_common(cfg, folder))
            run_once(cfg, folder, ranks)
    except (Exception, KeyboardInterrupt) as error:
        cause = ranks.cause(error)  # waits a little: a batch system signals children first
        echo = isinstance(cause, RankFailed) and cause is not error
        alone = several and not isinstance(
            ranks, DistributedExecutor
        )  # the others do not know of it, and may wait for this process
        echo = echo or (
            alone and isinstance(error, KeyboardInterrupt)
        )  # torchrun's, as another process has failed
        if rank.stopped.is_set():
            rank.write("stopped")
            return 0
        failure = _failure(error, ranks, rank.number, echo)
        order = ranks.report(failure) if isinstance(ranks, DistributedExecutor) and not echo else 1
        rank.write("failed", failure | {"order": order})
        # what is told to all ends them without accelerate, which prints a traceback; of what is not
        # they have to die
        whole = isinstance(error, RankFailed) and not echo  # all are at their end
        return 0 if whole or (failure["told"] and not ranks.started and not alone) else 1
    rank.write("done")
    if isinstance(ranks, DistributedExecutor):
        ranks.close()
    return 0


def _common(cfg: Any, folder: Path) -> dict[str, str]:
    from omegaconf import OmegaConf

    from lab.core.hashing import stage_key

    plain: Any = OmegaConf.to_container(cfg)
    own = {**plain["launch"], "machine_rank": None}
    return {
        "config": stage_key(config={**plain, "launch": own}),
        "hydra.run.dir": str(folder.resolve()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", type=Path, required=True, help="a resolved config, in the run's folder"
    )
    parser.add_argument("--watch_stdin", action="store_true", help="end when stdin closes")
    options = parser.parse_args(arguments)
    folder = options.config.parent
    rank = Rank(folder / "ranks")
    _quiet(folder / "ranks", rank.number)
    rank.write("running")
    if options.watch_stdin:
        rank.watch()
    try:
        _logging(folder, rank.number)
        code = work(options.config, rank)
    except KeyboardInterrupt:  # before there was anything to record
        rank.write("stopped")
        code = 0
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no wait for threads of process groups whose other ends are gone
