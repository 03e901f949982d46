"""A run goes on with the text that it began with, or not at all."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from gsa.config import TrainConfig, build
from gsa.data.packing import prepare
from gsa.errors import InfrastructureError, RequestError
from ray_jobs.text import prepare_same
from tests.draw import Draw
from tests.text import tiny


@pytest.fixture
def config(draw: Draw, tmp_path: Path) -> TrainConfig:
    return build(TrainConfig, tiny(tmp_path, draw.random.randrange(1000)))


def begun(config: TrainConfig, folder: Path) -> Path:
    """A run that has begun on the text as it is now."""
    fingerprint = prepare(config.data, Path(config.storage) / "data").fingerprint
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"fingerprint": fingerprint}))
    return folder


def test_the_same_text_goes_on_and_runs_that_have_not_begun_say_nothing(config: TrainConfig, tmp_path: Path) -> None:
    run = begun(config, tmp_path / "run")
    assert prepare_same(config, [tmp_path / "new", run], ["gsa"]).fingerprint
    with Path(config.data.corpus.files[0]).open("a") as file:
        file.write("x\n")
    assert prepare_same(config, [tmp_path / "new"], ["gsa"]).fingerprint


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_other_text_is_refused_and_the_tokenized_copy_is_offered(config: TrainConfig, tmp_path: Path, how: str) -> None:
    run, file = begun(config, tmp_path / "a run"), Path(config.data.corpus.files[0])
    expected = prepare(config.data, Path(config.storage) / "data").fingerprint
    if how == "changed":
        file.write_text("other\n" * 50)
    else:
        file.unlink()
    with pytest.raises(RequestError, match={"changed": "has changed since", "gone": "no such file"}[how]) as refused:
        prepare_same(config, [run], ["gsa", "train", "a b.yaml"])
    *command, override = shlex.split(str(refused.value).rpartition("began with: ")[2])
    assert command == ["gsa", "train", "a b.yaml"]
    key, _, copy = override.partition("=")
    assert key == "data.prepared"
    pinned = dataclasses.replace(config, data=dataclasses.replace(config.data, prepared=copy))
    assert prepare_same(pinned, [run], ["gsa"]).fingerprint == expected


def test_where_no_copy_is_left_none_is_offered(config: TrainConfig, tmp_path: Path) -> None:
    run = begun(config, tmp_path / "run")
    for part in sorted((Path(config.storage) / "data").rglob("*"), reverse=True):
        part.rmdir() if part.is_dir() else part.unlink()
    Path(config.data.corpus.files[0]).write_text("other\n" * 50)
    with pytest.raises(RequestError) as refused:
        prepare_same(config, [run], ["gsa"], "train.")
    assert str(refused.value).startswith("train.data.corpus.source = 'text': the text has changed since")
    assert "to go on" not in str(refused.value)


def test_a_cache_that_cannot_be_written_is_the_fault_of_the_disk(config: TrainConfig) -> None:
    Path(config.storage).mkdir(exist_ok=True)
    (Path(config.storage) / "data").write_text("a file where the folder should be")
    with pytest.raises(InfrastructureError, match="cannot be tokenized into"):
        prepare_same(config, [], ["gsa"])
