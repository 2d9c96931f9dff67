"""An attacker that ends the process it runs in, as processes end. Runs of the tests find it by its
import path.
"""

import os
import signal
import time
from pathlib import Path

from attacks.probes.linear_probe import LinearProbe

PATIENCE_S = 120


class Fault(LinearProbe):
    """
    Args:
        rank: of the process that it befalls.
        kind: ``killed`` | ``raises``, or ``defect``, which raises in every process.
        folder: where this process says that it is about to end; the others wait for that, so that
            they do not take its stage.
    """

    def __init__(self, *, rank: int, kind: str, folder: str) -> None:
        super().__init__(name="fault")
        self.rank, self.kind, self.mark = rank, kind, Path(folder) / "about_to_end"

    def __call__(self, *args, **kwargs):
        if self.kind == "defect":
            raise ZeroDivisionError("nothing to divide by")
        if os.environ.get("RANK") != str(self.rank):
            deadline = time.monotonic() + PATIENCE_S
            while not self.mark.exists():
                if time.monotonic() > deadline:
                    raise TimeoutError("the other process took no stage")
                time.sleep(0.01)
            return super().__call__(*args, **kwargs)
        self.mark.touch()
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("nothing to divide by")
