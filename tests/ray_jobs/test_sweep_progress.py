"""What a sweep says of itself while it runs: who is done, and how long the rest takes."""

import re
from pathlib import Path

from rich.console import Console

from ray_jobs.halving import Halving, SchedulerConfig
from ray_jobs.objectives import Aims
from ray_jobs.progress import SweepProgress
from ray_jobs.record import COMPLETE, FAIL, Entry, Record
from tests.draw import Draw
from tests.ray_jobs.play import LOSS


class Sweep:
    """A record that is written by hand, with one second for each ten steps."""

    def __init__(self, folder: Path, kind: str, samples: int, baseline: bool = False) -> None:
        self.seconds = 0.0
        self.record = Record(folder / "record.jsonl")
        self.halving = Halving(SchedulerConfig(kind, 10, 3), 90, Aims([LOSS]))
        total = samples + baseline
        self.progress = SweepProgress(
            self.record, [LOSS], total, samples, 90, self.halving, Console(), lambda: self.seconds
        )

    def start(self, name: str, baseline: bool = False) -> None:
        self.record.propose(Entry(name, {}, {}, baseline=baseline, until=None if baseline else self.halving.first))

    def train(self, name: str, step: int, loss: float = 1.0) -> None:
        self.seconds += (step - max(self.record.entries[name].steps, default=0)) / 10
        self.record.result(name, step, {LOSS.metric: loss})

    def left(self) -> str:
        found = re.search(r"about (.*) left", self.progress.summary())
        return found[1] if found else ""


def test_what_is_left_is_the_steps_that_are_left(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "none", 2, baseline=True)
    sweep.start("dense", baseline=True)
    assert sweep.left() == ""  # nothing is known of the pace
    sweep.train("dense", 45)
    assert sweep.left() == "22 s"  # 45 + 90 + 90 steps at ten a second
    sweep.train("dense", 90)
    sweep.record.end("dense", COMPLETE, [1.0])
    sweep.start("a")
    sweep.train("a", 30)
    assert sweep.left() == "15 s"


def test_a_rung_promotes_one_in_three(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "halving", 9)  # 9 to step 10, 3 to 30, 1 to 90: 90 + 60 + 60 steps
    for i in range(9):
        sweep.start(str(i))
        sweep.train(str(i), 10, i)
        sweep.record.pause(str(i))
        assert sweep.left() == f"{(210 - 10 * (i + 1)) / 10:.0f} s"
        assert sweep.progress.summary().startswith(f"0/9 trials ({i + 1} paused)")
    for i in range(3):
        sweep.record.promote(str(i), 30)
        sweep.train(str(i), 30, i)
        sweep.record.pause(str(i))
    assert sweep.left() == "6 s"
    sweep.record.promote("0", None)
    sweep.train("0", 90, 0)
    assert sweep.left() == "1 s"  # it still runs
    sweep.record.end("0", COMPLETE, [0.0])
    assert sweep.progress.summary() == "9/9 trials (1 finished, 8 stopped early), best loss 0.0000"


def test_never_nothing_is_left_while_something_runs(draw: Draw, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, draw.random.choice(["halving", "none"]), 12)
    for i in range(12):
        sweep.start(str(i))
    while running := [e for e in sweep.record.trials() if e.state == "RUNNING"]:
        entry = draw.random.choice(running)
        aim = entry.until or 90
        sweep.train(
            entry.trial_id, min(aim, max(entry.steps, default=0) + draw.random.randint(1, 40)), draw.random.random()
        )
        assert not re.search(r"about 0 ", sweep.progress.summary())
        assert sweep.left() != ""
        assert sweep.progress._steps_left() >= 0
        if draw.random.random() < 0.05:
            sweep.record.end(entry.trial_id, FAIL, reason="drawn")
        elif max(entry.steps) == 90:
            sweep.record.end(entry.trial_id, COMPLETE, [entry.steps[90][LOSS.metric]])
        elif max(entry.steps) == entry.until:
            sweep.record.pause(entry.trial_id)
        while promoted := sweep.halving.promotable(sweep.record.entries):
            sweep.record.promote(promoted.trial_id, sweep.halving.after(promoted.until))
        if not any(e.state == "RUNNING" for e in sweep.record.trials()):
            best = sweep.halving.promotable(sweep.record.entries, closing=True)
            if best is not None:
                sweep.record.promote(best.trial_id, sweep.halving.after(best.until))
    assert sweep.progress.summary().startswith("12/12 trials")


def test_another_life_counts_its_own_pace_alone(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "none", 2)
    sweep.start("a")
    sweep.train("a", 90)
    sweep.record.end("a", COMPLETE, [1.0])
    again = SweepProgress(sweep.record, [LOSS], 2, 2, 90, sweep.halving, Console(), lambda: sweep.seconds)
    assert "left" not in again.summary()
    sweep.start("b")
    sweep.train("b", 30)
    assert "about 6 s left" in again.summary()
