"""Everything that is measured of one trained checkpoint."""

import dataclasses
import json
import re
from pathlib import Path

from gsa.config import TrainConfig
from gsa.data.packing import Prepared, prepare
from gsa.errors import ConfigError, RequestError
from gsa.evaluation.loss import evaluate
from gsa.evaluation.retrieval import Retrieval, retrieve
from gsa.store import TrackingConfig
from gsa.training import checkpoint
from gsa.training.checkpoint import Checkpoint
from gsa.training.workers import Workers


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    step: int
    metrics: dict[str, float]  # held-out loss and means over the layers
    layers: list[dict[str, float]]  # the same by layer
    retrieval: list[Retrieval]
    retrieval_refused: str  # why there is no retrieval, empty where there is

    @property
    def layer_names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.layers for name in row))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def trained(source: str, tracking: TrackingConfig, storage: Path) -> tuple[Checkpoint, TrainConfig, Prepared]:
    """A checkpoint, its configuration and the text that it was trained on.

    Args:
        source: a folder, `runs:/<run_id>` or a run id.
        tracking, storage: where runs are found, and where tokenized text is cached.

    Raises:
        RequestError: there is no such checkpoint, or its text is not the text it was trained on.
    """
    source = checkpoint.named(source)
    found = checkpoint.find(source, tracking, storage)
    config = found.config()
    data = prepare(config.data, storage / "data")
    if data.fingerprint != found.state().get("data"):
        raise RequestError(f"{source}: the text of data.corpus is not what it was when this was trained")
    return found, config, data


def evaluate_checkpoint(source: str, tracking: TrackingConfig, storage: Path) -> CheckpointReport:
    """Evaluate a checkpoint on the held-out text and in the precision of its own configuration, with sparse attention.

    Args:
        source: a folder, `runs:/<run_id>` or a run id.
        tracking, storage: where runs are found, and where tokenized text is cached.

    Raises:
        RequestError: there is no such checkpoint, or its text is not the text it was trained on.
    """
    found, config, data = trained(source, tracking, storage)
    workers = Workers.current()
    model = checkpoint.load(found).to(workers.device)
    metrics = evaluate(model, data, config.evaluation, "sparse", workers)
    retrieval, refused = [], ""
    try:
        retrieval = retrieve(model, data, config.data.context_length)
    except ConfigError as error:
        refused = str(error)
    layers: list[dict[str, float]] = [{} for _ in range(config.model.num_layers)]
    means = {}
    for name, value in metrics.items():
        by_layer = re.fullmatch(r"layer_(\d+)/(.+)", name)
        if by_layer:
            layers[int(by_layer[1])][by_layer[2]] = value
        else:
            means[name] = value
    return CheckpointReport(found.step, means, layers, retrieval, refused)
