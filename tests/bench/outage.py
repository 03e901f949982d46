"""MLflow away: for a minute in mid-sweep, and when a trial starts. Nothing may be lost, and the sweep not wait.

    python -m tests.bench.outage --seconds 60

The same sweep of invented trials runs twice on an MLflow server of its own: undisturbed, and with the server killed.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from dashboards.services import free_ports
from gsa.store import TrackingConfig
from gsa.tracking import connect
from ray_jobs.cluster import running
from tests.bench.invented import InventedSweep
from tests.bench.trial import Invented

TRIALS, RESULTS, EVERY = 40, 20, 0.3


class Server:
    """An MLflow server that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return
            time.sleep(0.2)
        raise RuntimeError("the server does not start")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def timed(folder: Path, server: Server, outages: list[tuple[float, float]]) -> float:
    """Seconds until the last trial has ended; `outages` are when the server is killed, and for how long."""
    sweep = InventedSweep(folder, TRIALS, tracking=connect(TrackingConfig(server.uri), folder))
    ends: list[float] = []
    sweep.record.subscribe(lambda event, entry: ends.append(time.monotonic()) if event["event"] == "end" else None)

    def disturb() -> None:
        for after, seconds in outages:
            time.sleep(after)
            server.kill()
            time.sleep(seconds)
            server.start()

    thread = threading.Thread(target=disturb)
    began = time.monotonic()
    thread.start()
    late = sweep.run(Invented(folder, RESULTS, EVERY))
    thread.join()
    print(
        f"outages {outages}: last trial after {ends[-1] - began:.1f} s; {late or 'all logged'}; {sweep.check(RESULTS)}",
        flush=True,
    )
    return ends[-1] - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    asked = parser.parse_args()
    times = []
    for outages in ([], [(3.0, 12.0), (10.0, asked.seconds)]):
        with tempfile.TemporaryDirectory() as folder, running():
            server = Server(Path(folder))
            try:
                times.append(timed(Path(folder) / "s", server, outages))
            finally:
                server.kill()
    print(f"with the outages the sweep took {100 * (times[1] / times[0] - 1):+.1f} %")


if __name__ == "__main__":
    main()
