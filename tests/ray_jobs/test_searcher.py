"""What runs next, and what the record says of it."""

import json
import math
from pathlib import Path

import pytest
from ray.tune.search import Searcher

from gsa.errors import InfrastructureError, RequestError, RunError
from ray_jobs.confirm import ConfirmConfig, confirmations, front
from ray_jobs.record import COMPLETE, FAIL, PAUSED, RUNNING, Entry, Record
from tests.draw import Draw
from tests.ray_jobs.play import FRACTION, LOSS, RATE, play, result_at, searcher_of, start, train


def test_a_trial_whose_process_died_is_proposed_again_so_many_times_and_then_failed(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path / "r.jsonl", [LOSS], 1, halving=False, max_failures=2)
    first = searcher.suggest("0")
    for attempt in ("1", "2"):
        assert searcher.suggest("waits") is None  # while one runs that may have to run again
        searcher.on_trial_complete(str(int(attempt) - 1), error=True)
        assert searcher.record.entries[first["trial_id"]].state == RUNNING
        assert searcher.suggest(attempt) == first
    searcher.on_trial_complete("2", error=True)
    entry = searcher.record.entries[first["trial_id"]]
    assert (entry.state, entry.reason) == (FAIL, "its process died 3 times")
    assert searcher.suggest("3") == Searcher.FINISHED


def test_unfinished_trials_come_first_and_under_their_own_names(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Record(path).propose(Entry("baseline-dense", {}, {RATE: 1e-3}, baseline=True))
    first = searcher_of(path, [LOSS], 6, halving=False)
    names = [first.suggest(str(i))["trial_id"] for i in range(4)]
    assert names[0] == "baseline-dense"
    train(first, "1", first.record.entries[names[1]].proposal())
    first.interrupted = True
    first.on_trial_complete("2", {"step": 3, "held_out_loss": 1.0})
    again = searcher_of(path, [LOSS], 6, halving=False)
    assert not again.finished
    later = [again.suggest(str(i)) for i in range(6)]
    assert again.suggest("6") is None
    for i in range(6):
        train(again, str(i), later[i])
    assert again.suggest("7") == Searcher.FINISHED
    assert again.finished
    assert [p["trial_id"] for p in later[:3]] == [names[0], *names[2:]]
    assert len({p["trial_id"] for p in later} | set(names)) == 7


@pytest.mark.parametrize("objectives", [[LOSS], [LOSS, FRACTION]])
def test_a_sweep_of_faults_and_crashes_ends_and_counts_them_all(
    draw: Draw, tmp_path: Path, objectives: list[object]
) -> None:
    path, lives = tmp_path / "r.jsonl", 0
    while True:
        searcher = searcher_of(path, objectives, 25)  # type: ignore[arg-type]
        if searcher.finished:
            break
        play(searcher, draw, draw.random.randint(1, 15))
        lives += 1
        assert lives < 100
    record = Record(path)
    assert len([e for e in record.trials() if e.searched]) == 25
    assert {e.state for e in record.trials()} <= {COMPLETE, PAUSED, FAIL}
    for entry in record.trials():
        assert (entry.values is not None) == (entry.state == COMPLETE)
        assert bool(entry.reason) == (entry.state == FAIL)
        assert (entry.state == PAUSED) == (entry.until is not None and entry.until in entry.steps) or entry.reason
    assert any(e.state == COMPLETE for e in record.trials()) or all(e.state == FAIL for e in record.trials())


def test_invalid_combinations_cost_nothing_and_an_empty_space_ends(tmp_path: Path) -> None:
    key = "model.attention.controller.k_min"
    space = {key: {"type": "int", "low": 1, "high": 4000}}
    searcher = searcher_of(tmp_path / "r.jsonl", [LOSS], space=space)
    proposals = [searcher.suggest(str(i)) for i in range(5)]
    assert all(p["settings"][key] <= 2048 for p in proposals)  # the default k
    refused = [e for e in searcher.record.entries.values() if not e.ran]
    assert all(e.state == FAIL and "k_min" in e.reason for e in refused)
    assert len(searcher.record.trials()) == 5
    nothing = searcher_of(tmp_path / "n.jsonl", [LOSS], space={key: {"type": "int", "low": 3000, "high": 4000}})
    with pytest.raises(RunError, match="no valid combination"):
        nothing.suggest("0")


def test_what_the_gate_refuses_does_not_run_and_is_told_to_the_search(draw: Draw, tmp_path: Path) -> None:
    def gate(config: object) -> None:
        if config.training.optimizer.learning_rate > 1e-3:  # type: ignore[attr-defined]
            raise RequestError("causality: broken")

    searcher = searcher_of(tmp_path / "r.jsonl", [LOSS], 10, gate=gate, halving=False)
    play(searcher, draw, 100, faults=False)
    ran, refused = searcher.record.trials(), [e for e in searcher.record.entries.values() if not e.ran]
    assert len(ran) == 10
    assert all(e.params[RATE] <= 1e-3 and e.state == COMPLETE for e in ran)
    assert all(e.reason == "causality: broken" for e in refused)
    told = [t for t in searcher.studies.studies[None].trials if t.constraints]
    assert [t.constraints for t in told] == [{"valid": 1.0}] * len(refused)


def test_an_objective_that_is_not_finite_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path / "r.jsonl", [LOSS], 2, halving=False)
    for tune_id, value in (("0", math.nan), ("1", math.inf)):
        proposal = start(searcher, tune_id)
        assert proposal is not None
        searcher.on_trial_complete(tune_id, result_at(proposal["settings"], 90, None) | {"held_out_loss": value})
        entry = searcher.record.entries[proposal["trial_id"]]
        assert entry.state == FAIL
        assert f"held_out_loss = {value}" in entry.reason


