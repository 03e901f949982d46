"""Stores and experiments: to read makes nothing, to write makes or restores what is missing."""

import multiprocessing
import os
import shutil
import sqlite3
import subprocess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from mlflow import MlflowClient

import gsa
from gsa.errors import RequestError
from gsa.store import TrackingConfig, store_uri
from gsa.tracking import OBJECTIVES, Tracking, connect, git_tags, open_experiment, open_run, open_store, remember
from tests.mlflow_store import new_store, new_tracking

CONFIG = TrackingConfig()


def experiments(client: MlflowClient) -> list[str]:
    return sorted(e.name for e in client.search_experiments())


@pytest.mark.parametrize("opened", [open_store, open_experiment])
@pytest.mark.parametrize("content", [None, b"", "empty"])
def test_where_no_store_is_reading_makes_none(tmp_path: Path, opened: object, content: object) -> None:
    database = tmp_path / "mlflow.db"
    if content == "empty":
        sqlite3.connect(database).execute("CREATE TABLE t (a)").connection.close()
    elif content is not None:
        database.write_bytes(b"")
    before = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    with pytest.raises(RequestError, match="no runs are stored there"):
        (open_store if opened is open_store else open_experiment)(CONFIG, tmp_path)
    assert {p.name: p.stat().st_size for p in tmp_path.iterdir()} == before


def test_reading_makes_no_experiment(tmp_path: Path) -> None:
    new_store(tmp_path)
    client = open_store(CONFIG, tmp_path).client
    before = experiments(client)
    with pytest.raises(RequestError, match=r"^experiment 'gsa': is not in sqlite:.*; known: Default$"):
        open_experiment(CONFIG, tmp_path)
    with pytest.raises(RequestError, match=r"^experiment 'Defalt': .*; did you mean 'Default'\?$"):
        open_run(CONFIG, tmp_path, "s/", "Defalt")
    with pytest.raises(RequestError, match="experiment 'gsa': is not in"):
        open_run(CONFIG, tmp_path, "s/")
    assert experiments(client) == before == ["Default"]


def test_what_is_no_database_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("garbage" * 100)
    for opened in (open_store, connect):
        with pytest.raises(
            RequestError, match=r"is not a (store of MLflow's|database).*(file is not a|no SQLite) database"
        ):
            opened(CONFIG, tmp_path)


def test_a_renamed_experiment_is_still_the_sweeps(tmp_path: Path) -> None:
    tracking, folder = new_tracking(tmp_path), tmp_path / "sweeps" / "s"
    folder.mkdir(parents=True)
    remember(tracking, folder)
    run = tracking.start_run("s/", "s", tags={OBJECTIVES: "[]"})
    tracking.client.rename_experiment(tracking.experiment_id, "other")
    for again in (connect(CONFIG, tmp_path, folder), open_run(CONFIG, tmp_path, "s/")):
        assert again.experiment_id == tracking.experiment_id
        found = again.find_run("s/")
        assert found is not None
        assert found.info.run_id == run
    assert experiments(tracking.client) == ["Default", "other"]
    new = connect(CONFIG, tmp_path)  # of another sweep
    assert new.experiment_id != tracking.experiment_id
    new.start_run("s/", "s")
    with pytest.raises(RequestError, match=r"^'s': is in several experiments of .*; --experiment: gsa, other$"):
        open_run(CONFIG, tmp_path, "s/")
    assert open_run(CONFIG, tmp_path, "s/", "other").experiment_id == tracking.experiment_id
    assert new.find_run("s'/") is None


def test_a_deleted_experiment_is_restored_to_write_and_named_to_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracking = new_tracking(tmp_path)
    run = tracking.start_run("s/", "s")
    tracking.client.delete_experiment(tracking.experiment_id)
    remedy = f"mlflow experiments restore --experiment-id {tracking.experiment_id}"
    for read in (open_experiment, lambda config, storage: open_run(config, storage, "s/")):
        with pytest.raises(RequestError, match=f"^experiment 'gsa': was deleted in .*{remedy}$"):
            read(CONFIG, tmp_path)
    again = connect(CONFIG, tmp_path)
    assert [r.message for r in caplog.records] == [
        "experiment 'gsa' had been deleted in MLflow: restored, with its runs"
    ]
    assert again.experiment_id == tracking.experiment_id
    assert again.start_run("s/", "s") == run


def test_a_deleted_run_is_restored_for_its_own_sweep_only(tmp_path: Path) -> None:
    tracking = new_tracking(tmp_path)
    first = tracking.start_run("s/", "s")
    tracking.client.delete_run(first)
    second = tracking.start_run("s/", "s")
    assert second != first
    tracking.client.delete_run(second)
    assert tracking.start_run("s/", "s", restore=True) == second
    assert tracking.client.get_run(second).info.lifecycle_stage == "active"


