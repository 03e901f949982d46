"""A sweep goes on from files that somebody may have edited: what is wrong there is one line, and nothing changes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from gsa.config import to_yaml
from gsa.errors import RequestError
from ray_jobs.record import Record
from ray_jobs.saved import check_record, frozen
from ray_jobs.sweep import Sweep, load_sweep, resume_sweep
from tests.draw import Draw
from tests.ray_jobs.play import LOSS, RATE, SPACE, play, searcher_of
from tests.seeds import seed_of

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the tests


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """The folder of a sweep, and its files as a driver leaves them."""
    home = tmp_path_factory.mktemp("saved")
    path = home / "given.yaml"
    train = {"storage": str(home / "runs"), "training": {"optimizer": {"learning_rate": 0.001}}}
    scheduler = {"grace_period": 10, "reduction_factor": 3}  # as `searcher_of` has them
    given = {"name": "small", "train": train, "space": SPACE, "scheduler": scheduler, "dense_baseline": False}
    path.write_text(yaml.safe_dump(given))
    config = load_sweep(path)
    found = home / "runs/sweeps/small"
    found.mkdir(parents=True)
    (found / "sweep.yaml").write_text(to_yaml(config))
    record = Record(found / "record.jsonl")
    record.begin(frozen(config))
    play(searcher_of(record.path, [LOSS], samples=5), Draw(seed_of("saved")), 12, faults=False)
    return found, {file.name: file.read_bytes() for file in found.iterdir()}


@pytest.fixture
def folder(made: tuple[Path, dict[str, bytes]]) -> Path:
    folder, files = made
    shutil.rmtree(folder)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def snapshot(folder: Path) -> dict[Path, tuple[int, bytes]]:
    files = [path for path in folder.parents[1].rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def refusal(folder: Path) -> str:
    """What `gsa sweep --resume` says; it changes nothing."""
    before = snapshot(folder)
    with pytest.raises(RequestError) as refused:
        resume_sweep("small", str(folder.parents[1]), QUIET)
    assert snapshot(folder) == before
    assert "\n" not in str(refused.value)
    return str(refused.value)


def edit(number: int, change: Callable[[dict[str, Any]], None]) -> Callable[[list[bytes]], None]:
    def act(lines: list[bytes]) -> None:
        event = json.loads(lines[number])
        change(event)
        lines[number] = json.dumps(event).encode()

    return act


def line_of(kind: str) -> Callable[[list[bytes]], int]:
    return lambda lines: next(i for i, line in enumerate(lines) if json.loads(line)["event"] == kind)


# what is done to the lines, counted from 0, and what is said of the file from 1 on
DAMAGES: dict[str, tuple[Callable[[list[bytes]], Any], str]] = {
    "garbage": (lambda lines: lines.insert(3, b"\x00\xffgarbage"), "line 4: is not JSON"),
    "blank": (lambda lines: lines.insert(3, b""), "line 4: is blank"),
    "cut in the middle": (lambda lines: lines.__setitem__(3, lines[3][:30]), "line 4: is not JSON"),
    "cut at the end": (lambda lines: lines.__setitem__(-1, lines[-1][:-9]), "is not JSON"),
    "a list": (lambda lines: lines.__setitem__(2, b"[1]"), "line 3: must hold a JSON object, not list"),
    "nested": (lambda lines: lines.__setitem__(2, b"[" * 100_000), "line 3: is not JSON"),
    "unknown": (edit(2, lambda e: e.update(event="ended")), "line 3: event = 'ended': must be one of life, propose"),
    "no trial": (edit(2, lambda e: e.pop("trial_id")), "without trial_id"),
    "a number": (edit(2, lambda e: e.update(trial_id=7)), ".trial_id = 7: must be text"),
    "a field": (edit(1, lambda e: e.update(parms={})), "line 2: propose.parms: no such field"),
    "time": (edit(2, lambda e: e.update(time="now")), ".time = 'now': must be a number"),
    "stranger": (edit(2, lambda e: e.update(event="pause", trial_id="x")), "of trial 'x', which was never proposed"),
    "lost": (lambda lines: lines.pop(2), "line 3: was line 4 when it was written"),
    "lost first": (lambda lines: lines.pop(0), "line 1: was line 2 when it was written"),
    "doubled": (lambda lines: lines.insert(2, lines[2]), "line 4: was line 3 when it was written"),
    "moved": (lambda lines: lines.insert(2, lines.pop(4)), "line 3: was line 5 when it was written"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_record_is_refused_by_file_and_line(folder: Path, name: str) -> None:
    damage, expected = DAMAGES[name]
    path = folder / "record.jsonl"
    lines = path.read_bytes().splitlines()
    damage(lines)
    path.write_bytes(b"\n".join(lines) + b"\n")
    said = refusal(folder)
    assert said.startswith(f"{path}, line ")
    assert expected in said


def test_a_trial_that_has_ended_neither_runs_nor_ends_again(folder: Path) -> None:
    path = folder / "record.jsonl"
    lines = path.read_bytes().splitlines()
    end = json.loads(lines[line_of("end")(lines)])
    common = {"line": len(lines) + 1, "time": end["time"], "trial_id": end["trial_id"]}
    result = {"event": "result", "sequence": 9, "step": 99, "values": {}, "seconds": 1.0}
    for event in (result, {"event": "pause"}, {"event": "promote", "until": None}, end | {"line": len(lines) + 1}):
        path.write_bytes(b"\n".join([*lines, json.dumps(common | event).encode(), b""]))
        assert (
            f"line {len(lines) + 1}: {event['event']} of trial {end['trial_id']!r}, which is {end['state']}"
            in refusal(folder)
        )


def test_a_record_that_is_gone_while_its_trials_are_there_is_missed(folder: Path) -> None:
    (folder / "record.jsonl").unlink()
    (folder / "trials/00000-abc").mkdir(parents=True)
    assert refusal(folder).startswith(f"{folder / 'record.jsonl'}: is missing")


SETTINGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "learning rate": (
        lambda data: data["train"]["training"]["optimizer"].update(learning_rate=0.5),
        "train.training.optimizer.learning_rate = 0.5: was 0.001 when the sweep began, and cannot change; num_samples,",
    ),
    "space": (lambda data: data["space"][RATE].update(high=1.0), f"space.{RATE} = {{"),
    "a dimension less": (lambda data: data["space"].pop("model.attention.gates.places"), "space.model.attention.gates"),
    "seed": (lambda data: data.update(seed=9), "seed = 9: was 0 when the sweep began, and cannot change"),
    "objective": (lambda data: data["objectives"][0].update(mode="max"), "objectives[0].mode = 'max': was 'min'"),
    "deleted": (lambda data: data["train"].pop("data") and data["train"].update(seed=4), "train.seed = 4: was 0"),
    "scheduler": (
        lambda data: data["scheduler"].update(grace_period=20),
        "scheduler.grace_period = 20: was 10 when the sweep began",
    ),
    "name": (lambda data: data.update(name="other"), "name = 'other': must be the name of its folder, 'small'"),
    "type": (lambda data: data.update(num_samples="many"), "num_samples = 'many'"),
    "key": (lambda data: data.update(num_sample=7), "num_sample: no such setting; did you mean 'num_samples'?"),
    "bad space": (lambda data: data["space"][RATE].update(low="x"), f"space.{RATE}.low = 'x': must be a number"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_edited_by_hand_are_refused_by_key(folder: Path, name: str) -> None:
    change, expected = SETTINGS[name]
    path = folder / "sweep.yaml"
    data = yaml.safe_load(path.read_text())
    change(data)
    path.write_text(yaml.safe_dump(data))
    said = refusal(folder)
    assert said.startswith(f"{path}: ")
    assert expected in said


@pytest.mark.parametrize("content", ["a: [", "\tx", "- 1", "", "!!python/object:os.system {}"])
def test_a_sweep_yaml_that_cannot_be_read_is_refused_by_name(folder: Path, content: str) -> None:
    (folder / "sweep.yaml").write_text(content)
    assert "sweep.yaml" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda params, settings: params.update({RATE: 0.5}),
            f"{RATE} = 0.5, which is outside the space of sweep.yaml",
        ),
        (lambda params, settings: params.update({RATE: "x"}), f"{RATE} = 'x', which is outside the space"),
        (lambda params, settings: params.update({"seed": 1}), "has seed = 1, which the space of sweep.yaml does not"),
        (lambda params, settings: params.pop(RATE), f"has no {RATE}, which the space of sweep.yaml searches"),
        (lambda params, settings: settings.update({RATE: 0.002}), f"sets {RATE} = 0.002, where its parameters make it"),
        (lambda params, settings: (params.update({RATE: 0.002}), settings.update({RATE: 0.002})), "was proposed"),
    ],
)
def test_a_trial_that_the_sweep_cannot_have_proposed_is_refused(
    folder: Path, change: Callable[[Any, Any], Any], expected: str
) -> None:
    path = folder / "record.jsonl"
    lines = path.read_bytes().splitlines()
    edit(line_of("propose")(lines), lambda event: change(event["params"], event["settings"]))(lines)
    path.write_bytes(b"\n".join(lines) + b"\n")
    said = refusal(folder)
    assert said.startswith(f"{path}: trial '00000-")
    assert expected in said


def test_what_may_change_is_no_reason_to_refuse(folder: Path) -> None:
    """An edited sweep goes on where the edit is one that `--resume` would take, or says where results are kept."""
    path = folder / "sweep.yaml"
    data = yaml.safe_load(path.read_text())
    data |= {"num_samples": 50, "max_failures": 0, "confirm": {"best": 1}, "budget": {"wall_hours": 3}}
    data["train"]["tracking"] |= {"uri": "http://127.0.0.1:1", "experiment": "renamed"}
    path.write_text(yaml.safe_dump(data))
    edited = load_sweep(path)
    check_record(edited, Sweep(edited, folder, QUIET).space, folder)


def test_a_record_of_an_earlier_version_is_held_to_the_space_and_the_rungs(folder: Path) -> None:
    """It holds neither the settings that the sweep began with nor the numbers of its lines."""
    path = folder / "record.jsonl"
    events = [json.loads(line) for line in path.read_bytes().splitlines()]
    for event in events:
        event.pop("line")
        event.pop("config", None)
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    config = load_sweep(folder / "sweep.yaml")
    check_record(config, Sweep(config, folder, QUIET).space, folder)
    for section, change, expected in (
        ("scheduler", {"grace_period": 20}, "pauses at step 10, which is no rung of sweep.yaml's scheduler"),
        ("scheduler", {"kind": "none"}, "pauses at step 10, which is no rung of sweep.yaml's scheduler"),
        ("space", {RATE: {"type": "float", "low": 0.5, "high": 0.9}}, "which is outside the space of sweep.yaml"),
    ):
        data = yaml.safe_load(to_yaml(config))
        data[section] |= change
        (folder / "sweep.yaml").write_text(yaml.safe_dump(data))
        assert expected in refusal(folder)
