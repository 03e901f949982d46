"""Shared services, real ones: nobody without a password, nothing beyond localhost, and all of it there again later."""

import json
import secrets
import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from botocore.exceptions import ClientError
from mlflow import MlflowClient
from mlflow.entities import RunTag
from torch.testing import assert_close

from dashboards.services import HOST, SERVERS, Services
from gsa import load_checkpoint
from gsa.errors import RequestError
from gsa.move import move
from gsa.store import TrackingConfig
from gsa.tracking import KEY, connect
from ray_jobs.report import read_report
from ray_jobs.sweep import load_sweep, run_sweep
from tests.draw import Draw
from tests.ray_jobs.small import QUIET, write_sweep


@pytest.fixture
def user(services: Services, monkeypatch: pytest.MonkeyPatch) -> Services:
    for key, value in services.credentials.items():
        monkeypatch.setenv(key, value)
    return services


def status(url: str, headers: dict[str, str] | None = None, data: bytes | None = None) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def ask_without_certificate(url: str) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        urllib.request.urlopen(url, timeout=10, context=context).close()
    except ssl.SSLError as error:  # with TLS 1.3 it comes only with the answer
        raise urllib.error.URLError(error) from error


def test_a_sweep_goes_there_by_one_setting_and_is_there_after_a_restart(
    draw: Draw, user: Services, tmp_path: Path, cluster: None
) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), num_samples=2)
    report = run_sweep(load_sweep(path, [f"train.tracking.uri={user.uri}"]), QUIET)
    assert not (tmp_path / "runs/mlflow.db").exists()
    user.stop()
    assert all(user.process(name) is None for name in SERVERS)
    user.start()
    client = MlflowClient(user.uri)
    run = client.get_run(str(report.trials[0]["run_id"]))
    assert run.info.status == "FINISHED"
    folder = client.download_artifacts(run.info.run_id, "checkpoint", str(tmp_path))
    assert (Path(folder) / "model.safetensors").stat().st_size > 1000
    assert user.s3_client().list_objects_v2(Bucket="mlflow")["KeyCount"] > 5


def whole(client: MlflowClient, folder: Path) -> dict[str, Any]:
    """All there is of each run, by its key, in words that do not depend on the store."""
    (experiment,) = [e for e in client.search_experiments() if e.name == "move"]
    runs, found = client.search_runs([experiment.experiment_id]), {}
    names = {run.info.run_id: run.info.run_name for run in runs}
    for run in runs:
        history = [point for key in run.data.metrics for point in client.get_metric_history(run.info.run_id, key)]
        artifacts = Path(client.download_artifacts(run.info.run_id, "", str(folder)))
        files = {str(p.relative_to(artifacts)): p.read_bytes() for p in artifacts.rglob("*") if p.is_file()}
        shutil.rmtree(artifacts)
        inputs = run.inputs.dataset_inputs if run.inputs else []
        tags = {key: value for key, value in run.data.tags.items() if not key.startswith("gsa.moved")}
        tags["mlflow.parentRunId"] = names.get(tags.get("mlflow.parentRunId", ""), "none")
        found[run.data.tags[KEY]] = {
            "info": (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time),
            "params": run.data.params,
            "metrics": sorted((m.key, m.step, m.timestamp, m.value) for m in history),
            "tags": tags,
            "files": files,
            "data": [(i.dataset.name, i.dataset.digest, i.dataset.source) for i in inputs],
        }
    return found


