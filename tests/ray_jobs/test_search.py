"""Searcher and scheduler: what Optuna is told, and that a record rebuilds both as they were."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from gsa.config import TrainConfig, build
from gsa.errors import ConfigError, RunError
from ray_jobs.record import COMPLETE, FAIL, PRUNED, RUNNING, Entry, Record
from ray_jobs.report import pareto_front
from ray_jobs.scheduler import SchedulerConfig, make_scheduler
from ray_jobs.searcher import ObjectiveConfig, OptunaSearcher, SearcherConfig
from ray_jobs.space import Space
from tests.draw import Draw

LOSS, FRACTION = ObjectiveConfig("held_out_loss"), ObjectiveConfig("held_out_selected_fraction")
BASE = dataclasses.asdict(build(TrainConfig, {}))
RATE = "training.optimizer.learning_rate"
SPACE = {
    RATE: {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
    "model.attention.controller.kind": {"type": "categorical", "choices": ["fixed", "ratio"]},
    "model.attention.controller.ratio": {
        "type": "float", "low": 0.1, "high": 0.5, "when": {"model.attention.controller.kind": "ratio"},
    },
    "model.attention.gates.places": {"type": "categorical", "choices": [[], ["G1", "G2"]]},
}  # fmt: skip


def searcher_of(
    record: Record, objectives: list[ObjectiveConfig], samples: int = 100, sampler: str = "tpe", space: Any = None
) -> OptunaSearcher:
    config = SearcherConfig(sampler, startup_trials=4)
    return OptunaSearcher(Space(space or SPACE, BASE), objectives, config, 7, samples, record)


def run(searcher: OptunaSearcher, draw: Draw, count: int) -> list[dict[str, Any]]:
    """Let proposals run to a random end; the loss depends on the rate alone."""
    proposals = []
    for i in range(count):
        proposal = searcher.suggest(f"tune{i}-{draw.random.random()}")
        proposals.append(proposal)
        tune_id = next(k for k, v in searcher._ids.items() if v == proposal["trial_id"])
        loss = abs(math.log(proposal["settings"][RATE] / 1e-3))
        for step in (10, 20):
            result: dict[str, Any] = {"step": step, "held_out_loss": loss + 1 / step, "held_out_selected_fraction": 0.5}
            searcher.on_trial_result(tune_id, result)
        end = draw.random.choice(["complete", "complete", "stopped", "failed", "died", "nan"])
        last = {**result, "step": 30, "complete": end == "complete"}
        if end == "failed":
            last = {"failed": "loss is nan"}
        if end == "nan":
            last |= {"held_out_loss": math.nan, "complete": True}
        searcher.on_trial_complete(tune_id, None if end == "died" else last, error=end == "died")
    return proposals


@pytest.mark.parametrize("objectives", [[LOSS], [LOSS, FRACTION]])
@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_a_rebuilt_study_is_the_same_and_proposes_the_same(
    draw: Draw, tmp_path: Path, sampler: str, objectives: list[ObjectiveConfig]
) -> None:
    record = Record(tmp_path / "r.jsonl")
    first = searcher_of(record, objectives, sampler=sampler)
    run(first, draw, 12)
    again = searcher_of(Record(tmp_path / "r.jsonl"), objectives, sampler=sampler)
    for a, b in zip(first._study.trials, again._study.trials, strict=True):
        assert (a.state, a.values, a.params, a.distributions) == (b.state, b.values, b.params, b.distributions)
        assert a.intermediate_values == b.intermediate_values
    if sampler != "nsga2":  # which remembers generations in ways of its own
        assert first.suggest("x") == again.suggest("x")


def test_optuna_is_told_how_each_trial_ended(draw: Draw, tmp_path: Path) -> None:
    record = Record(tmp_path / "r.jsonl")
    searcher = searcher_of(record, [LOSS])
    run(searcher, draw, 40)
    states = {COMPLETE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED, FAIL: TrialState.FAIL}
    assert {e.state for e in record.trials()} == set(states)
    for entry, trial in zip(record.entries.values(), searcher._study.trials, strict=True):
        assert trial.state == states[entry.state]
        if entry.state != PRUNED:
            assert trial.values == entry.values
        assert (entry.values is not None) == (entry.state == COMPLETE)
        assert bool(entry.reason) == (entry.state == FAIL)
        if entry.state == PRUNED:
            assert trial.intermediate_values == {s: v["held_out_loss"] for s, v in entry.steps.items()}
            assert max(entry.steps) == 30


def test_a_trial_whose_process_died_is_proposed_again_so_many_times_and_then_failed(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.jsonl")
    searcher = OptunaSearcher(Space(SPACE, BASE), [LOSS], SearcherConfig(), 0, 1, record, max_failures=2)
    first = searcher.suggest("0")
    for attempt in ("1", "2"):
        assert searcher.suggest("waits") is None  # while one runs that may have to run again
        searcher.on_trial_complete(str(int(attempt) - 1), error=True)
        assert record.entries[first["trial_id"]].state == RUNNING
        assert searcher.suggest(attempt) == first
    searcher.on_trial_complete("2", error=True)
    assert record.entries[first["trial_id"]].state == FAIL
    assert "3 times" in record.entries[first["trial_id"]].reason
    assert searcher.suggest("3") == Searcher.FINISHED


def test_unfinished_trials_come_first_and_under_their_own_names(draw: Draw, tmp_path: Path) -> None:
    record = Record(tmp_path / "r.jsonl")
    record.propose(Entry("baseline-dense", {}, {"seed": 1}, baseline=True))
    first = searcher_of(record, [LOSS], samples=6)
    assert first.remaining == 7
    names = [first.suggest(str(i))["trial_id"] for i in range(4)]
    assert names[0] == "baseline-dense"
    first.on_trial_complete("1", {"step": 3, "held_out_loss": 1.0, "complete": True})
    first.interrupted = True
    first.on_trial_complete("2", {"step": 3, "held_out_loss": 1.0})
    again = searcher_of(Record(tmp_path / "r.jsonl"), [LOSS], samples=6)
    assert again.remaining == 6
    later = [again.suggest(str(i)) for i in range(6)]
    assert again.suggest("6") is None
    for i in range(6):
        again.on_trial_complete(str(i), {"step": 3, "held_out_loss": 1.0, "complete": True})
    later.append(again.suggest("7"))
    assert [p["trial_id"] for p in later[:3]] == [names[0], *names[2:]]
    assert later[6] == Searcher.FINISHED
    assert len({p["trial_id"] for p in later[:6]} | set(names)) == 7


def test_tpe_finds_better_rates_than_random_draws(draw: Draw, tmp_path: Path) -> None:
    found = {}
    for sampler in ("tpe", "random"):
        losses = []
        searcher = searcher_of(Record(tmp_path / f"{sampler}.jsonl"), [LOSS], sampler=sampler)
        for i in range(40):
            loss = abs(math.log(searcher.suggest(str(i))["settings"][RATE] / 1e-3))
            searcher.on_trial_complete(str(i), {"step": 1, "held_out_loss": loss, "complete": True})
            losses.append(loss)
        found[sampler] = sum(losses[20:]) / 20
    assert found["tpe"] < found["random"]


def test_invalid_combinations_cost_nothing_and_an_empty_space_ends(draw: Draw, tmp_path: Path) -> None:
    key = "model.attention.controller.k_min"
    record = Record(tmp_path / "r.jsonl")
    searcher = searcher_of(record, [LOSS], space={key: {"type": "int", "low": 1, "high": 4000}})
    proposals = [searcher.suggest(str(i)) for i in range(5)]
    assert all(p["settings"][key] <= 2048 for p in proposals)  # the default k
    refused = [e for e in record.entries.values() if not e.ran]
    assert all(e.state == FAIL and "k_min" in e.reason for e in refused)
    assert len(record.trials()) == 5
    nothing = searcher_of(Record(tmp_path / "n.jsonl"), [LOSS], space={key: {"type": "int", "low": 3000, "high": 4000}})
    with pytest.raises(RunError, match="no valid combination"):
        nothing.suggest("0")


def play(scheduler: TrialScheduler, record: Record, draw: Draw, trials: list[str]) -> list[str]:
    """Report random losses of several trials in turn, to the scheduler and to the record."""
    decisions, open_trials = [], dict.fromkeys(trials, 0)
    while open_trials:
        name = draw.random.choice(list(open_trials))
        open_trials[name] += 10
        step, loss = open_trials[name], draw.random.random()
        trial = SimpleNamespace(trial_id="tune-" + name, config={"trial_id": name, "baseline": name == "baseline"})
        if step == 10:
            record.propose(Entry(name, {}, {}, baseline=name == "baseline"))
            scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        decision = scheduler.on_trial_result(None, trial, {"step": step, "held_out_loss": loss})  # type: ignore[arg-type]
        record.result(name, step, {"held_out_loss": loss})
        decisions.append(decision)
        if decision == TrialScheduler.STOP or step == 90:
            del open_trials[name]
            record.end(name, PRUNED if decision == TrialScheduler.STOP else COMPLETE)
    return decisions


def rungs(scheduler: Any) -> list[tuple[float, dict[str, float]]]:
    return [rung for bracket in scheduler._brackets for rung in bracket._rungs]


def test_a_rebuilt_scheduler_holds_the_same_rungs_and_spares_baselines(draw: Draw, tmp_path: Path) -> None:
    config = SchedulerConfig(grace_period=10, reduction_factor=3)
    record = Record(tmp_path / "r.jsonl")
    scheduler = make_scheduler(config, LOSS, 90, record)
    decisions = play(scheduler, record, draw, ["baseline", *map(str, range(20))])
    assert TrialScheduler.STOP in decisions
    assert record.entries["baseline"].state == COMPLETE
    assert [len(seen) for _, seen in rungs(scheduler)][-1] == 20
    again = make_scheduler(config, LOSS, 90, Record(tmp_path / "r.jsonl"))
    assert rungs(again) == rungs(scheduler)


def test_a_trial_that_was_to_be_stopped_when_the_driver_died_is_ended(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.jsonl")
    for i, loss in enumerate((1.0, 2.0, 9.0)):
        record.propose(Entry(str(i), {}, {}))
        record.result(str(i), 10, {"held_out_loss": loss})
    make_scheduler(SchedulerConfig(grace_period=10, reduction_factor=2), LOSS, 90, record)
    assert [e.state for e in record.trials()] == [RUNNING, PRUNED, PRUNED]


def test_a_grace_period_longer_than_a_trial_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.grace_period = 100: must be <= a trial's 90 steps"):
        make_scheduler(SchedulerConfig(grace_period=100), LOSS, 90, Record(tmp_path / "r.jsonl"))


def test_the_pareto_front_holds_whom_nobody_beats(draw: Draw) -> None:
    for modes in (["min"], ["min", "min"], ["min", "max"], ["max", "min", "min"]):
        values = {str(i): [float(draw.random.randrange(6)) for _ in modes] for i in range(20)}
        front = pareto_front(values, modes)
        signs = [1 if m == "min" else -1 for m in modes]
        signed = {name: [s * v for s, v in zip(signs, own, strict=True)] for name, own in values.items()}
        for name, own in signed.items():
            better = [o for o in signed.values() if o != own and all(x <= y for x, y in zip(o, own, strict=True))]
            assert (name in front) == (not better)


def test_proposals_are_plain_data(draw: Draw, tmp_path: Path) -> None:
    for proposal in run(searcher_of(Record(tmp_path / "r.jsonl"), [LOSS]), draw, 5):
        assert json.loads(json.dumps(proposal)) == proposal
