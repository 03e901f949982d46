"""What MLflow bounds: each bound is kept, held against MLflow's own checks and a real store."""

import json
from typing import Any

import pytest
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.service_pb2 import LogBatch
from mlflow.utils import validation
from mlflow.utils.proto_json_utils import message_to_json

from gsa.config import TrainConfig, build
from gsa.errors import ConfigError, RequestError
from gsa.spool import Row
from gsa.tracking import Tracking, read_json, tags_of
from gsa.tracking.limits import batches, dataset_fields, entity_name, join_tags, shown, split_tags
from tests.draw import Draw
from tests.mlflow_store import new_tracking


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    return new_tracking(tmp_path_factory.mktemp("store"))


def new_run(tracking: Tracking, key: str, **tags: str) -> str:
    return tracking.create_run(key, key, None, tags)


@pytest.mark.parametrize("beyond", [0, 1, 50_000])
def test_a_parameter_is_cut_beyond_the_bound_and_says_how_long_it_was(tracking: Tracking, beyond: int) -> None:
    length = validation.MAX_PARAM_VAL_LENGTH + beyond
    run_id = new_run(tracking, f"param{beyond}")
    tracking.describe(run_id, {"data.corpus.files": "é" * length}, "")
    tracking.describe(run_id, {"data.corpus.files": "é" * length}, "")  # the same again
    held = tracking.client.get_run(run_id).data.params["data.corpus.files"]
    assert len(held) == validation.MAX_PARAM_VAL_LENGTH
    assert (held == "é" * length) == (not beyond)
    assert (f"… ({length} characters, SHA-256 " in held) == bool(beyond)


def test_a_parameter_that_an_earlier_version_cut_is_the_same(tracking: Tracking) -> None:
    run_id = new_run(tracking, "earlier")
    tracking.client.log_param(run_id, "k", "x" * 6000)
    tracking.describe(run_id, {"k": "x" * 7000}, "")


def test_a_parameter_that_differs_is_named_before_anything_is_recorded(tracking: Tracking) -> None:
    run_id = new_run(tracking, "differs")
    tracking.describe(run_id, {"model.layers[0].k": 3, "seed": 0}, "a: 1")
    with pytest.raises(RequestError, match=r"^model.layers\[0\].k = '4': run 'differs' .* was begun with '3'"):
        tracking.describe(run_id, {"new": 1, "model.layers[0].k": 4}, "a: 2")
    assert tracking.client.get_run(run_id).data.params == {"model.layers.0.k": "3", "seed": "0"}
    assert tracking.read_text(run_id, "config.yaml") == "a: 1"


@pytest.mark.parametrize("length", [8000, 8001, 16_000, 400_000])
def test_a_tag_that_is_read_back_is_whole_however_long(tracking: Tracking, length: int) -> None:
    value = {"k": "x" * (length - len(json.dumps({"k": ""})))}
    run_id = new_run(tracking, f"tag{length}", **{"gsa.params": json.dumps(value), "other": "y" * length})
    run = tracking.client.get_run(run_id)
    assert all(len(held) <= validation.MAX_TAG_VAL_LENGTH for held in run.data.tags.values())
    assert len(json.dumps(value)) == length
    assert read_json(run, "gsa.params", dict) == value
    assert set(tags_of(run)) >= {"gsa.params", "other"}
    tracking.set_tags(run_id, {"gsa.params": "{}"})
    assert read_json(tracking.client.get_run(run_id), "gsa.params", dict) == {}


def test_tags_come_back_as_they_were_given(draw: Draw) -> None:
    lengths = [draw.random.choice((0, 1, 7999, 8000, 8001, 30_000)) for _ in range(5)]
    tags = {f"gsa.t{i}": "ab" * (n // 2) + "a" * (n % 2) for i, n in enumerate(lengths)}
    assert join_tags(split_tags(tags)) == tags


@pytest.mark.parametrize("text", ["\0", "\udcff", "é\0" * 9000])
def test_what_no_database_stores_is_written_out(tracking: Tracking, text: str) -> None:
    found = shown(text, 6000)
    assert "\0" not in found
    found.encode()
    run_id = new_run(tracking, f"odd{len(text)}{text[:1].encode('unicode_escape').decode()}")
    tracking.finish(run_id, "failed", text)
    assert tracking.client.get_run(run_id).data.tags["gsa.reason"] == found


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model.layers[2].k", "model.layers.2.k"),
        ("layer_0/k_mean", "layer_0/k_mean"),
        ("a*b{c}", "a_b_c_"),
        ("..", "_.."),
        ("/a//b", "__a__b"),
        ("x" * 250, "x" * 250),
    ],
)
def test_a_name_is_one_that_mlflow_takes(key: str, name: str) -> None:
    assert entity_name(key) == name
    validation._validate_param(name, "")
    validation._validate_metric(name, 1.0, 0, 0)