@pytest.mark.parametrize("by", ["setting", "environment"])
def test_a_relative_path_of_sqlite_is_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    new_store(tmp_path)
    config = TrackingConfig("sqlite:///mlflow.db" if by == "setting" else None)
    if by == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    tracking = connect(config, "elsewhere")
    assert tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir("/")
    Tracking(tracking.uri, tracking.experiment_id).start_run("s/", "s")
    artifacts = tracking.client.get_experiment(tracking.experiment_id).artifact_location
    assert artifacts == (tmp_path / "artifacts").as_uri()


@pytest.mark.parametrize("uri", ["sqlite:///", "sqlite://", "sqlite:mlflow.db", "sqlite:///:memory:"])
def test_sqlite_without_a_file_is_refused(uri: str) -> None:
    with pytest.raises(RequestError, match=r"^tracking.uri = .*: must name a file"):
        store_uri(TrackingConfig(uri), ".")


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store_uri(TrackingConfig("sqlite:///~/m.db"), ".") == f"sqlite:///{tmp_path}/m.db"


def test_a_storage_folder_may_have_any_other_name(tmp_path: Path) -> None:
    folder = tmp_path / "a b#100%[x] é"
    tracking = new_tracking(folder)
    run = tracking.start_run("s/", "s")
    tracking.log_text(run, "text", "config.yaml")
    assert open_experiment(CONFIG, folder).read_text(run, "config.yaml") == "text"
    assert (folder / "artifacts").is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder.name]


def _first(folder: Path, barrier: Barrier) -> None:
    barrier.wait(60)
    tracking = connect(CONFIG, folder)
    tracking.start_run(f"s{os.getpid()}/", "s")


def test_first_runs_at_once_make_one_store(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("fork")
    barrier = processes.Barrier(3)
    started = [processes.Process(target=_first, args=(tmp_path, barrier)) for _ in range(3)]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert len(open_experiment(CONFIG, tmp_path).runs()) == 3


def test_an_experiment_that_another_makes_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = new_tracking(tmp_path)
    look, answers = MlflowClient.get_experiment_by_name, [None]

    def late(client: MlflowClient, name: str) -> object:
        return answers.pop() if answers else look(client, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)  # it is not there yet
    assert connect(CONFIG, tmp_path).experiment_id == tracking.experiment_id
    assert not answers


@pytest.mark.slow
def test_all_runs_are_seen_beyond_the_first_thousand(tmp_path: Path) -> None:
    tracking = new_tracking(tmp_path)
    parent = tracking.start_run("s/", "s", tags={OBJECTIVES: "[]"})
    child = tracking.start_run("s/t", "t", parent)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        for origin, name in ((parent, "s"), (child, "t")):
            for table in ("runs", "tags"):
                columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
                values = ", ".join(
                    {"run_uuid": f"'{name}' || n", "name": f"'{name}' || n"}.get(c, c)
                    if table == "runs"
                    else (f"'{name}' || n" if c == "run_uuid" else c)
                    for c in columns
                )
                numbers = "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 1100)"
                command = f"{numbers} SELECT {values} FROM {table}, numbers WHERE run_uuid = '{origin}'"  # noqa: S608
                database.executemany(
                    f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})",  # noqa: S608
                    database.execute(command).fetchall(),
                )
    assert len(tracking.sweeps()) == 1101
    assert len(tracking.children(parent)) == 1101


def commit(folder: Path) -> Path:
    package = folder / "gsa" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True)
    return package


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = commit(tmp_path)
    head = ["git", "-C", str(tmp_path), "rev-parse", "HEAD"]
    expected = {"mlflow.source.git.commit": subprocess.check_output(head, text=True).strip()}
    monkeypatch.chdir("/")
    assert git_tags(package) == expected
    monkeypatch.setenv("GIT_DIR", "/elsewhere")  # as in another repository's hook
    assert git_tags(package) == expected
    monkeypatch.chdir(tmp_path)  # the current folder's says nothing of code elsewhere
    installed = tmp_path / "site-packages" / "gsa" / "__init__.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    assert git_tags(installed) == {}


@pytest.mark.parametrize("why", ["no git", "no repository", "another's"])
def test_where_the_commit_is_not_known_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
        assert git_tags(Path(gsa.__file__)) == {}
    elif why == "no repository":
        (tmp_path / "__init__.py").write_text("")
        assert git_tags(tmp_path / "__init__.py") == {}
    elif os.getuid() == 0 and shutil.which("git"):
        package = commit(tmp_path)
        for path in (tmp_path, tmp_path / ".git", package.parent, package):
            os.chown(path, 12345, 12345)
        assert git_tags(package) == {}
