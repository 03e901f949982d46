"""A new search that knows what an earlier one found: its trials that are points of the new space, with what they had
reached at each step."""

import copy
import dataclasses
from collections import Counter
from typing import Any

from gsa.config import TrainConfig, assign, build, flatten, lookup
from gsa.errors import ConfigError, RequestError
from gsa.schema import field_of
from gsa.settings import nearest
from gsa.tracking import Tracking
from ray_jobs.objectives import Aims
from ray_jobs.record import COMPLETE, PAUSED, Entry, Params
from ray_jobs.reporting.recorded import trials_of
from ray_jobs.runs import run_key
from ray_jobs.space import Space
from ray_jobs.stored import stored_sweep

# what may differ between two trainings whose results are comparable
FREE = ("name", "storage", "seed", "tracking", "workers")


@dataclasses.dataclass
class Matching:
    """What was found in an earlier sweep."""

    entries: list[Entry]
    gone: list[str]  # keys that no longer exist
    differing: Counter[str]  # key, to the number of trials that it kept from being taken over
    trials: int  # that have results
    notes: list[str] = dataclasses.field(default_factory=list)  # what is in the store and could not be read

    def summary(self, sweep: str) -> str:
        words = [f"warm start: {len(self.entries)} of {self.trials} trials of {sweep} are taken over"]
        if self.gone:
            words.append(f"no longer there: {', '.join(self.gone)}")
        words += [f"{count} differ in {key}" for key, count in self.differing.most_common(3)]
        return "; ".join([*words, *self.notes])


def matching(tracking: Tracking, sweep: str, space: Space, aims: Aims) -> Matching:
    """The trials of an earlier sweep in the same store that are points of a space.

    A trial matches if its whole configuration, but for `FREE`, is one that the space can propose.

    Raises:
        RequestError: there is no such sweep, or its run holds no configuration of one.
    """
    parent = tracking.find_run(run_key(sweep))
    if parent is None:
        hint = nearest(sweep, sorted(tracking.sweeps()))
        raise RequestError(f"warm_start = {sweep!r}: is not in {tracking.uri}{hint}")
    base, gone = _known(stored_sweep(tracking, parent.info.run_id).train)
    found = Matching([], gone, Counter(), 0)
    trials, found.notes = trials_of(tracking, parent)
    for trial in trials:
        run, state = trial.run, trial.state
        if state not in ("finished", "stopped_early") or trial.baseline or trial.confirms is not None:
            continue
        found.trials += 1
        data = copy.deepcopy(base)
        try:
            for key, value in trial.params.items():
                if _exists(key):
                    assign(TrainConfig, data, key, value)
                elif key not in found.gone:
                    found.gone.append(key)
            trained = build(TrainConfig, data)
        except ConfigError as error:
            found.differing[f"{error.key}, which is no longer allowed"] += 1
            continue
        except RequestError as error:
            found.differing[str(error)] += 1
            continue
        params, reason = _params(space, trained)
        if params is None:
            found.differing[reason] += 1
            continue
        steps = tracking.history(run.info.run_id, aims.metrics)
        whole = {step: values for step, values in steps.items() if aims.values(values) is not None}
        if not whole:
            found.differing["the objectives, which it did not measure"] += 1
            continue
        entry = Entry(f"import-{run.info.run_id[:8]}", params, space.settings(params), imported=run.info.run_id)
        entry.steps, entry.state = whole, COMPLETE if state == "finished" else PAUSED
        entry.values = aims.values(whole[max(whole)]) if state == "finished" else None
        found.entries.append(entry)
    return found


def _params(space: Space, trained: TrainConfig) -> tuple[Params | None, str]:
    """The parameters at which a space proposes a configuration, or None and the key in which none of its does."""
    params: Params = {}
    for dimension in space.dimensions:
        if not dimension.active(params):
            continue
        values = [lookup(trained, target) for target in dimension.targets]
        if any(value != values[0] for value in values):
            return None, dimension.key
        try:
            inside = dimension.distribution()._contains(
                dimension.distribution().to_internal_repr(dimension.internal(values[0]))
            )
        except ValueError:
            inside = False
        if not inside:
            return None, dimension.key
        params[dimension.key] = values[0]
    proposed, given = flatten(space.compose(space.settings(params))), flatten(trained)
    for key in proposed.keys() | given.keys():
        if key.split(".")[0] not in FREE and proposed.get(key) != given.get(key):
            return None, key
    return params, ""


def _exists(key: str) -> bool:
    try:
        field_of(TrainConfig, key)
    except RequestError:
        return False
    return True


def _known(data: dict[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Plain data without settings that no longer exist, and these."""
    kept, gone = {}, []
    for key, value in data.items():
        name = f"{prefix}.{key}" if prefix else key
        if not _exists(name):
            gone.append(name)
        elif isinstance(value, dict) and value:
            kept[key], more = _known(value, name)
            gone += more
        else:
            kept[key] = value
    return kept, gone
