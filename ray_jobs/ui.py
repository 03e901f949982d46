"""`gsa ui`: MLflow's own server on a store of this machine, on localhost, for as long as the command runs.

The server is a family of processes. It lives in a session of its own, below a keeper (this module as a program) whose
standard input is a pipe from the command. However the command ends, `kill -9` included, the pipe closes, and the
keeper ends the whole family: no process stays behind that holds the port.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from gsa.errors import RequestError, RunError, one_line
from ray_jobs.signals import stops_go_to

HOST = "127.0.0.1"
START = 300.0  # seconds that the server has to answer for the first time
GRACE = 5.0  # seconds that the family has to end by itself
DATABASE = "sqlite:///"
WITHOUT_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # seven more processes, for judges of LLM traces


def serve(command: list[str], port: int, ready: Callable[[str], None]) -> None:
    """Run a server until a signal comes.

    Args:
        command: of the server, as of `mlflow_server`.
        port: on localhost, where it answers.
        ready: called with the address once it does.

    Raises:
        RequestError: the port cannot be had.
        RunError: the server ended by itself, or never answered.
        KeyboardInterrupt: a signal came.
    """
    refuse_taken(port)
    with stops_go_to(_interrupt):
        keeper = subprocess.Popen(
            [sys.executable, "-m", "ray_jobs.ui", *command],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={**WITHOUT_JOBS, **os.environ},
        )
        try:
            _wait_until_it_answers(keeper, port)
            ready(f"http://{HOST}:{port}")
            raise RunError(f"MLflow's server ended by itself ({_ending(keeper.wait())}); what it said is above")
        finally:
            _end(keeper)


def mlflow_server(uri: str, port: int) -> list[str]:
    """The command of MLflow's server on a SQLite store."""
    artifacts = (Path(uri.removeprefix(DATABASE)).absolute().parent / "artifacts").as_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", HOST]
    command += ["--port", str(port), "--default-artifact-root", artifacts, "--workers", "1"]
    return [*command, "--allowed-hosts", f"localhost:{port},{HOST}:{port}", "--uvicorn-opts", "--log-level warning"]


def refuse_taken(port: int) -> None:
    """Raises RequestError where nothing can listen on this port of localhost."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError:
            allowed = "needs root; try --port 5001"
        except OSError as error:
            another = port + 1 if port < 65535 else 5001
            allowed = f"cannot be used ({one_line(error.strerror)}); try --port {another}"
        else:
            return
    raise RequestError(f"--port {port}: {allowed}")


def _wait_until_it_answers(keeper: "subprocess.Popen[bytes]", port: int) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands before localhost
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        if keeper.poll() is not None:
            raise RunError(f"MLflow's server did not start ({_ending(keeper.returncode)}); what it said is above")
        with contextlib.suppress(OSError), direct.open(f"http://{HOST}:{port}/health", timeout=5):
            return
        time.sleep(0.2)
    raise RunError(f"MLflow's server did not answer within {START:.0f} s")


def _end(keeper: "subprocess.Popen[bytes]") -> None:
    assert keeper.stdin is not None
    keeper.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        keeper.wait(2 * GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(keeper.pid, signal.SIGKILL)
    keeper.wait()


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _keep(command: list[str]) -> int:
    """Run the server; once standard input closes, end it and all that it has started."""
    closed = threading.Event()

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # nothing is ever written: it ends when the pipe closes
        closed.set()
        os.killpg(0, signal.SIGTERM)
        time.sleep(GRACE)
        os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGTERM, lambda number, frame: None)  # its own, which goes to the whole family
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    threading.Thread(target=watch, daemon=True).start()
    code = server.wait()
    if closed.is_set():
        os.killpg(0, signal.SIGKILL)  # what the server left behind, and this
    return code


if __name__ == "__main__":
    sys.exit(_keep(sys.argv[1:]))
