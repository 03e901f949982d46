"""A sweep that is killed with SIGKILL at random moments, resumed each time, and then compared with what it should hold:
trials, runs, steps. Killed is its driver, a process that trains, or a cluster's head with its node.

    python -m tests.bench.kill --kills 20
    python -m tests.bench.kill --kills 6 --what worker
    python -m tests.bench.kill --kills 6 --what head
"""

import argparse
import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from ray_jobs.record import COMPLETE, Record
from tests.bench.trial import RATE
from tests.ray_jobs.commands import trial_processes
from tests.ray_jobs.nodes import kill_all
from tests.ray_jobs.small import SPACE, write_sweep
from tests.ray_jobs.store import Store

PORT = 6391  # of a cluster's head
PAUSES = {"driver": (2, 16), "worker": (0.2, 2), "head": (8, 30)}  # seconds before a kill, from the driver's start


def write(folder: Path, trials: int, seed: int) -> Path:
    space, objectives = {RATE: SPACE[RATE]}, [{"metric": "held_out_loss"}]
    return write_sweep(
        folder,
        seed,
        space=space,
        objectives=objectives,
        num_samples=trials,
        max_failures=trials,
        max_concurrent_trials=None,
        gate=True,
    )


class Cluster:
    """What a sweep runs on: a Ray of its own, or a cluster whose head is killed with all of its node."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what
        self.head: subprocess.Popen[bytes] | None = None

    def environment(self) -> dict[str, str]:
        """Of the driver; a head is started where there has to be one."""
        if self.what != "head":
            return dict(os.environ)
        if self.head is None:
            # what a dead head leaves in its folder is not the next one's
            arguments = ["start", "--head", "--block", f"--port={PORT}", "--num-cpus=2", "--include-dashboard=false"]
            arguments += ["--disable-usage-stats", f"--temp-dir={tempfile.mkdtemp(dir=self.folder)}"]
            with (self.folder / "ray.log").open("ab") as log:
                command = [str(Path(sys.executable).with_name("ray")), *arguments]
                self.head = subprocess.Popen(command, stdout=log, stderr=log)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", PORT), timeout=1):
                    break
                time.sleep(0.5)
            time.sleep(3)  # its raylet joins
        return os.environ | {"RAY_ADDRESS": f"127.0.0.1:{PORT}", "RAY_AUTH_MODE": "token"}

    def kill(self, driver: "subprocess.Popen[bytes]", draw: random.Random) -> bool:
        """Kill what is to be killed with SIGKILL, and whatever cannot live on without it; whether it was there."""
        there = driver.poll() is None
        if self.what == "driver":
            driver.kill()
            driver.wait()
        elif self.what == "head" and self.head is not None:
            self.stop()
            driver.wait(timeout=300)  # it notices by itself
        elif self.what == "worker":
            trials = trial_processes(driver.pid) if there else []
            there = bool(trials)
            if trials:
                draw.choice(trials).kill()
        return there

    def stop(self) -> None:
        """Kill the head and its node."""
        if self.head is not None:
            kill_all(psutil.Process(self.head.pid))
            self.head.wait()
            self.head = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=("driver", "worker", "head"), default="driver")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    print(f"seed {asked.seed}")
    with tempfile.TemporaryDirectory(prefix="gsa") as name:
        folder, began = Path(name), time.monotonic()
        trials = (4 if asked.what == "worker" else 1) * asked.kills + 2  # enough that one is left to kill
        gsa = [sys.executable, "-m", "ray_jobs.cli"]
        resume = [*gsa, "sweep", "--resume", "small", "--storage", str(folder / "runs")]
        command = [*gsa, "sweep", str(write(folder, trials, asked.seed))]
        kills = early = 0
        cluster = Cluster(folder, asked.what)
        output = (folder / "output").open("ab")
        process: subprocess.Popen[bytes] | None = None
        while kills < asked.kills:
            if process is None or process.poll() is not None or asked.what != "worker":
                environment = cluster.environment()
                process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
            time.sleep(draw.uniform(*PAUSES[asked.what]))
            there = cluster.kill(process, draw)
            if asked.what == "worker" and not there and process.poll() is None:
                continue  # none trains right now
            early += not there
            kills += 1
            if (folder / "runs/sweeps/small/sweep.yaml").exists():
                command = resume
        if process is not None and asked.what == "worker":
            process.wait()
        environment = cluster.environment()
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        cluster.stop()
        if ended.returncode:
            print(ended.stderr)
        record = Record(folder / "runs/sweeps/small/record.jsonl")
        steps = {e.trial_id: [4, 8, 10] if e.baseline else [4, 8, 12] for e in record.trials()}
        store = Store(folder / "runs")
        store.check_steps(steps)
        states = {run.data.tags["gsa.state"] for run in store.children().values()}
        complete = sum(e.state == COMPLETE for e in record.trials())
        print(
            f"{kills} kills of the {asked.what} ({early} with none there), exit code at last {ended.returncode}: "
            f"{complete} of {trials + 1} trials complete, {len(store.children())} runs {sorted(states)}, each step of "
            f"each once; {time.monotonic() - began:.0f} s"
        )
        assert complete == len(store.children()) == trials + 1
        assert states == {"finished"}


if __name__ == "__main__":
    main()
