"""The training loop, the same for CPU and GPU, one worker or many.

- The position in the data is the number of sequences consumed, and nothing draws random numbers while it
  trains: a run resumed from a checkpoint equals the uninterrupted one bit for bit on a CPU.
- Data parallelism is applied from outside: the model never knows.
- What it measures goes to the `log` it is given; it knows neither Ray nor MLflow.
"""

import contextlib
import dataclasses
import logging
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gsa.attention.config import Stage
from gsa.attention.statistics import Sums, add, means
from gsa.data.packing import Prepared, Shuffled
from gsa.errors import ConfigError, RequestError, RunError
from gsa.evaluation.latency import measure_latency
from gsa.evaluation.loss import evaluate
from gsa.model import GSAForCausalLM
from gsa.settings import setting
from gsa.training import checkpoint
from gsa.training.optimizer import OptimizerConfig, clip, load_optimizer, make_optimizer, set_learning_rate
from gsa.training.precision import PRECISIONS
from gsa.training.spikes import SpikeCounter
from gsa.training.stages import Plan, StageConfig, freeze
from gsa.training.step import Losses, TrainingStep
from gsa.training.turns import Turns
from gsa.training.workers import Workers, WorkersConfig

if TYPE_CHECKING:
    from gsa.config import TrainConfig

logger = logging.getLogger(__name__)

Log = Callable[[int, dict[str, float]], None]
Stop = Callable[[], bool]


def _default_stages() -> list[StageConfig]:
    return [StageConfig("dense", 100), StageConfig("warmup", 20), StageConfig("sparse", 80)]


@dataclasses.dataclass
class TrainingConfig:
    stages: list[StageConfig] = setting(_default_stages, "stages, in order")
    batch_size: int = setting(8, "sequences per optimizer step, over all workers", ge=1)
    micro_batch_size: int = setting(8, "sequences per forward on one worker; gradients accumulate", ge=1)
    optimizer: OptimizerConfig = setting(OptimizerConfig, "AdamW and its schedule")
    precision: str = setting("auto", "auto: bf16 autocast on a GPU", choices=PRECISIONS)
    checkpoint_activations: bool = setting(False, "recompute blocks in the backward pass to save memory")
    compile: bool = setting(False, "torch.compile the step")
    log_every: int = setting(10, "optimizer steps between logged metrics", ge=1)
    checkpoint_every: int = setting(100, "optimizer steps between checkpoints; the last step always has one", ge=1)
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept", ge=1)

    def check(self, prefix: str) -> None:
        if not sum(stage.steps for stage in self.stages):
            raise ConfigError(f"{prefix}.stages", 0, "must have at least one step in all")
        if self.batch_size % self.micro_batch_size:
            allowed = f"must divide batch_size = {self.batch_size}"
            raise ConfigError(f"{prefix}.micro_batch_size", self.micro_batch_size, allowed)