def test_the_best_are_trained_again_with_other_seeds_once(draw: Draw, tmp_path: Path) -> None:
    path, config = tmp_path / "r.jsonl", ConfirmConfig(best=2, seeds=3)

    def make() -> object:
        searcher = searcher_of(path, [LOSS, FRACTION], 12)
        searcher.confirmations = lambda: confirmations(config, searcher.aims, searcher.record.entries, 5)
        return searcher

    while not (searcher := make()).finished:  # type: ignore[attr-defined]
        play(searcher, draw, 7, faults=False)  # type: ignore[arg-type]
    record = Record(path)
    repeats = [e for e in record.trials() if e.confirms is not None]
    best = front(searcher.aims, record.entries)  # type: ignore[attr-defined]
    assert len(repeats) == 3 * min(2, len(best))
    assert {e.confirms for e in repeats} == set(best[:2])
    assert {e.settings["seed"] for e in repeats} == {6, 7, 8}
    assert all(
        e.state == COMPLETE and e.settings[RATE] == record.entries[str(e.confirms)].params[RATE] for e in repeats
    )
    assert len(record.trials()) == 12 + len(repeats)


def test_a_spent_budget_stops_what_runs_and_more_of_it_goes_on(draw: Draw, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    spent = ""
    searcher = searcher_of(path, [LOSS], 20, halving=False, spent=lambda: spent)
    proposal = start(searcher, "0")
    assert proposal is not None
    spent = "budget.gpu_hours = 1 is spent"
    assert searcher.halts()
    searcher.on_trial_complete("0", result_at(proposal["settings"], 20, None))
    assert searcher.suggest("1") == Searcher.FINISHED
    assert searcher.record.entries[proposal["trial_id"]].state == RUNNING
    again = searcher_of(path, [LOSS], 20, halving=False)
    assert again.suggest("0") == proposal


def test_a_sweep_that_ends_early_starts_nothing_and_lets_its_trials_save(tmp_path: Path) -> None:
    asked: list[str] = []
    path = tmp_path / "r.jsonl"
    searcher = searcher_of(path, [LOSS], 20, halving=False, max_failures=1, stop_trials=lambda: asked.append("stop"))
    proposals = [start(searcher, str(i)) for i in range(3)]
    searcher.on_trial_complete("2", error=True)  # waits to be started again
    assert not searcher.cuts_off()
    assert not asked
    searcher.interrupted = True
    assert searcher.suggest("3") is None
    searcher.on_trial_complete("0", {})  # it has saved, and says nothing more
    assert not searcher.cuts_off()  # one still saves
    searcher.on_trial_complete("1", result_at(proposals[1]["settings"], 90, None))  # type: ignore[index]
    assert searcher.suggest("4") == Searcher.FINISHED
    assert searcher.cuts_off()
    assert not searcher.overdue
    assert asked == ["stop"]
    states = [searcher.record.entries[p["trial_id"]].state for p in proposals if p is not None]
    assert states == [RUNNING, COMPLETE, RUNNING]
    again = searcher_of(path, [LOSS], 20, halving=False)
    assert [start(again, "0"), start(again, "1")] == [proposals[0], proposals[2]]


def test_trials_that_do_not_save_in_time_are_cut_off(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path / "r.jsonl", [LOSS], 2, halving=False, grace=0.0)
    proposal = start(searcher, "0")
    assert proposal is not None
    searcher.interrupted = True
    assert searcher.cuts_off()
    assert searcher.overdue
    searcher.on_trial_complete("0", {})
    assert searcher.record.entries[proposal["trial_id"]].state == RUNNING


@pytest.mark.parametrize("how", ["reported", "found when the process died"])
def test_a_disk_that_is_full_ends_the_sweep_and_no_trial(tmp_path: Path, how: str) -> None:
    def full() -> None:
        raise InfrastructureError("/runs cannot be written to (No space left on device)")

    asked: list[str] = []
    path = tmp_path / "r.jsonl"
    searcher = searcher_of(
        path, [LOSS], 20, halving=False, stop_trials=lambda: asked.append("stop"), check_storage=full
    )
    proposals = [start(searcher, str(i)) for i in range(2)]
    if how == "reported":
        searcher.on_trial_complete("0", {"infrastructure": "trial: No space left on device"})
    else:
        searcher.on_trial_complete("0", error=True)
    assert "No space left on device" in searcher.broken
    assert searcher.suggest("2") is None
    searcher.on_trial_complete("1", error=True)
    assert asked == ["stop"]
    assert searcher.cuts_off()
    assert {searcher.record.entries[p["trial_id"]].state for p in proposals if p is not None} == {RUNNING}
    again = searcher_of(path, [LOSS], 20, halving=False)
    assert [start(again, "0"), start(again, "1")] == proposals


def test_the_death_of_its_node_is_not_counted_against_a_trial(tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path / "r.jsonl", [LOSS], 1, halving=False, max_failures=1)
    proposal = start(searcher, "0")
    assert proposal is not None
    for i in range(5):
        searcher.lost_node(str(i))
        searcher.on_trial_complete(str(i), error=True)
        assert start(searcher, str(i + 1)) == proposal
    searcher.on_trial_complete("5", error=True)
    assert start(searcher, "6") == proposal
    searcher.on_trial_complete("6", error=True)
    assert searcher.record.entries[proposal["trial_id"]].reason == "its process died 2 times"


def test_proposals_are_plain_data(draw: Draw, tmp_path: Path) -> None:
    searcher = searcher_of(tmp_path / "r.jsonl", [LOSS])
    for i in range(5):
        proposal = searcher.suggest(str(i))
        assert json.loads(json.dumps(proposal)) == proposal
