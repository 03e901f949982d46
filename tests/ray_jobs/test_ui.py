"""`gsa ui`: whatever keeps it from starting is one line, and however it ends, nothing stays behind."""

import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from dashboards.services import free_ports
from tests.mlflow_store import new_store
from tests.ray_jobs.commands import command, refused, wait_for

# what listens is a grandchild, and nobody passes signals on to it
SERVER = """
import http.server, subprocess, sys
if sys.argv[1] != "child":
    child = subprocess.Popen([sys.executable, __file__, "child", *sys.argv[1:]])
    sys.exit(child.wait())
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/end":
            sys.exit(7)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""
SERVE = """
import sys
from ray_jobs.ui import serve
port = int(sys.argv[2])
serve([sys.executable, sys.argv[1], str(port)], port, lambda address: print(address, flush=True))
"""


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    new_store(tmp_path)
    return tmp_path


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check_end(process: "subprocess.Popen[str]", port: int, number: signal.Signals) -> None:
    """End it by a signal: nothing of its family is left."""
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3
    assert listens(port)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family), 60)
    assert not listens(port)
    if number in (signal.SIGINT, signal.SIGTERM):
        assert process.returncode in (130, -signal.SIGINT), errors
    assert "gsa.errors.RunError" not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_however_it_ends_nothing_stays_behind(tmp_path: Path, hangups: None, number: signal.Signals) -> None:
    (port,) = free_ports(1)
    (tmp_path / "server.py").write_text(SERVER)
    arguments = [sys.executable, "-c", SERVE, str(tmp_path / "server.py"), str(port)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == f"http://127.0.0.1:{port}\n"
    check_end(process, port, number)


def test_a_server_that_ends_by_itself_is_a_failure(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    (tmp_path / "server.py").write_text("import sys; sys.exit(7)")
    arguments = [sys.executable, "-c", SERVE, str(tmp_path / "server.py"), str(port)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert "RunError: MLflow's server did not start (exit code 7); what it said is above" in done.stderr


def test_mlflow_answers_on_localhost_alone_and_ends_with_the_command(storage: Path) -> None:
    (port,) = free_ports(1)
    arguments = command("ui", "--storage", str(storage), "--port", str(port))
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"MLflow: http://127.0.0.1:{port} (Ctrl-C ends it)\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
            assert b"MLflow" in page.read()
        family = psutil.Process(process.pid).children(recursive=True)
        places = {c.laddr.ip for one in family for c in one.net_connections() if c.status == psutil.CONN_LISTEN}
        assert places == {"127.0.0.1"}
        check_end(process, port, signal.SIGINT)
        assert process.returncode == 130
    finally:
        process.kill()


def test_a_port_that_is_taken_is_refused_with_another(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = refused(capsys, "ui", "--storage", str(storage), "--port", str(port))
    assert f"--port {port}: cannot be used (Address already in use); try --port " in line


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("0584bdc529eb", "was made by an earlier MLflow; after a backup, bring it up to date: mlflow db upgrade"),
        ("ffffffffffff", "was made by a later MLflow than 3."),
        (None, "is not a store of MLflow's"),
    ],
)
def test_a_store_of_another_mlflow_is_refused_with_what_to_do(
    storage: Path, capsys: pytest.CaptureFixture[str], version: str | None, words: str
) -> None:
    database = storage / "mlflow.db"
    if version is None:
        database.write_text("no database")
    else:
        with sqlite3.connect(database) as connection:
            connection.execute("UPDATE alembic_version SET version_num = ?", [version])
    assert words in refused(capsys, "ui", "--storage", str(storage))


def test_without_a_store_nothing_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no runs are stored there" in refused(capsys, "ui", "--storage", str(tmp_path))
    assert not list(tmp_path.iterdir())
