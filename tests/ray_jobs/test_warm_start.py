"""An earlier sweep's trials in a new one: those that are points of its space, with what they had reached."""

from pathlib import Path
from typing import Any

import pytest

from gsa.errors import RequestError
from ray_jobs.objectives import Aims, ObjectiveConfig
from ray_jobs.record import COMPLETE, PAUSED
from ray_jobs.space import Space
from ray_jobs.warm_start import matching
from tests.draw import Draw
from tests.ray_jobs.fake_sweep import BITS, KIND, SPACE, STEPS, aims, fake_sweep
from tests.ray_jobs.play import BASE, LOSS, searcher_of

AIMS = Aims([ObjectiveConfig(BITS)])
ENDS = ["finished"] * 6 + ["stopped_early"] * 3 + ["failed", "running"]


def test_every_trial_with_results_is_a_point_of_the_same_space(draw: Draw, tmp_path: Path) -> None:
    tracking = fake_sweep(tmp_path, draw, ENDS, aims(BITS), confirm=2)
    found = matching(tracking, "fake", Space(SPACE, BASE), AIMS)
    assert (len(found.entries), found.trials, found.gone) == (9, 9, [])
    for entry in found.entries:
        whole = entry.state == COMPLETE
        assert entry.state in (COMPLETE, PAUSED)
        assert sorted(entry.steps) == list(STEPS if whole else STEPS[:2])
        assert entry.values == ([entry.steps[STEPS[-1]][BITS]] if whole else None)
        assert entry.imported
        assert not entry.searched
    assert "9 of 9 trials of fake are taken over" in found.summary("fake")


def test_only_trials_inside_the_new_space_match_and_reasons_are_named(draw: Draw, tmp_path: Path) -> None:
    tracking = fake_sweep(tmp_path, draw, ["finished"] * 12, aims(BITS))
    narrow: dict[str, Any] = SPACE | {"training.optimizer.learning_rate": {"type": "float", "low": 1e-3, "high": 4e-3}}
    found = matching(tracking, "fake", Space(narrow, BASE), AIMS)
    rates = [entry.params["training.optimizer.learning_rate"] for entry in found.entries]
    assert all(rate <= 4e-3 for rate in rates)
    assert found.differing["training.optimizer.learning_rate"] == 12 - len(rates)
    fewer = {key: value for key, value in SPACE.items() if key != "model.layers[*].k"}
    found = matching(tracking, "fake", Space(fewer, BASE), AIMS)
    assert not found.entries  # layers had numbers of their own, the new base has none
    assert sum(found.differing.values()) == 12
    more = SPACE | {"seed": {"type": "int", "low": 0, "high": 3}}
    assert len(matching(tracking, "fake", Space(more, BASE), AIMS).entries) == 12  # all were trained with seed 0
    other = Aims([ObjectiveConfig("attention_latency_ms")])
    found = matching(tracking, "fake", Space(SPACE, BASE), other)
    assert not found.entries
    assert "did not measure" in next(iter(found.differing))


def test_keys_that_no_longer_exist_are_named(draw: Draw, tmp_path: Path) -> None:
    tracking = fake_sweep(tmp_path, draw, ["finished"] * 2, aims(BITS))
    (parent,) = [run for run in tracking.client.search_runs([tracking.experiment_id]) if run.info.run_name == "fake"]
    text = tracking.read_text(parent.info.run_id, "config.yaml").replace("batch_size:", "batchsize:", 1)
    tracking.log_text(parent.info.run_id, text, "config.yaml")
    found = matching(tracking, "fake", Space(SPACE, BASE), AIMS)
    assert len(found.gone) == 1
    assert found.gone[0].endswith("batchsize")
    assert found.gone[0] in found.summary("fake")


def test_a_sweep_that_is_not_there_is_refused_with_the_nearest(draw: Draw, tmp_path: Path) -> None:
    tracking = fake_sweep(tmp_path, draw, ["finished"], aims(BITS))
    with pytest.raises(RequestError, match="warm_start = 'fakes'.*did you mean 'fake'"):
        matching(tracking, "fakes", Space(SPACE, BASE), AIMS)


def test_imported_trials_teach_the_search_and_never_run(draw: Draw, tmp_path: Path) -> None:
    tracking = fake_sweep(tmp_path / "old", draw, ["finished"] * 10, aims("held_out_loss"))
    space = {KIND: SPACE[KIND], "model.attention.controller.ratio": SPACE["model.attention.controller.ratio"]} | SPACE
    found = matching(tracking, "fake", Space(space, BASE), Aims([LOSS]))
    searcher = searcher_of(tmp_path / "r.jsonl", [LOSS], 3, space=space, halving=False)
    for entry in found.entries:
        searcher.record.propose(entry)
    again = searcher_of(tmp_path / "r.jsonl", [LOSS], 3, space=space, halving=False)
    for one in (searcher, again):
        assert len(one.studies.studies[None].trials) == 10
    proposals = [again.suggest(str(i)) for i in range(3)]
    assert not {p["trial_id"] for p in proposals} & {entry.trial_id for entry in found.entries}
    assert again.suggest("3") is None
