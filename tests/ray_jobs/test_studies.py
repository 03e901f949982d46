"""What Optuna is told, and that a record rebuilds it as it was."""

from pathlib import Path

import pytest
from optuna.trial import TrialState

from ray_jobs.objectives import ConstraintConfig, ObjectiveConfig
from ray_jobs.record import COMPLETE, FAIL, PAUSED, Record
from ray_jobs.searcher import GsaSearcher
from ray_jobs.studies import optuna_trial
from tests.draw import Draw
from tests.ray_jobs.play import FRACTION, LOSS, MASS, RATE, loss_at, play, searcher_of, start, train


@pytest.mark.parametrize("constraints", [(), (MASS,)])
@pytest.mark.parametrize("objectives", [[LOSS], [LOSS, FRACTION]])
@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2", "nsga3", pytest.param("gp", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_rebuilt_studies_are_the_same_and_propose_the_same(
    draw: Draw,
    tmp_path: Path,
    sampler: str,
    objectives: list[ObjectiveConfig],
    constraints: tuple[ConstraintConfig, ...],
) -> None:
    path = tmp_path / "r.jsonl"
    first = searcher_of(path, objectives, sampler=sampler, constraints=constraints, halving=sampler != "nsga3")
    play(first, draw, 12 if sampler == "gp" else 30)
    again = searcher_of(path, objectives, sampler=sampler, constraints=constraints, halving=sampler != "nsga3")
    assert first.studies.count == again.studies.count
    for level, study in first.studies.studies.items():
        for a, b in zip(study.trials, again.studies.studies[level].trials, strict=True):
            assert (a.state, a.values, a.params, a.distributions) == (b.state, b.values, b.params, b.distributions)
            assert a.intermediate_values == b.intermediate_values
            assert a.constraints == b.constraints
    assert first.studies.draw().params == again.studies.draw().params


def test_each_study_holds_what_was_reached_at_its_rung(draw: Draw, tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path / "r.jsonl", [LOSS], 40)
    play(searcher, draw, 200)
    for level, study in searcher.studies.studies.items():
        step = 90 if level is None else level
        losses = {e.params[RATE]: e.steps[step]["held_out_loss"] for e in searcher.record.trials() if step in e.steps}
        told = {t.params[RATE]: t.values[0] for t in study.trials if t.state == TrialState.COMPLETE}
        assert told
        assert told == pytest.approx({rate: losses[rate] for rate in told})
        finite = [rate for rate, loss in losses.items() if loss == loss]
        assert set(told) == set(finite)
    counts = [searcher.studies._values[level] for level in searcher.studies.studies]
    assert counts == sorted(counts, reverse=True)


def test_a_trial_that_fails_is_told_as_such_with_its_reason(draw: Draw, tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path / "r.jsonl", [LOSS], 40, halving=False)
    play(searcher, draw, 200)
    states = {COMPLETE: TrialState.COMPLETE, FAIL: TrialState.FAIL}
    assert {e.state for e in searcher.record.trials()} == set(states)
    for entry, trial in zip(searcher.record.trials(), searcher.studies.studies[None].trials, strict=True):
        assert trial.state == states[entry.state]
        assert trial.user_attrs.get("reason", "") == entry.reason


def test_exported_trials_are_pruned_with_what_they_had_reached(draw: Draw, tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path / "r.jsonl", [LOSS], 20, constraints=(MASS,))
    play(searcher, draw, 100, faults=False)
    seen = set()
    for entry in searcher.record.trials():
        trial = optuna_trial(entry, searcher.studies.space, searcher.aims, {str(MASS): 0.1})
        seen.add(entry.state)
        assert trial.constraints == {str(MASS): 0.1}
        assert trial.state.name == ("PRUNED" if entry.state == PAUSED else entry.state)
        if entry.state == PAUSED:
            last = max(entry.steps)
            assert trial.intermediate_values[last] == trial.value == loss_at(entry.settings, last)
        assert trial.user_attrs["reason"] == entry.reason
    assert {PAUSED, COMPLETE} <= seen


def mean_of_later(searcher: GsaSearcher, count: int) -> float:
    losses = []
    for i in range(count):
        proposal = start(searcher, str(i))
        assert proposal is not None
        losses.append(loss_at(proposal["settings"], 90))
        train(searcher, str(i), proposal)
    return sum(losses[count // 2 :]) / (count - count // 2)


def test_tpe_finds_better_rates_than_random_draws(tmp_path: Path) -> None:
    found = {}
    for sampler in ("tpe", "random"):
        found[sampler] = mean_of_later(searcher_of(tmp_path / sampler, [LOSS], sampler=sampler, halving=False), 40)
    assert found["tpe"] < found["random"]


def test_what_breaks_a_constraint_is_avoided(tmp_path: Path) -> None:
    """The best rate breaks it: a search that knows of it turns away."""
    shares = {}
    for name, constraints in (("free", ()), ("bound", (ConstraintConfig("held_out_first_token_mass", upper=0.05),))):
        searcher = searcher_of(tmp_path / name, [LOSS], 50, constraints=constraints, halving=False)
        mean_of_later(searcher, 50)
        later = searcher.record.trials()[25:]
        shares[name] = sum(e.settings[RATE] * 100 <= 0.05 for e in later) / len(later)
    assert shares["bound"] > shares["free"]
    assert Record(tmp_path / "bound").trials()[0].steps[90].keys() == {"held_out_loss", "held_out_first_token_mass"}
