"""Comparisons between trials, against comparisons of all pairs."""

import math

import pytest

from gsa.errors import ConfigError
from ray_jobs.objectives import Aims, ConstraintConfig, ObjectiveConfig
from ray_jobs.record import COMPLETE, Entry
from tests.draw import Draw

NAMES = ("held_out_loss", "held_out_k_mean", "tokens_per_second")


@pytest.mark.parametrize("modes", [["min"], ["min", "min"], ["min", "max"], ["max", "min", "min"]])
def test_the_pareto_front_holds_whom_nobody_beats(draw: Draw, modes: list[str]) -> None:
    aims = Aims([ObjectiveConfig(name, mode) for name, mode in zip(NAMES, modes, strict=False)])
    values = {str(i): [float(draw.random.randrange(6)) for _ in modes] for i in range(20)}
    front = aims.front(values.items())
    signs = [1 if m == "min" else -1 for m in modes]
    signed = {name: [s * v for s, v in zip(signs, own, strict=True)] for name, own in values.items()}
    for name, own in signed.items():
        better = [o for o in signed.values() if o != own and all(x <= y for x, y in zip(o, own, strict=True))]
        assert (name in front) == (not better)
    assert [signed[name][0] for name in front] == sorted(signed[name][0] for name in front)


def test_order_puts_what_keeps_to_the_constraints_first_and_no_better_after_a_worse(draw: Draw) -> None:
    aims = Aims([ObjectiveConfig(NAMES[0]), ObjectiveConfig(NAMES[1], "max")])
    points = [
        (
            [float(draw.random.randrange(5)), float(draw.random.randrange(5))],
            {"c": draw.random.choice([-1.0, 0.0, 2.0])},
        )
        for _ in range(30)
    ]
    order = [points[i] for i in aims.order(points)]
    assert sorted(map(str, order)) == sorted(map(str, points))
    for place, (values, broken) in enumerate(order):
        for later, later_broken in order[place + 1 :]:
            assert max(broken["c"], 0) <= max(later_broken["c"], 0)
            if max(broken["c"], 0) == max(later_broken["c"], 0):
                beats = later[0] <= values[0] and later[1] >= values[1] and later != values
                assert not beats


def test_bounds_hold_at_the_bound_and_against_the_dense_model() -> None:
    loss = ConstraintConfig("held_out_loss", upper=0.01, relative_to="dense")
    assert loss.violation({"held_out_loss": 2.01}, {"held_out_loss": 2.0}) == pytest.approx(0, abs=1e-12)
    assert loss.violation({"held_out_loss": 2.5}, {"held_out_loss": 2.0}) == pytest.approx(0.49)
    assert loss.violation({"held_out_loss": 2.5}, {}) == 0  # not known yet
    fast = ConstraintConfig("tokens_per_second", lower=100)
    assert fast.violation({"tokens_per_second": 40}, {}) == 60
    assert fast.violation({"tokens_per_second": math.nan}, {}) == math.inf
    assert str(loss) == "held_out_loss <= dense + 0.01"
    dense = Entry("baseline-dense", {}, {}, baseline=True, state=COMPLETE)
    dense.steps = {10: {"held_out_loss": 5.0}, 30: {"held_out_loss": 3.0}}
    aims = Aims([ObjectiveConfig()], [loss])
    entries = {dense.trial_id: dense}
    assert [aims.dense_at(entries, step).get("held_out_loss") for step in (5, 10, 29, 30, None)] == [
        None, 5.0, 5.0, 3.0, 3.0,
    ]  # fmt: skip
    for upper, lower in ((None, None), (1.0, 0.0)):
        with pytest.raises(ConfigError, match="set either upper or lower"):
            ConstraintConfig("held_out_loss", upper, lower).check("constraints[0]")
