"""Checkpoints: folders that are either whole or not there.

- `model.safetensors`, `state.pt` (optimizer and loop; tensors and plain values only), `config.yaml`,
  `tokenizer.json`, and `checkpoint.json`, which lists the others with their SHA-256.
- Written beside their place, flushed to disk, then renamed: a crash or a full disk leaves the earlier ones intact.
  What a killed process left half written or half deleted has a name that starts with a dot, and is deleted by the next
  one that saves there.
- Nothing that is loaded can run code: safetensors, and `torch.load(weights_only=True)`.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from gsa import plain
from gsa.data.tokenizer import Tokenizer
from gsa.errors import ConfigError, InfrastructureError, RequestError, one_line
from gsa.model import GSAForCausalLM
from gsa.paths import of_user
from gsa.store import TrackingConfig
from gsa.training.agreement import difference
from gsa.training.steps import PREFIX, steps

if TYPE_CHECKING:
    from gsa.config import TrainConfig

FORMAT = "gsa-checkpoint-1"
FILES = {"model.safetensors", "state.pt", "config.yaml", "tokenizer.json"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose contents were verified."""

    folder: Path
    step: int
    metrics: dict[str, float]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Verify a folder.

        Raises:
            RequestError: it is no checkpoint of ours, or a file of it is missing or not as it was written.
        """
        try:
            index = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RequestError(f"{folder}: is not a checkpoint of this project (checkpoint.json: {error})") from error
        if not _is_index(index):
            raise RequestError(f"{folder}: checkpoint.json is not of the format {FORMAT}")
        for name, digest in index["sha256"].items():
            if not (folder / name).is_file():
                raise RequestError(f"{folder}: the checkpoint is corrupt: {name} is missing")
            if _sha256(folder / name) != digest:
                raise RequestError(f"{folder}: the checkpoint is corrupt: {name} is not as it was written")
        return cls(folder, index["step"], index["metrics"])

    def config(self) -> "TrainConfig":
        """The settings that the run had.

        Raises:
            RequestError: they are none of this version. The checkpoint may come from a store that others write to, so
                that it includes no files.
        """
        from gsa.config import TrainConfig, build

        path = self.folder / "config.yaml"
        try:
            data = plain.parse(plain.read_text(path), unquoted=True)
        except (OSError, ValueError) as error:
            raise RequestError(f"{path}: cannot be read as settings ({one_line(error)})") from error
        if not isinstance(data, dict):
            raise RequestError(f"{path}: must hold a mapping of settings")
        return build(TrainConfig, data)

    def refuse_other(self, config: "TrainConfig") -> None:
        """Hold a run that would go on from here to the settings it began with.

        Raises:
            ConfigError: it would not train the same: a setting of the model, the data or the training differs.
        """
        found = difference(self.config(), config)
        if found is not None:
            key, began, value = found
            allowed = f"was {began!r} when the run in {self.folder.parent} began; set another name"
            raise ConfigError(key, value, allowed)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "tokenizer.json")

    def load_model(self, model: GSAForCausalLM) -> None:
        """Fill a model with the stored weights and buffers.

        Raises:
            RequestError: the weights are of another model.
        """
        try:
            load_model(model, self.folder / "model.safetensors")
        except (RuntimeError, SafetensorError) as error:
            detail = one_line(error)[:300]
            raise RequestError(f"{self.folder}: the weights do not fit the model: {detail}") from error

    def state(self) -> dict[str, Any]:
        """What the optimizer and the loop had; tensors and plain values.

        Raises:
            RequestError: the file holds something else.
        """
        path = self.folder / "state.pt"
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise RequestError(f"{path}: holds more than tensors and plain values, or is no such file") from error
        if not isinstance(state, dict):
            raise RequestError(f"{path}: is not the state of a run")
        return state


def save(
    folder: Path,
    step: int,
    *,
    model: GSAForCausalLM,
    state: dict[str, Any],
    config_yaml: str,
    tokenizer: Tokenizer,
    metrics: dict[str, float],
    keep: int,
) -> Path:
    """Write `folder/step-…` and delete all but the last `keep`. One process at a time saves to a folder.

    A checkpoint of this step that is there already and whole stays as it is.

    Raises:
        InfrastructureError: it could not be written, a full disk for example; earlier checkpoints are intact.
    """
    target = folder / f"{PREFIX}{step:09d}"
    unfinished = folder / f".{target.name}.{os.getpid()}"
    if _is_whole(target):
        return target
    try:
        remove_unfinished(folder)
        unfinished.mkdir(parents=True)
        save_model(model, str(unfinished / "model.safetensors"))
        torch.save(state, unfinished / "state.pt")
        (unfinished / "config.yaml").write_text(config_yaml, encoding="utf-8")
        tokenizer.save(unfinished / "tokenizer.json")
        digests = {path.name: _sha256(path) for path in sorted(unfinished.iterdir())}
        index = {"format": FORMAT, "step": step, "metrics": metrics, "sha256": digests}
        (unfinished / "checkpoint.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        for path in (*unfinished.iterdir(), unfinished):
            _flush(path)
        shutil.rmtree(target, ignore_errors=True)  # it is not whole
        unfinished.rename(target)
        _flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors report a failed write in their own exceptions
        shutil.rmtree(unfinished, ignore_errors=True)
        last = next(iter(reversed(steps(folder))), None)
        kept = f"{last.name} is intact" if last else "there is no earlier one"
        free = shutil.disk_usage(folder).free / 2**20 if folder.exists() else 0
        raise InfrastructureError(
            f"checkpoint of step {step} could not be written to {folder} ({free:.0f} MiB free): {error}; {kept}"
        ) from error
    for old in steps(folder)[:-keep]:
        _remove(old)
    return target


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left in a run's folder; only for the one process that saves there."""
    for left in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    try:
        Checkpoint.open(folder)
    except RequestError:
        return False
    return True


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, which is whole as long as it has its name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}.old")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in a folder, verified; `None` where there is none."""
    found = steps(folder)
    return Checkpoint.open(found[-1]) if found else None


