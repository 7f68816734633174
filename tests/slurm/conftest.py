"""One cluster of three nodes for all tests here: n1 and n2 to measure on, n3 for what takes its time."""

from __future__ import annotations

import fcntl
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, missing  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    with Path("/tmp/cx-cluster.lock").open("w") as lock:
        # the networks of two clusters have the same names, and starting one removes what is there of them
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = Path(tempfile.mkdtemp(prefix="cx-cluster-", dir="/tmp"))
        folder.chmod(0o755)  # every user of the cluster reads its configuration
        found = Cluster(folder, [ROOT, tmp_path_factory.getbasetemp()], nodes=3)
        found.env |= {"CX_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        try:
            found.start()
            yield found
        finally:
            found.stop()
            shutil.rmtree(folder, ignore_errors=True)
