"""One line of a sweep's record: what each event holds, checked when it is read.

A record is a file that people copy, mend and look at with an editor; nothing of it is believed before it was checked.
`ray_jobs.record` checks that the events, each sound by itself, also follow from one another.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

Event = dict[str, Any]


class Kind(NamedTuple):
    """What a field holds."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_values(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_steps(value: Any) -> bool:
    return isinstance(value, dict) and all(key.isdecimal() and _is_values(found) for key, found in value.items())


NAME = Kind("text", lambda value: isinstance(value, str))
NAME_OR_NOTHING = Kind("text or null", lambda value: value is None or isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", _is_number)
COUNT = Kind("a whole number >= 0", _is_count)
COUNT_OR_NOTHING = Kind("a whole number >= 0 or null", lambda value: value is None or _is_count(value))
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
VALUES = Kind("a mapping of names to numbers", _is_values)
STEPS = Kind("a mapping of steps to mappings of names to numbers", _is_steps)
OBJECTIVES = Kind(
    "a list of numbers or null",
    lambda value: value is None or (isinstance(value, list) and all(map(_is_number, value))),
)
STATE = Kind(
    "RUNNING, PAUSED, COMPLETE, PRUNED or FAIL", ("RUNNING", "PAUSED", "COMPLETE", "PRUNED", "FAIL").__contains__
)

# of every event; `line` is its number in the file, and tells of lines that were lost, added or moved
COMMON = {"time": NUMBER}
COMMON_OPTIONAL = {"line": COUNT}
REQUIRED: dict[str, dict[str, Kind]] = {
    "life": {},
    "propose": {"trial_id": NAME, "params": MAPPING, "settings": MAPPING},
    "result": {"trial_id": NAME, "sequence": COUNT, "step": COUNT, "values": VALUES, "seconds": NUMBER},
    "pause": {"trial_id": NAME},
    "promote": {"trial_id": NAME, "until": COUNT_OR_NOTHING},
    "end": {"trial_id": NAME, "state": STATE, "values": OBJECTIVES, "reason": NAME},
}
OPTIONAL: dict[str, dict[str, Kind]] = {
    "life": {"config": MAPPING},
    "propose": {
        "baseline": FLAG, "confirms": NAME_OR_NOTHING, "imported": NAME_OR_NOTHING, "state": STATE,
        "until": COUNT_OR_NOTHING, "steps": STEPS, "values": OBJECTIVES, "reason": NAME, "ran": FLAG,
        "seconds": NUMBER, "sampler": MAPPING,
    },
}  # fmt: skip


def parse(line: bytes) -> Event:
    """The event that a line holds.

    Raises:
        ValueError: it holds none; the message says why, and goes on after "line 17: ".
    """
    if not line.strip():
        raise ValueError("is blank")
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(event, dict):
        raise ValueError(f"must hold a JSON object, not {type(event).__name__}")
    kind = event.get("event")
    if not isinstance(kind, str) or kind not in REQUIRED:
        raise ValueError(f"event = {kind!r}: must be one of {', '.join(REQUIRED)}")
    required = COMMON | REQUIRED[kind]
    for name, field in (required | COMMON_OPTIONAL | OPTIONAL.get(kind, {})).items():
        if name not in event and name in required:
            raise ValueError(f"{kind} without {name}")
        if name in event and not field.holds(event[name]):
            raise ValueError(f"{kind}.{name} = {event[name]!r}: must be {field.words}")
    if kind == "propose":  # it is a trial, field by field
        unknown = event.keys() - required.keys() - COMMON_OPTIONAL.keys() - OPTIONAL[kind].keys() - {"event"}
        if unknown:
            raise ValueError(f"{kind}.{min(unknown)}: no such field")
    return event