def make_model(config: "TrainConfig", data: Prepared) -> GSAForCausalLM:
    """The model with its initial values, which depend on `seed` alone; fills in `config.model.vocab_size`.

    Raises:
        ConfigError: the vocabulary is smaller than the tokenizer's.
    """
    _set_vocabulary(config, data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return GSAForCausalLM(config.model, config.training.precision)


def total_steps(config: "TrainConfig", data: Prepared) -> int:
    """Optimizer steps of a run, without building its model; fills in and raises what `make_model` does."""
    _set_vocabulary(config, data)
    return Plan(config.training.stages, config.model.has_indexer).total_steps


def _set_vocabulary(config: "TrainConfig", data: Prepared) -> None:
    size = data.tokenizer.vocab_size
    if config.model.vocab_size is None:
        config.model.vocab_size = size
    if config.model.vocab_size < size:
        raise ConfigError("model.vocab_size", config.model.vocab_size, f"must be >= the tokenizer's, {size}")


class Trainer:
    """One run's state: model, optimizer, position and counters.

    Args:
        config: the run's settings.
        data: tokenized text.
        folder: where checkpoints go, shared by all workers. The newest one there is continued.

    Raises:
        RequestError: the batch cannot be shared out, or the newest checkpoint is corrupt or of another configuration.
    """

    def __init__(self, config: "TrainConfig", data: Prepared, folder: Path) -> None:
        self.config, self.data, self.folder = config, data, folder
        self.workers = Workers.current()
        training = config.training
        if training.batch_size % (self.workers.world * training.micro_batch_size):
            allowed = f"must be a multiple of workers x micro_batch_size, {self.workers.world} x "
            raise ConfigError("training.batch_size", training.batch_size, f"{allowed}{training.micro_batch_size}")
        self.model = make_model(config, data).to(self.workers.device)
        self.plan = Plan(training.stages, config.model.has_indexer)
        lengths = {self.plan.context_length(step) for step in range(self.plan.total_steps)}
        self.batches = {length: Shuffled(data.at(length).train, config.seed) for length in lengths}
        self.optimizer = make_optimizer(self.model, training.optimizer)
        self.parallel: DistributedDataParallel | None = None  # of this stage, where there are several workers
        self.spikes = SpikeCounter()
        self.turns = Turns(Path(tempfile.gettempdir()) / "gsa-turns", _shared(config.workers, self.workers.device))
        self.step = 0
        self.seconds = 0.0  # of training, evaluations included, in all lives of the run
        self.metrics: dict[str, float] = {}  # of the last step, empty where it was not logged
        if self.workers.first:
            checkpoint.remove_unfinished(folder)
        newest = checkpoint.latest(folder)
        if newest is not None:
            self._resume(newest)

    def train(self, log: Log, until: int | None = None, stop: Stop = lambda: False) -> dict[str, float]:
        """Train to the end of the last stage, or for `until` steps in all, which then end in an evaluation too.

        Args:
            log: called on every worker, with the number of finished steps and the metrics. A resumed run first repeats
                the call of its checkpoint's step.
            until: steps in all; None trains to the end.
            stop: asked on every worker before each step. Once it is true on any of them, all stop after the step that
                they have finished, with a checkpoint of it.

        Returns:
            The last metrics, evaluation included.

        Raises:
            RunError: the loss is not finite, or a checkpoint could not be written.
        """
        training, last = self.config.training, min(until or self.plan.total_steps, self.plan.total_steps)
        if self.metrics:
            # the checkpoint was written, but whoever wrote it may have died before it could log
            log(self.step, self.metrics)
        stage: Stage | None = None
        seconds, tokens = 0.0, 0
        self.model.train()
        saved = self.step
        while self.step < last and not self.workers.any(stop()):
            resumed_at = time.perf_counter()
            if self.step and self.plan.stage(self.step) != self.plan.stage(self.step - 1):
                self.spikes.new_stage()
            if self.plan.stage(self.step) != stage:
                stage = self.plan.stage(self.step)
                forward = self._wrap(TrainingStep(self.model, stage, training.checkpoint_activations))
            length = self.plan.context_length(self.step)
            done = self.step + 1
            logs = done % training.log_every == 0 or done == last
            began = time.perf_counter()
            with self.turns.training():
                metrics = self._optimize(forward, logs)
            seconds += time.perf_counter() - began
            self.step = done
            tokens += training.batch_size * (length or self.config.data.context_length)
            if done % self.config.evaluation.every == 0 or done == last:
                # the attention and the length that the steps so far have trained for, not the next stage's
                with self.turns.training():
                    metrics |= evaluate(self.model, self.data.at(length), self.config.evaluation, stage, self.workers)
                logs = True
            if done == last and self.config.evaluation.latency_length and self.workers.first:
                with self.turns.alone():
                    metrics |= measure_latency(self.model, self.data, self.config.evaluation.latency_length)
            if logs:
                metrics["tokens_per_second"] = tokens / seconds
                seconds, tokens = 0.0, 0
            self.metrics = metrics if logs else {}
            self.seconds += time.perf_counter() - resumed_at
            if done % training.checkpoint_every == 0 or done == last:
                # before it is logged: a trial that is stopped at its last report has its last checkpoint
                self._save()
                saved = done
            if logs:
                log(done, metrics)
        if self.step > saved:
            self._save()
        return self.metrics

    def _wrap(self, step: TrainingStep) -> nn.Module:
        freeze(self.model, step.stage)
        # kept beside the compiled module, which hides it: `no_sync` is DistributedDataParallel's own
        self.parallel = DistributedDataParallel(step, broadcast_buffers=False) if self.workers.world > 1 else None
        wrapped: nn.Module = self.parallel or step
        return torch.compile(wrapped) if self.config.training.compile else wrapped  # type: ignore[return-value]

    def _optimize(self, forward: nn.Module, measure: bool) -> dict[str, float]:
        """One optimizer step over the global batch; metrics are the global batch's too."""
        training, workers = self.config.training, self.workers
        rate = set_learning_rate(self.optimizer, training.optimizer, self.step, self.plan.total_steps)
        local = training.batch_size // workers.world
        length = self.plan.context_length(self.step)
        first = self.plan.steps_before(self.step, length) * training.batch_size + workers.rank * local
        micros = local // training.micro_batch_size
        results: list[Losses] = []
        for i in range(micros):
            batch = self.batches[length].batch(first + i * training.micro_batch_size, training.micro_batch_size)
            last = i + 1 == micros
            # gradients of all but the last micro-batch stay on this worker: one all-reduce per optimizer step
            alone = self.parallel.no_sync() if self.parallel is not None and not last else contextlib.nullcontext()
            with alone, self.model.autocast():
                losses: Losses = forward(batch.to(workers.device), measure)
                (losses.total / micros).backward()
            results.append(losses)
        metrics = self._sum_up(results, measure)
        self._refuse_nonfinite(metrics)
        indexer = self.model.indexer_parameters()
        apart = {id(p) for p in indexer}
        norm = training.optimizer.clip_norm
        metrics["gradient_norm"] = clip([p for p in self.model.parameters() if id(p) not in apart], norm)
        metrics["indexer_gradient_norm"] = clip(indexer, norm)
        metrics["learning_rate"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.spikes.add(metrics["loss"])
        metrics["loss_spikes"] = float(self.spikes.count)
        return metrics

    def _sum_up(self, results: list[Losses], measure: bool) -> dict[str, float]:
        metrics = {"loss": _mean([r.language for r in results])}
        indexer = [r.indexer.detach() for r in results if r.indexer is not None]
        if indexer:
            metrics["indexer_kl"] = _mean(indexer)
        metrics = self.workers.mean(metrics)
        if measure:
            sums: Sums = {}
            for result in results:
                add(sums, result.statistics)
            by_layer = means({name: self.workers.sum(total) for name, total in sums.items()})
            metrics |= {name: float(values.nanmean()) for name, values in by_layer.items()}
            largest = torch.stack([r.max_activation.amax() for r in results if r.max_activation is not None])
            metrics["max_activation"] = float(self.workers.largest(largest.amax()))
        uncertainty = [r.uncertainty for r in results if r.uncertainty is not None]
        if uncertainty:
            self.model.update_references(self.workers.sum(torch.stack(uncertainty).sum(0)))
        return metrics

    def _refuse_nonfinite(self, metrics: dict[str, float]) -> None:
        for name in ("loss", "indexer_kl"):
            if not math.isfinite(metrics.get(name, 0.0)):
                rate = self.config.training.optimizer.learning_rate
                raise RunError(f"{name} is {metrics[name]} at step {self.step + 1}; learning rate {rate:g}")

    def _save(self) -> None:
        if self.workers.first:
            state = {
                "optimizer": self.optimizer.state_dict(),
                "spikes": self.spikes.state_dict(),
                "seconds": self.seconds,
                "sequences": self.step * self.config.training.batch_size,
                "data": self.data.fingerprint,
                "random": torch.get_rng_state(),
            }
            checkpoint.save(
                self.folder,
                self.step,
                model=self.model,
                state=state,
                config_yaml=self._config_yaml(),
                tokenizer=self.data.tokenizer,
                metrics=self.metrics,
                keep=self.config.training.keep_checkpoints,
            )
        self.workers.barrier()

    def _resume(self, newest: checkpoint.Checkpoint) -> None:
        newest.refuse_other(self.config)
        state = newest.state()
        if state["data"] != self.data.fingerprint:
            raise RequestError(f"{newest.folder}: was trained on other text; give the run another name")
        newest.load_model(self.model)
        load_optimizer(self.optimizer, self.model, state["optimizer"])
        self.spikes.load_state_dict(state["spikes"])
        torch.set_rng_state(state["random"])
        self.step, self.metrics, self.seconds = newest.step, dict(newest.metrics), state["seconds"]
        logger.info("continuing from %s", newest.folder)

    def _config_yaml(self) -> str:
        from gsa.config import to_yaml

        return to_yaml(self.config)


def _shared(config: WorkersConfig, device: torch.device) -> torch.device:
    """The device whose use has to be shared out in turns: a GPU of which a trial has a part. Else the CPU, which has no
    turns."""
    part = config.num_workers == 1 and config.gpus_per_worker % 1 > 0
    return device if part else torch.device("cpu")


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).double().mean())
