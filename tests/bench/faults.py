"""Faults at random in a sweep: dead processes, losses that are not finite, exceptions, lack of memory, slow trials.

    python -m tests.bench.faults --trials 200 --faults 50

The sweep has to end by itself, and its counts to equal those of the faults that were put in.
"""

import argparse
import collections
import dataclasses
import math
import os
import random
import tempfile
import time
from pathlib import Path

import torch
from ray import tune

from gsa.errors import RunError, one_line
from ray_jobs.cluster import running
from ray_jobs.record import FAIL, Proposal
from ray_jobs.worker import LASTING
from tests.bench.invented import InventedSweep
from tests.bench.trial import Invented

KINDS = ("killed", "nan", "exception", "memory", "slow")
REASONS = {"nan": "loss is nan at step 2", "memory": "out of memory"}  # of what would fail again in the same way


@dataclasses.dataclass(frozen=True)
class Faults:
    """Which trial meets which fault; a trial that is killed or raises does so once, and goes on the next time."""

    folder: Path
    kinds: dict[int, str]  # by number of the trial

    def __call__(self, proposal: Proposal, step: int) -> None:
        kind = self.kinds.get(int(proposal["trial_id"].split("-")[0]))
        note = self.folder / f"fault-{proposal['trial_id']}"
        if kind is None or step != 2 or note.exists():
            return
        note.touch()
        if kind == "killed":
            os._exit(9)
        if kind == "nan":
            raise RunError(f"loss is {math.nan} at step {step}")
        if kind == "exception":
            raise ValueError("a bug")
        if kind == "memory":
            raise torch.OutOfMemoryError("out of memory")
        time.sleep(5)


@dataclasses.dataclass(frozen=True)
class Faulty:
    """An invented trial that reports what fails for good as a real one does."""

    invented: Invented

    def __call__(self, proposal: Proposal) -> None:
        try:
            self.invented(proposal)
        except LASTING as error:
            tune.report({"failed": one_line(error)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    kinds = {number: draw.choice(KINDS) for number in draw.sample(range(asked.trials), asked.faults)}
    put_in = collections.Counter(kinds.values())
    print(f"seed {asked.seed}, put in: {dict(put_in)}")
    with tempfile.TemporaryDirectory() as name, running():
        folder, began = Path(name), time.monotonic()
        sweep = InventedSweep(folder, asked.trials)
        late = sweep.run(Faulty(Invented(folder, 4, 0.02, Faults(folder, kinds))))
        failed = [e for e in sweep.record.trials() if e.state == FAIL]
        reasons = collections.Counter(e.reason for e in failed)
        print(f"ended after {time.monotonic() - began:.0f} s, {late or 'all logged'}; failed: {dict(reasons)}")
        print(sweep.check(4))
        assert reasons == {REASONS[kind]: put_in[kind] for kind in REASONS if put_in[kind]}
        assert len(sweep.record.trials()) == asked.trials
        runs = sweep.tracking.children(sweep.parent)
        assert sum(sweep.tracking.state(run) == "failed" for run in runs) == len(failed)


if __name__ == "__main__":
    main()
