"""What is slow to start and shared by the tests of a process: a Ray cluster, MLflow's shared services."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from dashboards.services import SERVERS, Services, postgres_program
from gsa.errors import RequestError
from ray_jobs.cluster import running
from tests.ray_jobs.nodes import kill_all

Starter = Callable[[], contextlib.AbstractContextManager[object]]


class SharedCluster:
    """Ray in the tests' own process, one cluster at a time: the sweeps and runs of one test after another join it."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self._starter: Starter | None = None

    def start(self, starter: Starter = running) -> None:
        """Have the cluster that a context starts; as `gsa` starts it on a machine, if nothing else is said."""
        if self._starter is starter and ray.is_initialized():
            return
        self.stop()
        self._held.enter_context(starter())
        self._starter = starter

    def stop(self) -> None:
        self._starter = None
        self._held.close()


@contextlib.contextmanager
def running_services(base: Path) -> Iterator[Services]:
    try:
        postgres_program("postgres")
    except RequestError as error:
        pytest.skip(str(error))
    for folder in (base, *base.parents):  # PostgreSQL runs as another user where we are root
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    found = Services(base / "kept")
    found.start()
    try:
        yield found
    finally:
        for name in SERVERS:  # at once: nothing of it is kept, and to stop in order takes 25 s
            if (process := found.process(name)) is not None:
                kill_all(process)
