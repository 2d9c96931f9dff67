"""Full and read-only disks, a jumping clock, locks of the living and the dead, keys in the
environment: a clear message, and the run that follows gives the same content as one that was never
disturbed.
"""

import logging
import os
import subprocess
import sys
import threading
import time

import entry_point
import pytest
from filelock import FileLock, Timeout
from processes import ROOT, TOKENS, telling

from lab.core import record as records

pytestmark = pytest.mark.slow
FAST = [*entry_point.FAST, "threads=1"]


@pytest.fixture
def cli(cli):
    def call(*arguments, **options):
        try:
            return cli(*arguments, **options)
        finally:
            for log in logging.getLogger().handlers:
                if isinstance(log, logging.FileHandler):
                    # as the end of the process would: a disk with open files cannot become
                    # read-only
                    log.close()

    return call


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The content hash of the run that the tests disturb."""
    place = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *FAST],
        cwd=place,
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return newest(place)["content_hash"]


def newest(place):
    return records.read(sorted(place.rglob("record.json"), key=lambda p: p.stat().st_mtime_ns)[-1])


def mount(*arguments):
    return subprocess.run(["mount", *arguments], capture_output=True, text=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MiB that may be filled."""
    place = tmp_path / "disk"
    place.mkdir()
    made = mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place))
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place, free):
    """Leave ``free`` bytes."""
    space = os.statvfs(place)
    with open(place / "filler", "wb") as handle:
        handle.write(b"\0" * (space.f_bavail * space.f_frsize - free))


@pytest.mark.parametrize("free", [4 << 10, 96 << 10, 400 << 10])
def test_a_full_disk_is_told_and_nothing_finished_is_lost(cli, small_disk, undisturbed, free):
    place = f"paths.outputs={small_disk / 'outputs'}"
    fill(small_disk, free)
    err = cli(*FAST, place, code=2).err
    assert "No space left on device" in err
    assert "Traceback" not in err
    finished = {p.parent.name for p in small_disk.rglob("meta.json")}
    (small_disk / "filler").unlink()
    assert "checksum" not in cli(*FAST, place).err
    record = newest(small_disk)
    assert (record["content_hash"], record["provenance"]["cache_hits"]) == (
        undisturbed,
        len(finished),
    )


def test_a_read_only_disk_is_told_and_its_records_can_still_be_reported(cli, small_disk, tmp_path):
    place = f"paths.outputs={small_disk / 'outputs'}"
    cli(*FAST, place)
    changed = mount("-o", "remount,ro", str(small_disk))
    assert changed.returncode == 0, changed.stderr
    err = cli(*FAST, place, code=2).err
    assert "Read-only file system" in err
    assert "paths.outputs" in err
    assert "Traceback" not in err
    cli("action=leaderboard", f"records=[{small_disk}]", f"paths.outputs={tmp_path / 'elsewhere'}")
    assert (tmp_path / "elsewhere" / "leaderboard.md").is_file()


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_changes_nothing(cli, tmp_path, monkeypatch, undisturbed, jump):
    real, calls = time.time, []

    def jumping():
        calls.append(None)
        return real() + jump * (len(calls) > 3)

    monkeypatch.setattr(time, "time", jumping)
    cli(*FAST)
    assert len(calls) > 3
    record = newest(tmp_path)
    assert record["content_hash"] == undisturbed
    assert 0 <= record["provenance"]["wall_time_s"] < 3600
    cli("action=status")


HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])  # kept: a lock that nobody refers to is released
lock.acquire()
print("held", flush=True)
time.sleep(3600)
"""


def holder(path):
    """A process that holds the lock at ``path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(Timeout):
        FileLock(path).acquire(timeout=0)
    return process


def artefact_to_compute_again(place):
    folder = next(p.parent for p in (place / "outputs/cache/attack").rglob("meta.json"))
    (folder / "meta.json").unlink()
    return folder


def test_the_lock_of_a_dead_process_does_not_hold(cli, tmp_path, undisturbed):
    cli(*FAST)
    process = holder(artefact_to_compute_again(tmp_path).with_suffix(".lock"))
    process.kill()
    process.wait()
    process.stdout.close()
    assert "another process" not in cli(*FAST).err
    assert newest(tmp_path)["content_hash"] == undisturbed


def test_the_lock_of_a_living_process_is_told_and_waited_for(cli, tmp_path, undisturbed):
    cli(*FAST)
    process = holder(artefact_to_compute_again(tmp_path).with_suffix(".lock"))

    def end_when_told():
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if any(
                "computed by another process" in p.read_text() for p in tmp_path.rglob("run.log")
            ):
                break
            time.sleep(0.1)
        process.kill()

    ender = threading.Thread(target=end_when_told)
    ender.start()
    err = cli(*FAST).err
    ender.join()
    process.wait()
    process.stdout.close()
    assert "computed by another process; waiting" in err
    assert newest(tmp_path)["content_hash"] == undisturbed


def test_keys_of_the_environment_are_written_nowhere(cli, tmp_path, monkeypatch):
    """Both trackers, a run and a failed one; W&B has a key that no server accepts."""
    for name, value in TOKENS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    tracked = [
        *(a for a in FAST if a != "tracker=none"),
        "tracker=[wandb,trackio]",
        "tracker.wandb.init_timeout_s=5",
        "tracker.wandb.timeout_s=300",
        "tracker.trackio.timeout_s=300",
    ]
    told = [*cli(*tracked), *cli(*tracked, "scenario.path=/nowhere", code=2)]
    cli("action=leaderboard")
    assert list(tmp_path.rglob("*.wandb"))
    assert telling(tmp_path, *told) == []
