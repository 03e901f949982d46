"""A wrong request gives one line with key, value and what is allowed, exit code 2, and starts nothing."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ray_jobs.commands import call, refused
from tests.ray_jobs.small import SPACE
from tests.text import tiny


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(tiny(tmp_path)))
    sweep = {"train": tiny(tmp_path), "space": SPACE, "num_samples": 2, "scheduler": {"kind": "none"}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return tmp_path


@pytest.fixture(autouse=True)
def joined(request: pytest.FixtureRequest) -> None:
    """What comes as far as Ray joins the cluster that tests share."""
    if request.node.get_closest_marker("ray") is not None:
        request.getfixturevalue("cluster")


def started(folder: Path) -> list[str]:
    """What a run leaves: checkpoints, records, runs in MLflow."""
    return [p.name for pattern in ("step-*", "record.jsonl", "sweep.yaml") for p in (folder / "runs").rglob(pattern)]


JOINS = (pytest.mark.ray, pytest.mark.xdist_group("cluster"))
SETTINGS = [
    ("model.num_layer=3", "did you mean 'num_layers'"),
    ("training.optimizer.learning_rate=0", "must be > 0"),
    ("model.attention.controller.k_min=50", "k_min = 50: must be <= "),
    ("model.attention.num_heads=3 model.attention.num_kv_heads=2", "must divide num_heads = 3"),
    ("model.attention.gates.places=[G6]", "must be one of G1, G2, G3, G4, G5"),
    ("data.corpus.files=[nowhere.txt]", "nowhere.txt"),
    ("data.context_length=100000", "has only"),
    pytest.param("workers.num_workers=9", "can never be scheduled: the cluster holds ", marks=JOINS),
    pytest.param("workers.cpus_per_worker=999", "can never be scheduled", marks=JOINS),
    pytest.param("workers.gpus_per_worker=99", "can never be scheduled", marks=JOINS),
    ("tracking.uri=http://127.0.0.1:1", "no MLflow server answers there"),
    ("tracking.uri=mysql://x", "must be sqlite:///PATH"),
    ("tracking.uri=sqlite:////proc/nowhere/mlflow.db", "tracking.uri"),
    ("storage=/proc/nowhere", "/proc/nowhere"),
]


@pytest.mark.parametrize(("override", "words"), SETTINGS)
def test_a_wrong_setting_of_a_training_run(
    files: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    assert words in refused(capsys, "train", str(files / "train.yaml"), *override.split())
    assert not started(files)


@pytest.mark.parametrize(("override", "words"), SETTINGS)
def test_a_wrong_setting_of_a_sweep(files: Path, capsys: pytest.CaptureFixture[str], override: str, words: str) -> None:
    overrides = [f"train.{part}" for part in override.split()]
    assert words in refused(capsys, "sweep", str(files / "sweep.yaml"), *overrides)
    assert not started(files)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("num_sample=3", "did you mean 'num_samples'"),
        ("num_samples=0", "must be >= 1"),
        ("name=a/b", "name = 'a/b'"),
        ("name=..", "name = '..'"),
        ("objectives=[{metric: held_out_los}]", "did you mean 'held_out_loss'"),
        ("objectives=[]", "at least one metric"),
        ("objectives=[{metric: held_out_loss},{metric: held_out_loss}]", "is named twice"),
        ("scheduler={kind: halving, grace_period: 9999}", "must be <= a trial's 12 steps"),
        ("scheduler.kind=hyperband", "must be one of halving, none"),
        ("searcher.sampler=tpes", "did you mean 'tpe'"),
        ("space={}", "at least one setting"),
        ("space={model.num_layrs: {type: int, low: 1, high: 2}}", "did you mean"),
        ("space={model.attention.controller.k: {type: int, low: 0, high: 2}}", "must be >= 1"),
    ],
)
def test_a_wrong_sweep(files: Path, capsys: pytest.CaptureFixture[str], override: str, words: str) -> None:
    assert words in refused(capsys, "sweep", str(files / "sweep.yaml"), override)
    assert not started(files)


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (b"a\0b", "binary"), (b"a\n\xff\n", "line 2")])
def test_wrong_text(files: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str) -> None:
    (files / "bad.txt").write_bytes(content)
    for command, prefix in (("train", ""), ("sweep", "train.")):
        override = f"{prefix}data.corpus.files=[{files}/bad.txt, {files}/text/0.txt]"
        # among a glob's, an empty file alone is no reason
        among = f"{prefix}data.corpus.files=['{files}/*.txt', '{files}/text/*.txt']"
        rule = f"{prefix}data.corpus.on_bad_document={'skip' if content else 'fail'}"
        for overrides in ([override], [among, rule]):
            line = refused(capsys, command, str(files / f"{command}.yaml"), *overrides)
            assert words in line
            assert "bad.txt" in line
    assert not started(files)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["sweep", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["sweep"], "either a CONFIG to start, or --resume NAME"),
        (["sweep", "--resume", "nothing"], "'nothing'"),
        (["sweep", "--resume", "../up"], "name = '../up'"),
        (["report", "nothing"], "no runs are stored there"),
        (["eval", "nothing"], "nothing: is not a checkpoint"),
        (["eval", "0" * 32], "no runs are stored there"),
        (["ui"], "no runs are stored there"),
    ],
)
def test_nothing_of_that_name(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def not_mlflow() -> Iterator[str]:
    """A web server that knows nothing of MLflow."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_a_server_that_is_not_mlflow(files: Path, capsys: pytest.CaptureFixture[str], not_mlflow: str) -> None:
    assert "tracking.uri" in refused(capsys, "train", str(files / "train.yaml"), f"tracking.uri={not_mlflow}")


def test_an_unknown_command_and_an_unknown_option_are_wrong_requests(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["trian"], ["sweep", "--resum", "x"], ["ui", "--port", "0"]):
        assert call(capsys, *arguments)[0] == 2


def test_every_command_explains_itself_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "sweep", "report", "eval", "ui", "doctor"):
        code, output, _ = call(capsys, command, "--help")
        assert code == 0
        assert f"gsa {command}" in output


def test_doctor_finds_this_machine_well_and_a_foreign_kernels_package_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output, _ = call(capsys, "doctor", "--storage", str(tmp_path))
    assert code == 0
    assert "torch" in output
    from ray_jobs import doctor

    foreign: Any = type(json)("kernels")
    foreign.__file__ = str(tmp_path / "site-packages/kernels/__init__.py")
    monkeypatch.setattr(doctor, "kernels", foreign)
    code, output, _ = call(capsys, "doctor", "--storage", str(tmp_path))
    assert code == 1
    assert "shadows ours" in " ".join(output.split())
