"""One run, trained: in this process, or by the workers of a Ray Train `TorchTrainer`.

The first worker alone writes what MLflow is to know, to the run's spool; results go on to whoever started the run.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray._raylet import PlacementGroupID
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.context import get_train_context
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from gsa.config import flatten, to_yaml
from gsa.data.packing import prepare
from gsa.errors import InfrastructureError, RequestError, RunError, one_line
from gsa.evaluation.dry import dry_step
from gsa.spool import Spool, system_metrics
from gsa.training.loop import Trainer
from gsa.training.steps import steps
from gsa.training.workers import Workers, WorkersConfig
from ray_jobs import stop
from ray_jobs.capacity import worker_resources
from ray_jobs.job import Job
from ray_jobs.storage import refuse_unshared

COORDINATOR = "AutoscalingCoordinator"  # the actor to which Ray Train says what it needs
RESOURCES = ".placement_group"  # file in a run's folder that names what its workers hold

# what would fail again in the same way: a loss that is not finite, a setting that cannot be, too little memory
LASTING = (RunError, RequestError, torch.OutOfMemoryError)

Report = Callable[[dict[str, Any]], None]


def fit(job: Job) -> None:
    """Train a run with a Ray Train `TorchTrainer` of any number of workers.

    Raises:
        As `run_workers`.
    """
    folder = Path(job.folder)
    release(folder / RESOURCES)
    run_workers(_train_worker, {"job": job}, job.settings().workers, folder.name, folder.parent)


def run_workers(
    function: Callable[[dict[str, Any]], None], arguments: dict[str, Any], workers: WorkersConfig, name: str, home: Path
) -> None:
    """Run a function on every worker of a Ray Train `TorchTrainer`.

    Raises:
        RunError: it would fail again in the same way; the message is the worker's own.
        InfrastructureError: its disk or its node failed.
        ray.train.TrainingFailedError: anything else, a worker that was lost for example.
    """
    trainer = TorchTrainer(
        function,
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=workers.gpus_per_worker > 0,
            resources_per_worker=worker_resources(workers),
        ),
        run_config=RunConfig(
            name=name, storage_path=str(home / ".ray_train"), failure_config=FailureConfig(max_failures=0)
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        cause = root_cause(error)
        if isinstance(cause, InfrastructureError):
            raise cause from error
        if isinstance(cause, OSError):
            raise InfrastructureError(one_line(cause)) from error
        if isinstance(cause, LASTING):
            raise RunError(one_line(cause)) from error
        raise


def note_resources(note: Path) -> None:
    """Write down, in a worker of Ray Train, what its workers hold and what was asked of the autoscaler for them."""
    group = get_current_placement_group()
    assert group is not None  # Ray Train's workers always stand in one
    request = f"train-{get_train_context().train_run_context.run_id}"
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"placement_group": group.id.hex(), "request": request}))


def release(note: Path) -> None:
    """Free what workers hold that wrote this note, if there are any.

    Ray Train does so itself where it ends by itself. Where it is stopped from outside, it relies on the state API of
    the dashboard, and without one its placement group stays for ever: the next run waits in vain (ray#54305). Its
    request stands for another three minutes, in which the autoscaler starts nodes for it that nobody uses.
    """
    try:
        held = json.loads(note.read_text())
    except FileNotFoundError:
        return
    except ValueError:  # its writer was killed while it wrote: nothing is known of what it held
        note.unlink(missing_ok=True)
        return
    remove_group(held["placement_group"])
    with contextlib.suppress(ValueError):  # there is no autoscaling
        ray.get_actor(COORDINATOR, namespace=COORDINATOR).cancel_request.remote(held["request"])
    note.unlink(missing_ok=True)  # who else lets go at this moment has deleted it


def remove_group(placement_group: str) -> None:
    """Free a placement group by its id, in hexadecimal, whoever made it."""
    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(placement_group))))


def root_cause(error: BaseException) -> BaseException:
    """The worker's own error, without the layers that Ray wraps around it."""
    failures = getattr(error, "worker_failures", None)
    inner = next(iter(failures.values())) if failures else getattr(error, "cause", None) or error.__cause__
    return root_cause(inner) if isinstance(inner, BaseException) else error


def _train_worker(config: dict[str, Any]) -> None:
    job: Job = config["job"]
    if Workers.current().first:
        note_resources(Path(job.folder) / RESOURCES)
    work(job, ray.train.report)


def work(job: Job, report: Report) -> None:
    """Train this worker's share of a run, from its newest checkpoint if it has one, until it ends or is asked to stop.

    Args:
        report: takes the metrics of each evaluation, `step`, `complete` and `seconds` among them; called by every
            worker.
    """
    # Ray's workers log to files of their own; one line of ours is enough there
    logging.getLogger("gsa").setLevel(logging.INFO)
    refuse_unshared(Path(job.seen))
    config = job.settings()
    torch.set_num_threads(max(1, int(config.workers.cpus_per_worker)))
    data = prepare(config.data, Path(config.storage) / "data")
    workers = Workers.current()
    if workers.world == 1 and not steps(Path(job.folder)):
        dry_step(config, data, workers.device)  # on a GPU: too little memory shows now, not in the last stage
    trainer = Trainer(config, data, Path(job.folder))
    spool: Spool | None = None
    watch: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if workers.first:
        spool = Spool(Path(job.folder))
        described = {"params": flatten(config), "config": to_yaml(config)}
        spool.describe(described | {"corpus": dataclasses.asdict(config.data.corpus), "fingerprint": data.fingerprint})
        if config.tracking.system_metrics:
            watch = system_metrics(spool)

    def log(step: int, metrics: dict[str, float]) -> None:
        if spool is not None:
            spool.append(step, metrics | {"training_seconds": trainer.seconds})
        if "held_out_loss" in metrics:
            ends = {"complete": step == trainer.plan.total_steps, "paused": step == job.until}
            report({**metrics, "step": step, "seconds": trainer.seconds, **ends})

    with watch:
        trainer.train(log, job.until, stop.watch(Path(job.stop)))
    if spool is not None:
        spool.close()
