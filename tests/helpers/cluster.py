"""A Slurm of one node in a folder of its own: munged, slurmctld and slurmd without systemd, cgroups
or accounting.
"""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=5
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=3600
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def missing() -> str | None:
    """Why no Slurm can be started here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return (
        f"{', '.join(absent)} not found: install the packages slurm-wlm and munge"
        if absent
        else None
    )


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


def _job_of(process: int) -> str:
    """The Slurm job, ``12_3``, that a process belongs to; empty for others and for those that have
    just ended.
    """
    try:
        lines = Path(f"/proc/{process}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    found = dict(line.partition("=")[::2] for line in lines)
    return (
        f"{found.get('SLURM_ARRAY_JOB_ID')}_{found.get('SLURM_ARRAY_TASK_ID')}"
        if "SLURM_PROCID" in found
        else ""
    )


class Cluster:
    """Daemons below ``folder``; ``environment`` holds what clients need. A context manager."""

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("state", "spool", "log"):
            (folder / name).mkdir(parents=True)
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        ctld_port, slurmd_port = _free_ports(2)
        self.config = CONFIG.format(
            host=socket.gethostname().partition(".")[0],
            user=pwd.getpwuid(os.getuid()).pw_name,
            folder=folder,
            cpus=cpus,
            ctld_port=ctld_port,
            slurmd_port=slurmd_port,
        )
        (folder / "slurm.conf").write_text(self.config)

    def __enter__(self):
        try:
            files = {
                "key-file": "munge.key",
                "socket": "munge.socket",
                "pid-file": "munged.pid",
                "log-file": "log/munged.log",
                "seed-file": "munge.seed",
            }
            # --force: the folders of a test are closed to other users, whom munged wants to let in
            self._start(
                "munged",
                "--force",
                "--foreground",
                *(f"--{k}={self.folder / v}" for k, v in files.items()),
            )
            self._until(lambda: (self.folder / "munge.socket").exists(), "munged has no socket")
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D")
            self._until(
                lambda: self.call("sinfo", "-h", "-o", "%T", check=False).strip() == "idle",
                "no idle node",
                60,
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def cancel(self) -> None:
        """End all jobs and wait until they are gone."""
        self.call("scancel", "--signal=KILL", f"--user={os.getuid()}", check=False)
        self.call("scancel", f"--user={os.getuid()}", check=False)
        deadline = time.monotonic() + 15
        while (
            self.call("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline
        ):
            time.sleep(0.3)

    def __exit__(self, *_: object) -> None:
        if len(self._daemons) == 3:
            self.cancel()
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def call(self, *command: str, check: bool = True, **options: object) -> str:
        """Standard output of a client command."""
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            env=self.environment,
            check=False,
            **options,
        )  # type: ignore[call-overload]
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout

    def queue(self) -> dict[str, str]:
        """Job id (``12`` or ``12_3``) → state, of all jobs that Slurm still remembers."""
        lines = self.call(
            "squeue", "--noheader", "--array", "--states=all", "--format=%i %T"
        ).split("\n")
        return dict(line.split(None, 1) for line in lines if line.strip())

    def begin(self, job: str) -> None:
        """Let a job that was put back in the queue begin soon: Slurm makes it wait for two minutes.

        Not at once: a credential issued in the second in which the last one was revoked counts as
        revoked, too.
        """
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now+3", check=False)

    def restarts(self, job: str) -> int:
        """How often Slurm has put a job back in the queue."""
        return int(self.call("scontrol", "show", "job", job).partition(" Restarts=")[2].split()[0])

    def process(self, job: str) -> int | None:
        """Id of the Python process that a job's ``srun`` has started; None when there is none."""
        for line in self.call("ps", "-eo", "pid=,args=").splitlines():
            number, _, arguments = line.strip().partition(" ")
            if (
                "submitit.core._submit" in arguments
                and "srun" not in arguments
                and _job_of(int(number)) == job
            ):
                return int(number)
        return None

    def logs(self) -> str:
        """The last lines of every daemon, for a message of failure."""
        parts = [
            f"== {p.name}\n" + "\n".join(p.read_text().splitlines()[-15:])
            for p in self.folder.glob("log/*")
        ]
        return "\n".join(parts)

    def _start(self, *command: str) -> None:
        with open(self.folder / "log" / f"{command[0]}.out", "wb") as out:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    cwd=self.folder,
                )
            )

    def _until(self, ready: object, told: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not ready():  # type: ignore[operator]
            if time.monotonic() > deadline or any(d.poll() is not None for d in self._daemons):
                raise RuntimeError(f"{told}\n{self.logs()}")
            time.sleep(0.3)
