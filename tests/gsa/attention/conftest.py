import pytest

from tests.gsa.attention.draw import Draw


@pytest.fixture
def draw() -> Draw:
    return Draw()
