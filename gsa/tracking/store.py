"""An MLflow store: what belongs to a run's id alone, whatever its experiment."""

import contextlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.entities import PagedList

from gsa.errors import RequestError, one_line

T = TypeVar("T")

logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it makes
for _name in ("mlflow.store", "sqlalchemy.pool"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)  # what they log with a traceback, they also raise
logging.getLogger("urllib3").setLevel(logging.ERROR)  # it tells of each try


class ArtifactError(RuntimeError):
    """An artifact could not be stored."""


class Store:
    """A store, whichever experiments it has. Made by `gsa.tracking.open_store`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.client = MlflowClient(uri)

    def upload(self, run_id: str, path: Path, place: str) -> None:
        """Store a file in, or a folder as, the artifact folder `place`.

        Raises:
            ArtifactError: it could not be stored, or was removed meanwhile.
        """
        try:
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), place)
            else:
                self.client.log_artifact(run_id, str(path), place or None)
        except Exception as error:
            # where artifacts are kept, others' clients raise what they like: botocore, the disk, requests
            raise ArtifactError(f"{path}: {type(error).__name__}: {one_line(error)}") from error
        if not path.exists():  # what MLflow does not find, it does not miss
            raise ArtifactError(f"{path}: was removed while it was being stored")

    def download(self, run_id: str, place: str) -> Path:
        """A local copy of an artifact folder.

        Raises:
            RequestError: there is no such run, or it has no such artifact.
        """
        try:
            if not self.client.list_artifacts(run_id, place):
                raise RequestError(f"run {run_id} has no artifact {place!r} in {self.uri}")
            return Path(self.client.download_artifacts(run_id, place))
        except MlflowException as error:
            raise RequestError(f"run {run_id}: {error.message.splitlines()[0]} (store: {self.uri})") from error

    def read_text(self, run_id: str, place: str) -> str:
        """The text of an artifact.

        Raises:
            RequestError: there is no such run, or it has no such artifact.
        """
        try:
            with tempfile.TemporaryDirectory() as folder:
                return Path(self.client.download_artifacts(run_id, place, folder)).read_text(encoding="utf-8")
        except (MlflowException, OSError, UnicodeDecodeError) as error:
            message = error.message if isinstance(error, MlflowException) else str(error)
            raise RequestError(
                f"run {run_id}: artifact {place!r} cannot be read: {message.splitlines()[0]} (store: {self.uri})"
            ) from error

    def log_text(self, run_id: str, text: str, place: str) -> None:
        """Store a text as the artifact file `place`; one that is there is replaced."""
        self.client.log_text(run_id, text, place)

    def register(self, run_id: str, name: str, tags: dict[str, str] | None = None) -> str:
        """Make a run's checkpoint the newest version of a registered model; returns the version."""
        with contextlib.suppress(MlflowException):  # registered before
            self.client.create_registered_model(name)
        source = f"{self.client.get_run(run_id).info.artifact_uri}/checkpoint"
        return str(self.client.create_model_version(name, source, run_id, tags).version)


def every_page(ask: Callable[..., PagedList[T]]) -> list[T]:
    """All that a search of MLflow's client finds; it gives a page at a time."""
    found, token = [], None
    while True:
        page = ask(page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return found
