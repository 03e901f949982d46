"""A path of another kind than a command takes is refused with what it is, and what takes it."""

import json
from pathlib import Path

import pytest

from ray_jobs.cli import main
from tests.ray_jobs.commands import refused


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder such as people work in."""
    monkeypatch.chdir(tmp_path)
    for folder in ("configs/train", "configs/sweep", "runs/sweeps/big", "runs/train/tiny/step-00000010", "texts"):
        (tmp_path / folder).mkdir(parents=True)
    step = tmp_path / "runs/train/tiny/step-00000010"
    (step / "checkpoint.json").write_text(json.dumps({"format": 1, "step": 10}))
    (step / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0" + b"{}" * 8)
    (step / "config.yaml").write_text("name: tiny\nmodel: {num_layers: 2}\n")
    (tmp_path / "runs/sweeps/big/sweep.yaml").write_text("name: big\nspace: {}\n")
    (tmp_path / "runs/sweeps/big/record.jsonl").write_text('{"event": "life"}\n{"event": "life"}\n')
    (tmp_path / "runs/mlflow.db").write_bytes(b"SQLite format 3\0" + bytes(100))
    (tmp_path / "configs/train/tiny.yaml").write_text("model: {num_layers: 2}\n")
    (tmp_path / "configs/sweep/wide.yaml").write_text("space: {}\nnum_samples: 3\n")
    (tmp_path / "my run.yaml").write_text("training: {batch_size: 2}\n")
    (tmp_path / "cluster.yaml").write_text("cluster_name: x\nprovider: {type: aws}\n")
    (tmp_path / "texts/a.txt").write_text("hello\n")
    (tmp_path / "texts/notepad.yaml").write_text("model: {}\n", encoding="utf-16")
    return tmp_path


WRONG = [
    ("train configs/train/tinny.yaml", "no such configuration file; did you mean 'configs/train/tiny.yaml'?"),
    ("train configs/train/tiny", "no such configuration file; did you mean 'configs/train/tiny.yaml'?"),
    ("train configs/train/tiny.yml", "no such configuration file; did you mean 'configs/train/tiny.yaml'?"),
    ("train tiny.yaml", "no such configuration file; did you mean 'configs/train/tiny.yaml'?"),
    ("sweep wide", "no such configuration file; did you mean 'configs/sweep/wide.yaml'?"),
    ("sweep big", "to continue the sweep of this name: gsa sweep --resume big"),
    ("train name=x configs/train/tiny.yaml", "CONFIG comes before the settings"),
    ("train configs/train", "is a folder, not a configuration file; it has configs/train/tiny.yaml"),
    ("train runs", "a storage folder, with checkpoints in runs/train/tiny"),
    ("train runs/train/tiny", "but a checkpoint; to measure it: gsa eval runs/train/tiny"),
    ("sweep runs/train/tiny/step-00000010", "but a checkpoint; to measure it: gsa eval runs/train/tiny/step-00000010"),
    ("sweep runs/sweeps/big", "but the folder of a sweep; to see its trials: gsa report big"),
    ("sweep runs/train/tiny/step-00000010/model.safetensors", "is binary, not a configuration file; it belongs to a"),
    ("train runs/mlflow.db", "is MLflow's database, not a configuration file"),
    ("train runs/sweeps/big/record.jsonl", "holds JSON lines, not a configuration"),
    ("train configs/sweep/wide.yaml", "is a sweep's configuration, not a training configuration; it is for: gsa sweep"),
    ("sweep configs/train/tiny.yaml", "is a training configuration, not a sweep's configuration; it is for: gsa train"),
    ("submit configs/train/tiny.yaml", "it is for: gsa train configs/train/tiny.yaml"),
    ("sweep my\0run.yaml", "it is for: gsa train 'my run.yaml'"),
    (
        "sweep cluster.yaml",
        "is a cluster's file, not a sweep's configuration; it is for: gsa doctor --cluster cluster.y",
    ),
    ("doctor --cluster configs/sweep/wide.yaml", "is a sweep's configuration, not a cluster's file"),
    ("doctor --cluster cluster.yaml --sweep configs/train/tiny.yaml", "is a training configuration, not a sweep's"),
    ("train texts/notepad.yaml", "is text in UTF-16; save it as UTF-8"),
    ("train texts/a.txt", "must hold a mapping of settings, not 'hello'"),
    ("eval tiny", "is not a checkpoint; did you mean 'runs/train/tiny'?"),
    ("eval runs", "a storage folder, with checkpoints in runs/train/tiny"),
    ("eval runs/sweeps/big", "but the folder of a sweep; to see its trials: gsa report big"),
    ("eval runs/train/tiny/step-00000010/model.safetensors", "but a file; it belongs to a checkpoint"),
    ("eval configs/train/tiny.yaml", "but a file; give its folder, a run id or runs:/RUN_ID"),
    ("propose texts", "is not a checkpoint; it has texts/notepad.yaml"),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG)
def test_what_a_path_is_and_what_takes_it_is_said(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    before = sorted(place.rglob("*"))
    assert words in refused(capsys, *(word.replace("\0", " ") for word in arguments.split(" ")))
    assert sorted(place.rglob("*")) == before


def test_a_file_of_the_right_kind_is_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no setting" in refused(capsys, "train", "my run.yaml", "data.corpus.colour=red").replace("such ", "")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--cluster", "cluster.yaml"])
    assert ended.value.code == 1  # read, and wrong in what it says
