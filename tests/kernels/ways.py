"""Every way of finding the best keys, however few there are."""

import pytest

import kernels.enclose
import kernels.rows

WAYS: dict[str, dict[str, float]] = {
    "few": {}, "rows": {}, "long rows": {}, "marks": {"ROOM": 0},
    "wrong bounds": {"ROOM": 0, "MANY": 0, "LIKELY": -0.1},
}  # fmt: skip


def go_the_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Find the best keys as in sequences of another length; with bounds that are wrong for half of the queries."""
    for name, value in WAYS[way].items():
        monkeypatch.setattr(kernels.rows if name == "ROOM" else kernels.enclose, name, value)
