"""A sweep on a cluster that loses something every half minute, at random: a node, a worker, a trial's process, the
driver, MLflow or PostgreSQL, each with SIGKILL. What dies of the services is started again some seconds later, a driver
by `gsa submit --resume`; the rest, Ray and the sweep mend themselves.

    python -m tests.bench.chaos --minutes 10 --every 30

At the end, trials, runs and steps are compared with what they should be, and what is left over is looked for.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from dashboards.services import Services
from gsa.errors import RunError
from gsa.store import TrackingConfig
from gsa.tracking import connect
from ray_jobs.record import COMPLETE, Record
from tests.ray_jobs.head import Head, link_project, running_head
from tests.ray_jobs.nodes import RAY, kill_all, running_nodes
from tests.ray_jobs.small import SPACE, write_sweep
from tests.ray_jobs.store import Store
from tests.text import tiny

NODES, CPUS, WORKERS = 3, 2, 2
STEPS, EVERY = 600, 50
KINDS = ("node", "worker", "trial", "driver", "mlflow", "postgres")
TITLES = {"worker": "RayTrainWorker", "trial": "ImplicitFunc"}  # as Ray names their processes
STANDING = ("_AutoscalingCoordinatorActor", "TrainStateActor")  # one of each in a cluster, Ray Train's own
MARK = "GSA_CHAOS"  # in the environment of all that this starts, however far from it


@dataclasses.dataclass
class Cluster:
    """What can be killed."""

    head: Head
    services: Services
    draw: random.Random
    mark: str
    revivals: list[threading.Timer] = dataclasses.field(default_factory=list)  # of services

    def processes(self, *words: str) -> list[psutil.Process]:
        """Of this cluster, with all of these words in their command line."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or [])
            with contextlib.suppress(psutil.Error):
                if all(word in line for word in words) and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def kill(self, kind: str) -> bool:
        """Whether there was one."""
        if kind == "node":
            there = running_nodes(self.head.gcs_address)
        elif kind == "driver":
            there = self.processes("python", "-m ray_jobs.", "small")
            there = [process for process in there if "submit" not in process.cmdline()]
        elif kind in TITLES:
            there = self.processes(f"ray::{TITLES[kind]}")
        else:
            server = self.services.process(kind)
            there = [server] if server is not None else []
        if not there:
            return False
        victim = self.draw.choice(there)
        if kind in TITLES:
            victim.kill()
        else:
            kill_all(victim)
        if kind in ("mlflow", "postgres"):
            self.revivals.append(threading.Timer(self.draw.uniform(2, 12), self._revive))
            self.revivals[-1].start()
        return True

    def _revive(self) -> None:
        """As whoever watches over services does, as often as it takes."""
        while True:
            try:
                self.services.start()
                return
            except RunError as error:
                print(f"services: {error}; once more", flush=True)


class Driver(threading.Thread):
    """Whoever submits the sweep, and resumes it whenever its job has failed."""

    def __init__(self, path: Path, head: Head, folder: Path) -> None:
        super().__init__(daemon=True)
        self.arguments = [str(path)]
        self.head, self.folder, self.starts = head, folder, 0
        self.start()

    def run(self) -> None:
        code = 1
        while code:
            if (self.folder / "runs/sweeps/small/sweep.yaml").exists():
                self.arguments = ["--resume", "small", "--storage", str(self.folder / "runs")]
            command = [sys.executable, "-m", "ray_jobs.cli", "submit", *self.arguments]
            self.starts += 1
            with (self.folder / "output").open("ab") as output:
                code = subprocess.run(
                    [*command, "--working-dir", str(self.folder / "upload")],
                    env=self.head.environment, stdout=output, stderr=output, cwd=self.folder, check=False,
                ).returncode  # fmt: skip
            time.sleep(1 if code else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=30, help="seconds between kills")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    os.environ[MARK] = mark = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(prefix="gsa") as name:
        folder, draw = Path(name), random.Random(asked.seed)
        folder.chmod(0o711)  # PostgreSQL may run as another user
        services = Services(folder / "services")
        services.start()
        os.environ |= services.credentials
        try:
            with running_head(folder, NODES, CPUS) as head:
                cluster = Cluster(head, services, draw, mark)
                disturb(cluster, write(folder, asked.trials, asked.seed), asked.minutes, asked.every)
                check(cluster, folder, asked.trials)
        finally:
            services.stop()
        left = [p.cmdline() for p in cluster.processes() if p.pid != os.getpid()]
        print(f"processes left: {len(left)}", *left[:5], sep="\n", flush=True)
        assert not left


