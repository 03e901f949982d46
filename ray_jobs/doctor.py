"""What this machine can and cannot do, and why."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

import kernels
from gsa.errors import ConfigError

OURS = ("torch", "ray", "mlflow", "optuna", "datasets", "tokenizers", "omegaconf")


@dataclasses.dataclass(frozen=True)
class Finding:
    name: str
    ok: bool | None  # None: cannot be done here, and need not be
    detail: str


def examine(storage: Path) -> list[Finding]:
    """Look at everything that a sweep needs."""
    return [_python(), *_packages(), _kernels(), _gpu(), _cpus(), _disk(storage), _hub()]


def examine_cluster(path: Path, sweeps: Sequence[Path]) -> list[Finding]:
    """Look at a cluster's file, and at whether sweeps can run on it; the name of what is wrong is its place, FILE:LINE.

    Raises:
        RequestError: a file cannot be read.
    """
    from ray_jobs.cluster_file import check
    from ray_jobs.sweep import read_sweep

    checked = check(path)
    found = [Finding(f"{path}:{p.line}", False, str(p)) for p in checked.problems]
    found += [Finding(str(path), None, note) for note in checked.notes]
    if checked.fleet is None:
        found.append(Finding("capacity", None, "is not known before the file is right"))
        return found
    kinds = ", ".join(f"0 to {node.most} {node.name}" for node in checked.fleet.growing)
    found.append(Finding(str(path), True, f"{kinds}, {checked.fleet.most} at most together"))
    for sweep in sweeps:
        try:
            runs = checked.fleet.runs(read_sweep(sweep).train.workers, "train.workers")
            found.append(Finding(str(sweep), True, f"{runs} trials at once"))
        except ConfigError as error:
            found.append(Finding(str(sweep), False, str(error)))
    return found


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print a table; what is long is wrapped."""
    table = Table("", Column(overflow="fold"), Column(overflow="fold"), show_header=False)
    for finding in findings:
        mark = {True: "[green]ok[/]", False: "[red]wrong[/]", None: "[yellow]no[/]"}[finding.ok]
        table.add_row(mark, escape(finding.name), escape(finding.detail))
    console.print(table)


def _python() -> Finding:
    version = platform.python_version_tuple()
    return Finding(
        "Python", (int(version[0]), int(version[1])) >= (3, 11), f"{platform.python_version()}, needs >= 3.11"
    )


def _packages() -> list[Finding]:
    found = []
    for name in OURS:
        try:
            found.append(Finding(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, False, "is not installed: run make sweep or pip install ."))
    return found


def _kernels() -> Finding:
    """The Hugging Face package `kernels` has the import name of ours; whichever comes first on the path wins."""
    file = Path(kernels.__file__ or "")
    if (file.parent / "support.py").is_file() and kernels.__doc__ and "Gated Sparse Attention" in kernels.__doc__:
        return Finding("kernels", True, f"ours, {file.parent}")
    return Finding(
        "kernels", False, f"{file.parent} shadows ours: uninstall the Hugging Face package (pip uninstall kernels)"
    )


def _gpu() -> Finding:
    from kernels.support import problem

    why = problem()
    if why is None:
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
        detail = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {free:.0f} of {total:.0f} GiB free"
        return Finding("GPU", True, detail)
    return Finding("GPU", None, f"{why}: models train on the CPU, with PyTorch attention")


def _cpus() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("CPUs", True, f"{count}: as many one-CPU trials at once")


def _disk(storage: Path) -> Finding:
    existing = next(p for p in [storage.absolute(), *storage.absolute().parents] if p.exists())
    if not os.access(existing, os.W_OK):
        return Finding("storage", False, f"{existing} cannot be written to")
    free = shutil.disk_usage(existing).free / 2**30
    return Finding("storage", free >= 1, f"{free:.1f} GiB free in {existing}, needs 1 GiB for the quickstart")


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
    if offline:
        return Finding("Hugging Face hub", None, "switched off by HF_HUB_OFFLINE: local text only")
    return Finding("Hugging Face hub", None, "asked only where data.corpus.source is hub")
