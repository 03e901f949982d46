"""An earlier sweep's trials in a new one: those that are points of its space, with what they had reached."""

from pathlib import Path
from typing import Any

import pytest

from gsa.config import build
from gsa.errors import RequestError
from ray_jobs.objectives import Aims, ObjectiveConfig
from ray_jobs.record import COMPLETE, PAUSED
from ray_jobs.reporting.study import read_space
from ray_jobs.space import Space
from ray_jobs.sweep import SweepConfig
from ray_jobs.warm_start import matching
from tests.draw import Draw
from tests.ray_jobs.fake_sweep import BITS, KIND, SPACE, STEPS, aims, fake_sweep
from tests.ray_jobs.play import BASE, LOSS, searcher_of

AIMS = Aims([ObjectiveConfig(BITS)])
ENDS = ["finished"] * 6 + ["stopped_early"] * 3 + ["failed", "running"]


@pytest.mark.slow
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


@pytest.mark.slow
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


DEEP = "x: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"y{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.slow
def test_what_a_shared_store_holds_is_read_as_plain_data_of_bounded_size(draw: Draw, tmp_path: Path) -> None:
    """By a warm start and by a report alike; what is wrong is said in one line that names the run."""
    tracking = fake_sweep(tmp_path, draw, ["finished"] * 2, aims(BITS))
    (parent,) = [run for run in tracking.client.search_runs([tracking.experiment_id]) if run.info.run_name == "fake"]
    run_id, (child, *_) = parent.info.run_id, tracking.children(parent.info.run_id)
    text = tracking.read_text(run_id, "config.yaml")
    for content, words in (
        ("", "it holds nothing, not settings"),
        ("- 1", "it holds a list, not settings"),
        ("space: {}", "its 'train' is nothing, not a mapping"),
        ("train: [1]", "its 'train' is a list, not a mapping"),
        ("train: 3\nspace: {}", "its 'train' is 3, not a mapping"),
        ("train: {}\nspace: [1]", "its 'space' is a list, not a mapping"),
        (DEEP + "train: {}", "aliases stand for more than"),
        ("train: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: 1\na: 2", "is in line 1 and again in line 2"),
        ("#" * 2**20 + "\n", "at most 1048576 are read"),
    ):
        tracking.log_text(run_id, content, "config.yaml")
        for read in (
            lambda: matching(tracking, "fake", Space(SPACE, BASE), AIMS),
            lambda: read_space(tracking, run_id),
        ):
            with pytest.raises(RequestError) as refused:
                read()
            assert words in str(refused.value)
            assert str(refused.value).startswith(f"run {run_id}: its config.yaml")
            assert "\n" not in str(refused.value)
    tracking.log_text(run_id, text.replace("name: train", "name: ${oc.env:HOME}"), "config.yaml")
    found = matching(tracking, "fake", Space(SPACE, BASE), AIMS)
    assert (len(found.entries), found.trials) == (0, 2)
    assert found.differing["name, which is no longer allowed"] == 2
    tracking.log_text(run_id, text, "config.yaml")
    kept = {d.key for d in read_space(tracking, run_id).dimensions}
    assert kept == {d.key for d in Space(SPACE, BASE).dimensions}
    for params, words in (("[", "gsa.params is '['"), ("[1]", "gsa.params is '[1]'")):
        tracking.client.set_tag(child.info.run_id, "gsa.params", params)
        found = matching(tracking, "fake", Space(SPACE, BASE), AIMS)
        assert len(found.entries) == 1
        assert words in found.summary("fake")


def test_choices_written_as_numbers_with_an_exponent_match(draw: Draw, tmp_path: Path) -> None:
    rate = "training.optimizer.learning_rate"
    narrow = {rate: {"type": "categorical", "choices": [1e-3, 3e-3]}}
    tracking = fake_sweep(tmp_path, draw, ["finished"] * 6, aims(BITS), space=narrow)
    written = build(SweepConfig, {}, [f"space={{{rate}: {{type: categorical, choices: [1e-3, 3E-3]}}}}"])
    assert len(matching(tracking, "fake", Space(written.space, BASE), AIMS).entries) == 6


@pytest.mark.slow
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
