"""What every test starts from: its environment, and what tests share."""

import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

# CI machines are small: threads of torch, tokenizers and Ray workers would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels on the CPU; `make test-gpu` turns it off
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of the processes that tests start compiles our modules anew

from tests import marks, seeds
from tests.draw import Draw
from tests.interpreter import speed_up

if TYPE_CHECKING:  # slow to import, and most tests do without
    from dashboards.services import Services
    from tests.ray_jobs.head import Head
    from tests.shared import SharedCluster

if os.environ["TRITON_INTERPRET"] == "1":
    speed_up()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(marks)
    seeds.configure(config.getoption("--seed"))


def pytest_collection_finish() -> None:
    """Where no test has imported MLflow by now, none needs a store."""
    if "mlflow" in sys.modules:
        from tests.stores import copy_new_stores

        copy_new_stores()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", metavar="random|N", help="of what tests draw; the default is fixed for each test")


@pytest.fixture(autouse=True)
def drawn_seed(request: pytest.FixtureRequest) -> int:
    """The test's seed, from which the global generators draw too."""
    found = seeds.seed_of(request.node.nodeid)
    seeds.seed_generators(found)
    return found


@pytest.fixture
def draw(drawn_seed: int) -> Draw:
    return Draw(drawn_seed)


@pytest.fixture
def hangups() -> Iterator[None]:
    """SIGHUP does what it does in a terminal, even where `nohup` has begun the tests."""
    earlier = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, earlier)


@pytest.fixture(scope="session")
def shared_cluster() -> "Iterator[SharedCluster]":
    """Ray in this process, which a test can start and stop."""
    from tests.shared import SharedCluster

    shared = SharedCluster()
    yield shared
    shared.stop()


@pytest.fixture
def cluster(shared_cluster: "SharedCluster") -> None:
    """Ray runs in this process: what the test runs here joins it."""
    shared_cluster.start()


@pytest.fixture
def no_cluster(shared_cluster: "SharedCluster") -> None:
    """Ray does not run in this process."""
    shared_cluster.stop()


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Head]":
    """A head that asks for a token and takes jobs."""
    from tests.ray_jobs.head import running_head

    with running_head(tmp_path_factory.mktemp("head")) as head:
        yield head


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Services]":
    """MLflow behind a password, on PostgreSQL and an S3 store."""
    from tests.shared import running_services

    with running_services(tmp_path_factory.mktemp("services")) as running:
        yield running
