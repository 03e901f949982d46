"""What stands at a path that the command line was given, told apart before it is read as something that it is not.

Every refusal says what the path is and which command takes it.
"""

import codecs
import difflib
from pathlib import Path
from typing import Any

from gsa import plain
from gsa.errors import RequestError
from gsa.training.steps import steps
from ray_jobs.commands import Options, at_storage, gsa

HEAD = 4096  # bytes that tell text from binary
YAML = (".yaml", ".yml")
PLACES = ("configs/train", "configs/sweep")  # where a file that was given by its name alone may be
SEVERAL = 5  # names that are listed


def refuse_other_file(path: Path, wanted: str) -> None:
    """Raise RequestError where a path is not a configuration of the kind that a command takes.

    What is wrong inside a file of the right kind, whoever reads it says.

    Args:
        path: as it was given.
        wanted: `train`, `sweep` or `cluster`.
    """
    try:
        wrong = _wrong_file(path, wanted)
    except (OSError, ValueError):
        return  # a name that no path can have, or not ours to read: its reader says so
    if wrong:
        raise RequestError(f"{path}: {wrong}")


def refuse_other_source(source: str) -> None:
    """Raise RequestError where a path is given as a checkpoint and is something else, or nothing."""
    try:
        wrong = _wrong_source(source)
    except (OSError, ValueError):
        return
    if wrong:
        raise RequestError(f"{source}: is not a checkpoint{wrong}")


def _wrong_file(path: Path, wanted: str) -> str:
    if path.is_dir():
        return f"is a folder, not a configuration file{_folder(path)}"
    if not path.exists():
        return f"no such configuration file{_missing(path, wanted)}"
    if not path.is_file():
        return ""  # a pipe or a device, which its reader refuses unread
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "is text in UTF-16; save it as UTF-8"
    if b"\0" in head:
        kind = "MLflow's database" if head.startswith(b"SQLite format 3\0") else "binary"
        return f"is {kind}, not a configuration file{_checkpoint_around(path)}"
    return _wrong_kind(path, wanted)


def _wrong_source(source: str) -> str:
    path = Path(source)
    if source.startswith("runs:/") or (path / "checkpoint.json").exists() or steps(path):
        return ""
    if path.is_dir():
        return _folder(path) or ": has no step-*/checkpoint.json"
    if path.is_file():
        return f" but a file{_checkpoint_around(path) or '; give its folder, a run id or runs:/RUN_ID'}"
    named = Path("runs/train") / source
    return f"; did you mean {str(named)!r}?" if source == path.name and steps(named) else ""


def _wrong_kind(path: Path, wanted: str) -> str:
    try:
        kind = _kind(plain.parse(plain.read_text(path)))
    except plain.PlainError:
        return "holds JSON lines, not a configuration" if _is_json_lines(path) else ""
    if kind in ("", wanted):
        return ""
    doctor = gsa("doctor", options={"--cluster": path})
    command = {"train": gsa("train", path), "sweep": gsa("sweep", path), "cluster": doctor}
    kinds = {"train": "a training configuration", "sweep": "a sweep's configuration", "cluster": "a cluster's file"}
    return f"is {kinds[kind]}, not {kinds[wanted]}; it is for: {command[kind]}"


def _kind(content: Any) -> str:
    """The kind of a configuration, by the keys that it alone has."""
    keys = content.keys() if isinstance(content, dict) else set()
    if keys & {"cluster_name", "provider", "available_node_types", "apiVersion"}:
        return "cluster"
    if keys & {"space", "objectives", "num_samples", "scheduler"}:
        return "sweep"
    if keys & {"model", "data", "training"}:
        return "train"
    return ""


def _is_json_lines(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return all(line.startswith("{") and line.rstrip().endswith("}") for line in (file.readline(), file.readline()))


def _missing(path: Path, wanted: str) -> str:
    """Where it may be instead."""
    if "=" in path.name:
        return "; CONFIG comes before the settings that it replaces"
    around = {p.stem: p for p in _listed(path.parent) if p.suffix in YAML}
    close = difflib.get_close_matches(path.name.removesuffix(path.suffix), around, n=1)
    named = [place / f"{path.stem}.yaml" for place in map(Path, PLACES)]
    for found in [*(around[stem] for stem in close), *(p for p in named if p.is_file())]:
        return f"; did you mean {str(found)!r}?"
    if wanted == "sweep" and (Path("runs/sweeps") / path / "sweep.yaml").is_file():
        return f"; to continue the sweep of this name: {gsa('sweep', options={'--resume': path})}"
    return ""


def _folder(path: Path) -> str:
    """What a folder is."""
    if (path / "checkpoint.json").exists() or steps(path):
        return f" but a checkpoint; to measure it: {gsa('eval', path)}"
    if (path / "sweep.yaml").is_file():
        return f" but the folder of a sweep; to see its trials: {gsa('report', path.name, options=_storage(path))}"
    trained = [p for p in _listed(path / "train") if steps(p)]
    if trained or (path / "mlflow.db").exists():
        return f" but a storage folder{_names(', with checkpoints in', trained)}"
    return _names("; it has", [p for p in _listed(path) if p.suffix in YAML])


def _storage(sweep: Path) -> Options:
    return at_storage(sweep.absolute().parents[1]) if sweep.absolute().parent.name == "sweeps" else {}


def _checkpoint_around(path: Path) -> str:
    if not (path.parent / "checkpoint.json").exists():
        return ""
    return f"; it belongs to a checkpoint; to measure that: {gsa('eval', path.parent)}"


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _names(before: str, paths: list[Path]) -> str:
    if not paths:
        return ""
    more = f" and {len(paths) - SEVERAL} more" if len(paths) > SEVERAL else ""
    return f"{before} {', '.join(map(str, paths[:SEVERAL]))}{more}"