def write(folder: Path, trials: int, seed: int) -> Path:
    stages = [{"kind": "dense", "steps": STEPS // 2}, {"kind": "sparse", "steps": STEPS // 2}]
    changes = {"evaluation__every": EVERY, "training__checkpoint_every": EVERY, "training__log_every": EVERY}
    train = tiny(folder, seed, training__stages=stages, workers__num_workers=WORKERS, **changes)
    objectives = [{"metric": "held_out_loss"}]
    (folder / "upload").mkdir()
    link_project(folder / "upload")
    path = write_sweep(
        folder,
        seed,
        train=train,
        space=SPACE,
        objectives=objectives,
        num_samples=trials,
        max_failures=100,
        max_concurrent_trials=None,
        gate=True,
    )
    return path.rename(folder / "upload" / path.name)


def disturb(cluster: Cluster, path: Path, minutes: float, every: float) -> None:
    """Kill until the time is over, and wait for the sweep's end."""
    folder = path.parents[1]
    began, driver = time.monotonic(), Driver(path, cluster.head, folder)
    record = folder / "runs/sweeps/small/record.jsonl"
    counts, waiting = dict.fromkeys(KINDS, 0), list[str]()  # each kind once, in random order, before any comes again
    while driver.is_alive() and time.monotonic() < began + 60 * minutes:
        time.sleep(every)
        if not waiting:
            waiting = cluster.draw.sample(KINDS, len(KINDS))
        kind = next((kind for kind in waiting if cluster.kill(kind)), "nothing")
        waiting = [one for one in waiting if one != kind]
        ended = sum(e.state == COMPLETE for e in Record(record).trials()) if record.exists() else 0
        nodes = len(running_nodes(cluster.head.gcs_address))
        print(f"{time.monotonic() - began:4.0f} s: {kind:8} killed; {ended} trials done, {nodes} nodes", flush=True)
        counts[kind] = counts.get(kind, 0) + 1
    calm = time.monotonic()
    driver.join()
    for revival in cluster.revivals:  # one that still waits would start them after they are stopped
        revival.join()
    print(
        f"{sum(counts.values())} kills: {counts}; ended {time.monotonic() - calm:.0f} s after the last, "
        f"{time.monotonic() - began:.0f} s in all, with {driver.starts} submissions",
        flush=True,
    )


def check(cluster: Cluster, folder: Path, trials: int) -> None:
    """Nothing lost, nothing doubled, nothing left."""
    sweep = folder / "runs/sweeps/small"
    record = Record(sweep / "record.jsonl")
    tracking = connect(TrackingConfig(cluster.services.uri), folder)
    store = Store(tracking.client)
    runs = store.children()
    states = {run.data.tags["gsa.state"] for run in runs.values()}
    expected = list(range(EVERY, STEPS + 1, EVERY))
    store.check_steps({entry.trial_id: expected for entry in record.trials()})
    complete = sum(entry.state == COMPLETE for entry in record.trials())
    print(f"{complete} of {trials + 1} trials complete, {len(runs)} runs {sorted(states)}, each step of each once")
    assert complete == len(runs) == trials + 1
    assert states == {"finished"}
    assert store.parent().info.status == "FINISHED"
    with FileLock(sweep / ".lock", timeout=0):
        assert not (sweep / ".owner.json").exists()
    print("the sweep's folder is free", flush=True)
    began = time.monotonic()
    while running_nodes(cluster.head.gcs_address):
        time.sleep(0.5)
        assert time.monotonic() < began + 240, "nodes are kept"  # a request whose driver was killed stands for 180 s
    print(f"no nodes {time.monotonic() - began:.0f} s after the end", flush=True)
    groups = [one for one in listed(cluster, "placement-groups") if one["state"] != "REMOVED"]
    actors = [one["class_name"] for one in listed(cluster, "actors") if one["state"] != "DEAD"]
    actors = [name for name in actors if name not in STANDING]
    print(f"placement groups left: {len(groups)}, actors left: {len(actors)}", *actors[:5], flush=True)
    assert not groups
    assert not actors


def listed(cluster: Cluster, what: str) -> list[dict[str, Any]]:
    command = [RAY, "list", what, "--format=json", "--limit=10000"]
    done = subprocess.run(command, env=cluster.head.environment, capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout or "[]")
    return found


if __name__ == "__main__":
    main()
