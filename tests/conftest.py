"""What every test starts from."""

import os

import pytest

# CI machines are small: threads of torch, tokenizers and Ray workers would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels on the CPU; `make test-gpu` turns it off
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from tests import seeds
from tests.draw import Draw


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", metavar="random|N", help="of what tests draw; the default is fixed for each test")


def pytest_configure(config: pytest.Config) -> None:
    seeds.configure(config.getoption("--seed"))


@pytest.fixture(autouse=True)
def drawn_seed(request: pytest.FixtureRequest) -> int:
    """The test's seed, from which the global generators draw too."""
    found = seeds.seed_of(request.node.nodeid)
    seeds.seed_generators(found)
    return found


@pytest.fixture
def draw(drawn_seed: int) -> Draw:
    return Draw(drawn_seed)
