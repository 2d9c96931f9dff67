"""CPU threads beside busy processes: how much slower is a training, for several OpenMP settings?

    python tests/benchmarks/busy_threads.py [SECONDS]

Two threads that wait for each other actively lose a whole time slice whenever one of them is not
scheduled. Each setting trains a small network, whose operations are short, for SECONDS (4) with one
thread per core: first on the machine as it is, then beside one busy process per core. Printed are
updates per second. The package `lab` sets GOMP_SPINCOUNT=10000.
"""

import os
import subprocess
import sys
from contextlib import ExitStack

SETTINGS = {
    "default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORK = """
import sys, time, torch
torch.manual_seed(0)
net = torch.nn.Sequential(*(torch.nn.Conv2d(32, 32, 3, padding=1) for _ in range(6)))
x, optimizer = torch.randn(8, 32, 16, 16), torch.optim.AdamW(net.parameters())
end, updates = None, -3  # three updates to warm up
while end is None or time.monotonic() < end:
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()
    updates += 1
    if updates == 0:
        end = time.monotonic() + float(sys.argv[1])
print(updates / float(sys.argv[1]))
"""


def measure(changes: dict[str, str], seconds: float) -> float:
    """Return updates per second in a process with these environment variables."""
    drop = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "KMP_BLOCKTIME")
    env = {k: v for k, v in os.environ.items() if k not in drop} | {"OMP_NUM_THREADS": str(CORES)}
    command = [sys.executable, "-c", WORK, str(seconds)]
    done = subprocess.run(command, env=env | changes, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main(seconds: float) -> None:
    print(f"{CORES} cores, load {os.getloadavg()[0]:.1f}; updates per second")
    print(f"{'setting':26}{'as it is':>10}{'busy':>10}{'ratio':>8}")
    for name, changes in SETTINGS.items():
        quiet = measure(changes, seconds)
        with ExitStack() as stack:
            for _ in range(CORES):
                stack.callback(subprocess.Popen([sys.executable, "-c", "while True: pass"]).kill)
            busy = measure(changes, seconds)
        print(f"{name:26}{quiet:10.2f}{busy:10.2f}{quiet / busy:8.1f}", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 4.0)
