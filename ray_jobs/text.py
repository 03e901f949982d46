"""The text of a run that goes on: the same as it began with, whatever has become of the corpus."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from gsa import spool
from gsa.config import TrainConfig
from gsa.data.packing import Prepared, cached_copy, prepare
from gsa.errors import ConfigError, InfrastructureError, RequestError, one_line


def prepare_same(config: TrainConfig, runs: Iterable[Path], command: Sequence[str], prefix: str = "") -> Prepared:
    """Tokenized text, held to what earlier runs were trained on.

    Args:
        config: of the runs.
        runs: their folders; those that have not begun say nothing.
        command: continues them.
        prefix: of the configuration's keys, `train.` in a sweep.

    Raises:
        RequestError: the text cannot be read, or is another than they began with. Where the tokenized copy that they
            began with is still in the cache, the error says how to go on with it.
        InfrastructureError: the disk or the storage failed.
    """
    cache = Path(config.storage) / "data"
    began = next(filter(None, map(_fingerprint, runs)), None)
    copy = None if began is None else cached_copy(cache, began, config.data)
    offer = ""
    if copy is not None:
        again = shlex.join([*command, f"{prefix}data.prepared={copy}"])
        offer = f"; to go on with the tokenized copy that it began with: {again}"
    try:
        found = prepare(config.data, cache)
    except RequestError as error:
        raise RequestError(f"{error}{offer}") from error
    except OSError as error:  # a full disk, for example
        raise InfrastructureError(f"the text cannot be tokenized into {cache} ({one_line(error)})") from error
    if began not in (None, found.fingerprint):
        source = config.data.corpus.source
        raise ConfigError(f"{prefix}data.corpus.source", source, f"the text has changed since the run began{offer}")
    return found


def _fingerprint(folder: Path) -> str | None:
    """That of the text that a run was trained on; None before it has begun."""
    found = spool.description(folder)
    return None if found is None else str(found["fingerprint"])