def test_long_names_stay_different() -> None:
    a, b = (entity_name("x" * 250 + end) for end in "ab")
    assert a != b
    assert len(a) == len(b) == validation.MAX_ENTITY_KEY_LENGTH


def test_every_request_is_within_mlflows_bounds_and_tags_come_last(draw: Draw) -> None:
    random = draw.random
    metrics = [Metric("m" * random.choice((2, 250)), random.random() * 1e300, 2**40, i) for i in range(2500)]
    params = [Param(f"p{i}", random.choice("aé") * random.choice((1, 6000))) for i in range(230)]
    tags = [RunTag(f"t{i}", "é" * random.choice((1, 8000))) for i in range(120)]
    found = batches(metrics, params, tags)
    for batch in found:
        validation._validate_batch_log_limits(*batch)
        request = LogBatch(
            run_id="0" * 32,
            metrics=[m.to_proto() for m in batch.metrics],
            params=[p.to_proto() for p in batch.params],
            tags=[t.to_proto() for t in batch.tags],
        )
        validation._validate_batch_log_api_req(message_to_json(request))
    assert [m for batch in found for m in batch.metrics] == metrics
    assert [p for batch in found for p in batch.params] == params
    assert [t for batch in found for t in batch.tags] == tags


@pytest.mark.parametrize(("metrics", "tags", "requests"), [(998, 2, 1), (999, 2, 2), (1000, 0, 1), (1001, 0, 2)])
def test_entries_go_in_as_few_requests_as_there_can_be(metrics: int, tags: int, requests: int) -> None:
    found = batches([Metric("m", 1.0, 0, i) for i in range(metrics)], tags=[RunTag(f"t{i}", "") for i in range(tags)])
    assert len(found) == requests


def test_a_thousand_values_and_the_state_come_through(tracking: Tracking) -> None:
    run_id = new_run(tracking, "thousand")
    values = {f"m{i}": 1.0 for i in range(998)} | {"inf": float("inf"), "nan": float("nan"), "true": True}
    tracking.finish(run_id, "finished", told=3, rows=[Row(0, 1, 7, values)])
    run = tracking.client.get_run(run_id)
    assert (len(run.data.metrics), run.data.tags["gsa.told"], run.info.status) == (1000, "3", "FINISHED")


def corpus(files: list[str]) -> dict[str, Any]:
    return {"source": "text", "files": files, "name": None}


def test_the_source_of_a_dataset_of_many_files_says_how_many_and_the_first(tracking: Tracking) -> None:
    files = [f"/data/{i:04d}-{'x' * 100}.txt" for i in range(700)]
    run_id = new_run(tracking, "files")
    tracking.describe_data(run_id, corpus(files), "f" * 64)
    inputs = tracking.client.get_run(run_id).inputs
    assert inputs is not None
    (found,) = [i.dataset for i in inputs.dataset_inputs]
    source = json.loads(found.source)
    assert source["files"]["count"] == 700
    assert source["files"]["first"] == files[:5]
    assert (found.name, found.digest) == ("text", "f" * 36)
    other = json.loads(dataset_fields(corpus([*files[:-1], "/data/other.txt"]), "f")["source"])
    assert other["files"]["sha256"] != source["files"]["sha256"]


def test_a_source_is_whole_up_to_the_bound(tracking: Tracking) -> None:
    rest = len(json.dumps(corpus([""])))
    whole = corpus(["x" * (validation.MAX_DATASET_SOURCE_SIZE - rest)])
    tracking.describe_data(new_run(tracking, "whole"), whole, "f")
    assert json.loads(dataset_fields(whole, "f")["source"]) == whole
    beyond = corpus(["x" * (validation.MAX_DATASET_SOURCE_SIZE - rest + 1)])
    tracking.describe_data(new_run(tracking, "beyond"), beyond, "f")
    assert json.loads(dataset_fields(beyond, "f")["source"])["files"]["count"] == 1


def test_an_experiments_name_is_bounded() -> None:
    assert build(TrainConfig, {"tracking": {"experiment": "e" * 256}}).tracking.experiment == "e" * 256
    for name in ("", "e" * 257, "a\nb"):
        with pytest.raises(ConfigError, match=r"^tracking\.experiment = .*must be 1 to 256 printable characters"):
            build(TrainConfig, {"tracking": {"experiment": name}})
    with pytest.raises(MlflowException):  # MLflow's own bound is no less
        validation._validate_experiment_name("e" * 501)