def test_a_laptops_store_moves_there_whole_even_if_it_is_cut_short(
    draw: Draw, user: Services, tmp_path: Path, cluster: None
) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), num_samples=3, name="moving")
    database = f"sqlite:///{tmp_path / 'runs/mlflow.db'}"
    here = [f"train.tracking.uri={database}", "train.tracking.experiment=move"]
    report = run_sweep(load_sweep(path, here), QUIET)
    source = connect(TrackingConfig(database, "move"), tmp_path / "runs")
    told: list[str] = []
    stop = draw.random.randint(1, 4)

    def cut(line: str) -> None:
        told.append(line)
        if len(told) == stop:
            raise KeyboardInterrupt

    destination = connect(TrackingConfig(user.uri, "move"), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        move(source, destination, cut)
    moved = move(source, destination, told.append)
    assert (moved.runs, moved.earlier) == (5, stop)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    assert whole(source.client, tmp_path / "a") == whole(destination.client, tmp_path / "b")
    assert move(source, destination, told.append).earlier == 5
    assert whole(source.client, tmp_path / "a") == whole(destination.client, tmp_path / "b")
    there = read_report(destination, "moving")
    assert there.best == report.best
    assert [t["metrics"] for t in there.trials] == [t["metrics"] for t in report.trials]
    (version,) = destination.client.search_model_versions("name = 'moving'")
    ours = load_checkpoint(tmp_path / "runs/sweeps/moving/trials" / str(report.best))
    assert_close(load_checkpoint(f"runs:/{version.run_id}").state_dict(), ours.state_dict(), rtol=0, atol=0)


def test_what_cannot_move_is_refused(draw: Draw, user: Services, tmp_path: Path) -> None:
    destination = connect(TrackingConfig(user.uri, "namesakes"), tmp_path)
    source = connect(TrackingConfig(f"sqlite:///{tmp_path / 'mlflow.db'}", "namesakes"), tmp_path)
    for tracking in (source, destination):
        tracking.finish(tracking.create_run("same/key", "same", None, {}), "finished")
    with pytest.raises(RequestError, match="'same/key' is in the other store already"):
        move(source, destination, print)
    source.create_run("other/key", "other", None, {})
    with pytest.raises(RequestError, match="run 'other' is running"):
        move(source, destination, print)


def test_nobody_comes_in_without_a_password(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    search = f"{services.uri}/api/2.0/mlflow/experiments/search?max_results=1"
    assert status(search) == 401
    assert status(search, {"Host": "elsewhere.example"}) == 403
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "gsa")
    for guess in ("password1234", "password", "", secrets.token_hex(20)):
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", guess)
        with pytest.raises(RequestError, match="You are not authenticated"):
            connect(TrackingConfig(services.uri), "nowhere")
    ports = services.ports
    assert status(f"http://{HOST}:{ports['s3']}/mlflow/") == 403
    for part in ("filer", "volume", "master"):  # they speak TLS, to who has the store's own certificate
        assert status(f"http://{HOST}:{ports[part]}/") == 400
        assert status(f"http://{HOST}:{ports[part]}/buckets/mlflow/x", data=b"x") == 400
        with pytest.raises(urllib.error.URLError, match=r"(?i)certificate.required"):
            ask_without_certificate(f"https://{HOST}:{ports[part]}/dir/status")


def test_nothing_listens_beyond_localhost(services: Services) -> None:
    for name in SERVERS:
        process = services.process(name)
        assert process is not None
        for one in (process, *process.children(recursive=True)):
            listening = [c.laddr.ip for c in one.net_connections() if c.status == psutil.CONN_LISTEN]
            assert set(listening) <= {HOST}, (name, listening)


def test_passwords_are_in_private_files_and_nowhere_else(services: Services) -> None:
    kept = json.loads((services.folder / "settings.json").read_text())["secrets"]
    holders = [p for p in services.folder.iterdir() if p.is_file() and any(s in p.read_text() for s in kept.values())]
    assert {p.stat().st_mode & 0o777 for p in holders} == {0o600}
    certificates = services.folder / "certificates"
    assert certificates.stat().st_mode & 0o777 == 0o700
    assert (certificates / "key.pem").stat().st_mode & 0o777 == 0o600
    assert not [p.name for p in holders if p.suffix == ".log"]
    shown = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not any(secret in line for secret in kept.values() for line in shown)


def test_artifacts_are_kept_as_they_are_and_by_a_key_that_can_do_nothing_else(user: Services, tmp_path: Path) -> None:
    client = MlflowClient(user.uri)
    run = client.create_run(client.create_experiment("artifacts"))
    kept = {"list.json": b"[]", "deep.json": b"[" * 1000, "nul.json": b'{"a": "\\u0000"}', "grö ße (1).txt": b"\0\\.."}
    kept["large.json"] = b" " * 5_000_000  # longer than any JSON that is a request
    (tmp_path / "in").mkdir()
    for name, content in kept.items():
        (tmp_path / "in" / name).write_bytes(content)
    client.log_artifacts(run.info.run_id, str(tmp_path / "in"), "a b/c")
    folder = Path(client.download_artifacts(run.info.run_id, "a b/c", str(tmp_path)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
    listed = user.s3_client("s3_mlflow").list_objects_v2(Bucket="mlflow", Prefix=f"{run.info.experiment_id}/")
    assert listed["KeyCount"] == len(kept)
    with pytest.raises(ClientError, match="AccessDenied"):
        user.s3_client("s3_mlflow").create_bucket(Bucket="elsewhere")
    limits = [RunTag(f"tag{i}", "x" * 8000) for i in range(100)]  # 800 kB, about as much as MLflow takes at once
    client.log_batch(run.info.run_id, tags=limits)
    assert len(client.get_run(run.info.run_id).data.tags) >= 100


def test_what_an_earlier_version_did_not_know_is_made(tmp_path: Path) -> None:
    before = json.loads(Services(tmp_path).folder.joinpath("settings.json").read_text())
    del before["secrets"]["s3_mlflow_access_key"], before["secrets"]["s3_mlflow_secret_key"]
    (tmp_path / "settings.json").write_text(json.dumps(before))
    Services(tmp_path)
    after = json.loads((tmp_path / "settings.json").read_text())
    assert after["secrets"].keys() - before["secrets"].keys() == {"s3_mlflow_access_key", "s3_mlflow_secret_key"}
    assert after["ports"] == before["ports"]
    assert before["secrets"].items() <= after["secrets"].items()
    assert (tmp_path / "settings.json").stat().st_mode & 0o777 == 0o600


def test_what_died_is_started_again_and_the_rest_left_alone(services: Services) -> None:
    before = {name: services.process(name) for name in SERVERS}
    assert before["s3"] is not None
    before["s3"].kill()
    before["s3"].wait()
    services.start()
    after = {name: services.process(name) for name in before}
    assert after["postgres"] == before["postgres"]
    assert after["mlflow"] == before["mlflow"]
    assert after["s3"] not in (None, before["s3"])


def test_wrong_requests_are_told_in_one_line(services: Services, tmp_path: Path) -> None:
    for arguments, words in (
        (["stop", "--folder", str(tmp_path / "none")], "no services are kept there"),
        (["start", "--folder", str(services.folder), "--port", "1"], "MLflow in"),
        (["start", "--folder", "/proc/none"], "cannot be made"),
    ):
        command = [sys.executable, "-m", "dashboards.services", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
