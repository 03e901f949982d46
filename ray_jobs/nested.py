"""Nested trials: workers of a Ray Train run that outlasts a trial, as to start one takes ten seconds.

    trial's process:  Group.train(job, report)  -- job -->  Mailbox  -->  _serve, on every worker
                                                <-- metrics --    <--

A job that fails ends its group, and the next trial starts another. What a group holds whose trial's process is gone
(ray#54305), the next one to start lets go of.
"""

import asyncio
import contextlib
import logging
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gsa.background import apart
from gsa.training.workers import Workers, WorkersConfig
from ray_jobs.job import Job
from ray_jobs.worker import Report, note_resources, release, remove_group, run_workers, work

logger = logging.getLogger(__name__)

DRIVERS = ".drivers"  # file in the trials' folder: one line a driver: Ray's session, and its job id there
JOB_DIGITS = 8  # the last of a placement group's id are those of the job that asked for it
PATIENCE = 2.0  # seconds without word from the workers after which dead groups are looked for

_group: "Group | None" = None  # of this process, which Tune uses for one trial after another


def train_nested(job: Job, report: Report) -> None:
    """Train a trial on the workers of this process, which are started where there are none.

    Args:
        job: the trial.
        report: takes the metrics of each evaluation.

    Raises:
        As `run_workers`.
    """
    global _group
    if _group is None or _group.ended:
        _group = Group(job.settings().workers, Path(job.folder).parent)
    _group.train(job, report)


class Group:
    """Workers that train one job after another.

    Args:
        workers: how many, and what each holds.
        folder: that all trials of the sweep share; notes of what groups hold are in it.
    """

    def __init__(self, workers: WorkersConfig, folder: Path) -> None:
        self.workers, self.folder = workers, folder
        self.name = f"gsa-workers-{uuid.uuid4().hex}"
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        mailbox: Any = ray.remote(num_cpus=0)(Mailbox)
        self._mailbox = mailbox.options(name=self.name, scheduling_strategy=here).remote(workers.num_workers)
        self._run = apart(self._start)
        self._run.add_done_callback(lambda _: self._mailbox.say.remote(None))

    @property
    def ended(self) -> bool:
        return self._run.done()

    def train(self, job: Job, report: Report) -> None:
        ray.get(self._mailbox.hand_out.remote(job))
        busy = self.workers.num_workers
        while busy:
            metrics = self._hear()
            if metrics is not None:
                report(metrics)
            elif self.ended:
                self._run.result()  # raises what ended it
                raise RuntimeError("workers ended in the middle of a trial")
            else:
                busy -= 1

    def _hear(self) -> dict[str, Any] | None:
        said = self._mailbox.hear.remote()
        while not ray.wait([said], timeout=PATIENCE)[0]:
            release_dead(self.folder)  # which may hold what this group waits for
        heard: dict[str, Any] | None = ray.get(said)
        return heard

    def _start(self) -> None:
        note = notes(self.folder) / self.name
        arguments = {"mailbox": self._mailbox, "note": str(note)}
        try:
            run_workers(_serve, arguments, self.workers, self.name, self.folder)
        finally:
            release(note)


class Mailbox:
    """Takes jobs to every worker, and their metrics back; gone when the process that made it is."""

    def __init__(self, workers: int) -> None:
        self._jobs: list[asyncio.Queue[Job]] = [asyncio.Queue() for _ in range(workers)]
        self._said: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def hand_out(self, job: Job) -> None:
        for jobs in self._jobs:
            jobs.put_nowait(job)

    async def take(self, rank: int) -> Job:
        return await self._jobs[rank].get()

    async def say(self, metrics: dict[str, Any] | None) -> None:
        """Metrics of an evaluation; `None` where a worker has done its share of a job, or the group has ended."""
        self._said.put_nowait(metrics)

    async def hear(self) -> dict[str, Any] | None:
        return await self._said.get()


def _serve(config: dict[str, Any]) -> None:
    """What each worker does."""
    mailbox, workers = config["mailbox"], Workers.current()
    if workers.first:
        note_resources(Path(config["note"]))

    def report(metrics: dict[str, Any]) -> None:
        if workers.first:
            ray.get(mailbox.say.remote(metrics))

    while True:
        work(ray.get(mailbox.take.remote(workers.rank)), report)
        ray.get(mailbox.say.remote(None))


def begin(folder: Path) -> None:
    """Write down the Ray job of a sweep's driver, by which `release_dead` knows what those before it have left."""
    folder.mkdir(parents=True, exist_ok=True)
    context = ray.get_runtime_context()
    with (folder / DRIVERS).open("a") as note:
        note.write(f"{context.get_session_name()} {context.get_job_id()}\n")


def release_dead(folder: Path) -> None:
    """Free what groups hold whose trial's process is gone, and what drivers that are gone have left.

    A driver has no groups that outlast it: but where it dies while one starts, its controller may ask for resources
    after Ray has let go of all that was the driver's, and nobody ever takes them back.
    """
    with contextlib.suppress(FileNotFoundError):
        lines = (folder / DRIVERS).read_text(errors="replace").splitlines()
        jobs = [words for words in map(str.split, lines) if len(words) == 2]  # a crash may have cut one short
        session = ray.get_runtime_context().get_session_name()  # job ids count from one again in the next
        # the last line is of the driver that lives: a program may run a sweep and go on with it as one Ray job
        earlier = {job for named, job in jobs[:-1] if named == session and [named, job] != jobs[-1]}
        for group, state in ray.util.placement_group_table().items():
            if group[-JOB_DIGITS:] in earlier and state["state"] != "REMOVED":
                logger.warning("a driver that is gone has left resources: they are let go (placement group %s)", group)
                remove_group(group)
    for note in notes(folder).glob("*"):
        try:
            ray.get_actor(note.name)
        except ValueError:  # there is none of that name, or no more
            logger.warning("workers are left without their trial's process: they are let go (%s)", note.name)
            release(note)


def release_all(folder: Path) -> None:
    """Free what the groups of a sweep hold."""
    for note in notes(folder).glob("*"):
        release(note)


def notes(folder: Path) -> Path:
    """Where one file a group names what it holds."""
    return folder / ".workers"
