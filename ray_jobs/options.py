"""Options that are given and would have no effect are refused: nobody should believe that they had one."""

import os
from collections.abc import Iterable
from pathlib import Path

import typer

from gsa.errors import RequestError
from ray_jobs.terminal import errors


def is_given(ctx: typer.Context, name: str) -> bool:
    """Whether a parameter stands in the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_unused(ctx: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise RequestError for the first of these options that stands in the command line."""
    for name in names:
        if is_given(ctx, name):
            raise RequestError(f"gsa {ctx.info_name}: --{name.replace('_', '-')} has no effect here: {why}")


def one_store(ctx: typer.Context, storage: Path, tracking_uri: str | None) -> None:
    """Of commands that only read MLflow: see that `--storage` is not passed over for another store.

    Raises:
        RequestError: both options are given.
    """
    if tracking_uri is not None:
        refuse_unused(ctx, ["storage"], f"runs are read from --tracking-uri {tracking_uri}; give one of them")
    elif is_given(ctx, "storage") and (uri := os.environ.get("MLFLOW_TRACKING_URI")):
        note = f"runs are read from MLFLOW_TRACKING_URI = {uri}, not from --storage {storage}"
        errors.print(note, markup=False, highlight=False, soft_wrap=True)


def one_source(ctx: typer.Context, source: str) -> None:
    """Of commands that take a run's id or a folder: a store is looked into for a run alone.

    Raises:
        RequestError: a folder, and options that say where runs are.
    """
    if os.path.exists(source):  # of what no path can be, it is false
        refuse_unused(ctx, ["tracking_uri", "experiment"], f"{source} is a folder, and no run of a store")
