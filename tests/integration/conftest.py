import tempfile
from pathlib import Path

import pytest
from cluster import Cluster, missing


@pytest.fixture(scope="module")
def cluster():
    """A Slurm of one node with two processors; the test is skipped, and says why, where none can be
    started.
    """
    if reason := missing():
        pytest.skip(reason)
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        Cluster(Path(folder) / "cluster") as running,
    ):
        yield running
