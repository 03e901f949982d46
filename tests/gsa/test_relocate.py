"""The MLflow store of a moved storage folder finds its artifacts in the new place, and makes none in the old one."""

import contextlib
import shutil
import sqlite3
from pathlib import Path

import pytest

from gsa.relocate import relocate
from gsa.store import TrackingConfig
from gsa.tracking import Tracking, connect, open_experiment
from tests.draw import Draw
from tests.ray_jobs.fake_sweep import aims, fake_sweep
from tests.seeds import seed_of

LOSS = aims("held_out_loss")
pytestmark = pytest.mark.slow  # a store is made for them


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage folder with one sweep, whose best trial is a registered model."""
    folder = tmp_path_factory.mktemp("template") / "my runs"
    tracking = fake_sweep(folder, Draw(seed_of("relocate")), ["finished"], LOSS)
    best = next(run for run in tracking.runs() if "gsa.objectives" not in run.data.tags)
    (folder / "checkpoint.json").write_text("{}")
    tracking.upload(best.info.run_id, folder / "checkpoint.json", "checkpoint")
    tracking.register(best.info.run_id, "fake")
    return folder


@pytest.fixture
def moved(template: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The folder as it was at its first place, where it no longer is, and the folder now."""
    old, new = tmp_path / "first" / "my runs", tmp_path / "second" / "it's new"
    shutil.copytree(template, old)
    relocate(old / "mlflow.db")
    assert places(old) == {True}
    new.parent.mkdir()
    old.rename(new)
    return old, new


def places(folder: Path) -> set[bool]:
    """Whether the paths in a folder's store are below the folder, over all of them."""
    with sqlite3.connect(folder / "mlflow.db") as database:
        rows = database.execute(
            "SELECT artifact_location FROM experiments WHERE name = 'gsa' UNION SELECT artifact_uri FROM runs"
            " UNION SELECT source FROM model_versions UNION SELECT storage_location FROM model_versions"
        ).fetchall()
    assert len(rows) >= 4
    below = (folder / "artifacts").as_uri()
    return {place == below or place.startswith(below + "/") for (place,) in rows}


def read(tracking: Tracking) -> None:
    for run in tracking.runs():
        if "gsa.objectives" in run.data.tags:
            assert "train" in tracking.read_text(run.info.run_id, "config.yaml")
    (version,) = tracking.client.search_model_versions("name = 'fake'")
    assert (tracking.download(str(version.run_id), "checkpoint") / "checkpoint.json").exists()


def test_a_moved_store_is_read_and_written_in_its_new_place(moved: tuple[Path, Path]) -> None:
    old, new = moved
    read(open_experiment(TrackingConfig(), new))
    assert places(new) == {True}
    tracking = connect(TrackingConfig(), new)
    run_id = tracking.create_run("k", "more", None, {})
    tracking.log_text(run_id, "text", "place.txt")
    assert (new / "artifacts" / run_id / "artifacts" / "place.txt").read_text() == "text"
    assert not old.exists()


def test_a_process_that_used_the_store_before_the_move_goes_on_in_the_new_place(
    moved: tuple[Path, Path], tmp_path: Path
) -> None:
    _, here = moved
    tracking = connect(TrackingConfig(), here)
    run_id = tracking.create_run("k", "more", None, {})
    tracking.log_text(run_id, "before", "before.txt")
    there = here.rename(tmp_path / "third")
    tracking = connect(TrackingConfig(), there)
    tracking.log_text(run_id, "after", "after.txt")
    assert tracking.read_text(run_id, "before.txt") == "before"
    assert (there / "artifacts" / run_id / "artifacts" / "after.txt").read_text() == "after"
    assert not here.exists()


def test_a_copy_has_artifacts_of_its_own_and_the_original_keeps_its(moved: tuple[Path, Path]) -> None:
    old, new = moved
    read(open_experiment(TrackingConfig(), new))
    shutil.copytree(new, old)  # the first place is taken again, by a copy
    for folder in (old, new, old):
        read(open_experiment(TrackingConfig(), folder))
        assert places(folder) == {True}


def test_a_store_without_any_artifacts_yet_follows_too(moved: tuple[Path, Path]) -> None:
    _, new = moved
    shutil.rmtree(new / "artifacts")
    relocate(new / "mlflow.db")
    assert places(new) == {True}


def test_a_store_that_cannot_be_written_to_is_read_without_its_artifacts(
    moved: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Another process that holds it for longer than we wait stands in for a read-only disk, which stops no root."""
    _, new = moved
    before = (new / "mlflow.db").read_bytes()
    with contextlib.closing(sqlite3.connect(new / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        relocate(new / "mlflow.db", patience=0.01)
    assert (new / "mlflow.db").read_bytes() == before
    assert "cannot be seen or noted (database is locked)" in caplog.text
    relocate(new / "mlflow.db")
    assert places(new) == {True}


def test_a_link_to_the_folder_is_the_folder(moved: tuple[Path, Path], tmp_path: Path) -> None:
    _, new = moved
    relocate(new / "mlflow.db")
    (tmp_path / "link").symlink_to(new)
    before = (new / "mlflow.db").read_bytes()
    relocate(tmp_path / "link" / "mlflow.db")
    assert (new / "mlflow.db").read_bytes() == before


def test_artifacts_that_somebody_keeps_elsewhere_stay_there(moved: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = moved
    own = {
        "kept": f"file://{tmp_path}/kept/artifacts",  # is there
        "near": f"{old.as_uri()}/artifacts-2",
        "bucket": "s3://bucket/artifacts",
        "bare": str(tmp_path / "bare"),
    }
    (tmp_path / "kept/artifacts").mkdir(parents=True)
    with sqlite3.connect(new / "mlflow.db") as database:
        for number, (name, place) in enumerate(own.items(), 100):
            database.execute(
                "INSERT INTO experiments (experiment_id, name, artifact_location, lifecycle_stage)"
                " VALUES (?, ?, ?, 'active')", (number, name, place),
            )  # fmt: skip
    database.close()
    relocate(new / "mlflow.db")
    assert places(new) == {True}
    with sqlite3.connect(new / "mlflow.db") as database:
        found = dict(database.execute("SELECT name, artifact_location FROM experiments WHERE experiment_id >= 100"))
    assert found == own


@pytest.mark.parametrize("content", [b"", b"not a database", None])
def test_what_is_no_store_is_left_to_mlflow(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "artifacts").mkdir()
    if content is not None:
        (tmp_path / "mlflow.db").write_bytes(content)
    relocate(tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").exists() == (content is not None)
    assert content is None or (tmp_path / "mlflow.db").read_bytes() == content
