"""How soon Ray's autoscaler has two nodes when two are wanted, and none when they are not, on this one machine.

python -m tests.bench.autoscale --rounds 5
"""

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.ray_jobs.head import running_head
from tests.ray_jobs.nodes import IDLE

MUST = 15.0  # seconds each way, downwards beyond the idle timeout


def rest() -> None:
    time.sleep(3)


def rounds(count: int) -> None:
    """In a process that has the cluster's token in its environment from the start."""
    import ray

    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    hold: Any = ray.remote(num_cpus=1)(rest)

    def alive() -> int:
        return len([node for node in ray.nodes() if node["Alive"]]) - 1  # beside the head

    found = []
    for _ in range(count):
        began = time.monotonic()
        held = [hold.remote() for _ in range(2)]
        while alive() < 2:
            time.sleep(0.1)
        up = time.monotonic() - began
        ray.get(held)
        began = time.monotonic()
        while alive():
            time.sleep(0.1)
        found.append((up, time.monotonic() - began - IDLE))
        print(f"0 -> 2 nodes in {found[-1][0]:.1f} s, 2 -> 0 in {found[-1][1]:.1f} s beyond {IDLE:g} s", flush=True)
    for way, seconds in zip(("up", "down"), zip(*found, strict=True), strict=True):
        print(f"{way}: {statistics.median(seconds):.1f} s, at most {max(seconds):.1f}; must be <= {MUST:g}")
        assert max(seconds) <= MUST


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running_head(Path(folder), nodes=2, cpus=1) as head:
        work = f"from tests.bench.autoscale import rounds; rounds({asked.rounds})"
        environment = head.environment | {"RAY_ADDRESS": head.gcs_address}
        sys.exit(subprocess.run([sys.executable, "-c", work], env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
