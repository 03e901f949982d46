"""Who goes on: only the best of each rung, compared at equal steps, decided by the record alone."""

from pathlib import Path

import pytest

from gsa.errors import ConfigError
from ray_jobs.halving import Halving, SchedulerConfig
from ray_jobs.objectives import Aims
from ray_jobs.record import COMPLETE, PAUSED, Record
from tests.draw import Draw
from tests.ray_jobs.play import FRACTION, LOSS, MASS, play, searcher_of


def test_rungs_grow_by_the_factor_and_end_before_a_whole_trial() -> None:
    for grace, factor, steps, expected in ((10, 3, 90, [10, 30]), (10, 3, 91, [10, 30, 90]), (50, 2, 50, [])):
        assert Halving(SchedulerConfig("halving", grace, factor), steps, Aims([LOSS])).rungs == expected
    assert Halving(SchedulerConfig("none"), 90, Aims([LOSS])).rungs == []


@pytest.mark.parametrize("workers", [1, 4])
def test_at_most_one_in_the_factor_goes_on_and_they_are_the_best(draw: Draw, tmp_path: Path, workers: int) -> None:
    searcher = searcher_of(tmp_path / "r.jsonl", [LOSS], 30)
    play(searcher, draw, 500, workers, faults=False)
    assert searcher.finished
    record = searcher.record
    counts = [sum(step in e.steps for e in record.trials()) for step in (10, 30, 90)]
    assert counts[0] == 30
    assert counts[1] >= 10
    assert counts[2] >= 3
    for rung, after in ((10, 30), (30, 90)):
        reached = [e for e in record.trials() if rung in e.steps]
        best = sorted(reached, key=lambda e: e.steps[rung]["held_out_loss"])
        for entry in best[: len(reached) // 3]:
            assert after in entry.steps  # whoever is among the best in the end has gone on
    for entry in record.trials():
        assert entry.state in (COMPLETE, PAUSED)
        assert max(entry.steps) == (90 if entry.state == COMPLETE else entry.until)


def test_an_interrupted_search_promotes_the_same_as_a_whole_one(draw: Draw, tmp_path: Path) -> None:
    whole = searcher_of(tmp_path / "whole.jsonl", [LOSS, FRACTION], 20, constraints=(MASS,))
    play(whole, draw, 500, 1, faults=False)
    while not (part := searcher_of(tmp_path / "part.jsonl", [LOSS, FRACTION], 20, constraints=(MASS,))).finished:
        play(part, draw, draw.random.randint(1, 9), 1, faults=False)

    def told(record: Record) -> list[dict[str, object]]:
        return [{k: v for k, v in event.items() if k != "time"} for event in record.events if event["event"] != "life"]

    assert told(part.record) == told(whole.record)


def test_those_that_break_a_constraint_go_on_last(draw: Draw, tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path / "r.jsonl", [LOSS], 30, constraints=(MASS,), sampler="random")
    play(searcher, draw, 500, 1, faults=False)
    for rung, after in ((10, 30),):
        good = [e for e in searcher.record.trials() if e.steps[rung]["held_out_first_token_mass"] <= 0.5]
        went = [e for e in searcher.record.trials() if after in e.steps]
        if len(good) >= 10:
            late = [e for e in went if e not in good]
            assert len(late) <= 3  # early, when too few good ones were there


def test_more_trials_later_take_up_those_that_had_paused(draw: Draw, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    play(searcher_of(path, [LOSS], 9), draw, 500, 1, faults=False)
    paused = {e.trial_id for e in Record(path).trials() if e.state == PAUSED}
    more = searcher_of(path, [LOSS], 60, sampler="random")
    assert not more.finished
    play(more, draw, 900, 1, faults=False)
    assert len(more.record.trials()) == 60
    assert len(paused) > 3


def test_a_single_trial_goes_to_its_end(draw: Draw, tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path / "r.jsonl", [LOSS], 1)
    play(searcher, draw, 10, faults=False)
    assert [e.state for e in searcher.record.trials()] == [COMPLETE]


def test_a_grace_period_longer_than_a_trial_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.grace_period = 100: must be <= a trial's 90 steps"):
        SchedulerConfig(grace_period=100).refuse_short(90)
