"""Whether two candidates can be told apart, also where nothing varies."""

import warnings

import pytest
from scipy import stats

from ray_jobs.confirm import Confirmed, indistinguishable, welch
from tests.draw import Draw


@pytest.fixture(autouse=True)
def no_warnings() -> None:
    warnings.simplefilter("error")


def test_p_is_that_of_welchs_test(draw: Draw) -> None:
    for _ in range(20):
        a, b = ([draw.random.gauss(mean, 0.1) for _ in range(draw.random.randint(2, 5))] for mean in (2.0, 2.1))
        assert welch(a, b) == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)
    constant, varying = [1.1] * 3, [1.0, 1.2, 1.4]
    assert welch(constant, varying) == pytest.approx(0.4777, abs=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "p"),
    [
        ([1.1] * 3, [1.1] * 3, 1.0),
        ([0.1] * 3, [0.1] * 7, 1.0),  # whose means, added up in floats, are not the same
        ([1.1] * 3, [1.2] * 3, 0.0),
        ([1.1] * 3, [1.1 + 1e-15] * 3, 0.0),
    ],
)
def test_without_any_variance_the_means_decide(a: list[float], b: list[float], p: float) -> None:
    assert welch(a, b) == welch(b, a) == p
    pairs = indistinguishable([Confirmed("a", [9.0, *a]), Confirmed("b", [5.0, *b])])
    assert pairs == ([("a", "b", 1.0)] if p else [])


def test_values_that_hardly_vary_are_compared_without_loss_of_precision() -> None:
    a, b = [1.0, 1.0, 1.0 + 2e-16], [1.0, 1.0, 1.0]
    assert 0.3 < welch(a, b) <= 1
    assert welch(a, [2.0, 2.0, 2.0]) < 1e-20