def load_checkpoint(source: str | Path) -> GSAForCausalLM:
    """A trained model, in evaluation mode; it generates in the precision that it was trained in.

    Args:
        source: a checkpoint folder, a run's folder of checkpoints, or `runs:/<run_id>` of an MLflow run
            (found through `MLFLOW_TRACKING_URI`, or in `runs/`).

    Raises:
        RequestError: there is no such checkpoint, or it is corrupt or foreign.
    """
    return load(find(source))


def load(checkpoint: Checkpoint) -> GSAForCausalLM:
    config = checkpoint.config()
    model = GSAForCausalLM(config.model, config.training.precision)
    checkpoint.load_model(model)
    return model.eval()


def named(source: str) -> str:
    """`runs:/<run_id>` for a run's id alone, anything else as it is."""
    return f"runs:/{source}" if re.fullmatch(r"[0-9a-f]{32}", source) and not Path(source).exists() else source


def find(source: str | Path, tracking: TrackingConfig | None = None, storage: str | Path = "runs") -> Checkpoint:
    """The verified checkpoint that `load_checkpoint` would load."""
    if str(source).startswith("runs:/"):
        from gsa.tracking import open_store

        store = open_store(tracking or TrackingConfig(), storage)
        source = store.download(str(source).removeprefix("runs:/"), "checkpoint")
    folder = Path(of_user(str(source)))
    with contextlib.suppress(OSError, ValueError):  # what no path can be, `open` refuses
        if not (folder / "checkpoint.json").exists() and steps(folder):
            folder = steps(folder)[-1]
    return Checkpoint.open(folder)


def _is_index(index: Any) -> bool:
    return (
        isinstance(index, dict)
        and index.get("format") == FORMAT
        and isinstance(index.get("step"), int)
        and isinstance(index.get("metrics"), dict)
        and isinstance(index.get("sha256"), dict)
        and set(index["sha256"]) == FILES
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
