"""What every test starts from."""

import os

import pytest

# CI machines are small: threads of torch, tokenizers and Ray workers would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels on the CPU; `make test-gpu` turns it off
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from tests.draw import Draw
from tests.interpreter import speed_up

if os.environ["TRITON_INTERPRET"] == "1":
    speed_up()


@pytest.fixture
def draw() -> Draw:
    return Draw()
