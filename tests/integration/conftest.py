import tempfile
from pathlib import Path

import pytest
from cluster import Cluster, missing
from release_examples import finished, options

import lab.cli.tables  # noqa: F401 - before `short_page`, whose stand-in it would import
from lab.release.export import export


@pytest.fixture(autouse=True)
def short_page(request, monkeypatch):
    """Pages have no plots, which take longer than a small run, but in slow tests."""

    def render(records, out):
        out.write_text(records[0]["immunizer"])
        return out

    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr("eval.report.html.render", render)
        monkeypatch.setattr("lab.cli.tables.render", render)


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


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """(root, record file) of one finished run of a tiny text-to-image model."""
    root = tmp_path_factory.mktemp("release")
    return root, finished(root)


@pytest.fixture(scope="session")
def exported(run_folder):
    return export(options(run_folder))
