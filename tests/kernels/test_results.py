"""What RESULTS.md says was measured is what results.json holds."""

import pytest

from kernels.results import HERE, forwards, rendered


def test_the_table_of_forwards_is_that_of_the_numbers() -> None:
    document = (HERE / "RESULTS.md").read_text(encoding="utf-8")
    assert rendered(document) == document, "run `python -m kernels.results`"
    assert len(forwards()) == 26


def test_speedups_are_those_of_the_times_but_for_their_digits() -> None:
    for row in forwards():
        assert row["speedup"] == pytest.approx(row["cudnn_ms"] / row["together_ms"], rel=0.04), row
        if "kernels_ms" in row:
            assert row["kernels_speedup"] == pytest.approx(row["cudnn_ms"] / row["kernels_ms"], rel=0.04), row


def test_a_document_without_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no table of forwards"):
        rendered("# What the kernels were measured at\n")
