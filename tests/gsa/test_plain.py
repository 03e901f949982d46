"""YAML that is taken is what PyYAML makes of it; what could do harm is refused, with its place, in no time."""

from typing import Any

import pytest
import yaml

from gsa.plain import DEPTH, VALUES, PlainError, parse
from tests.draw import Draw


def test_what_is_plain_is_what_the_safe_loader_makes_of_it(draw: Draw) -> None:
    pick = draw.random

    def value(depth: int) -> Any:
        kind = pick.randrange(8 if depth else 5)
        if kind > 5:
            return {f"k{i}": value(depth - 1) for i in range(pick.randint(0, 4))}
        if kind == 5:
            return [value(depth - 1) for _ in range(pick.randint(0, 4))]
        return [pick.random(), pick.randint(-9, 10**9), "é: [", True, None][kind]

    for _ in range(200):
        wanted = value(4)
        assert parse(yaml.safe_dump(wanted, allow_unicode=True)) == wanted
    shared = [1, 2]
    assert parse(yaml.safe_dump({"a": shared, "b": shared})) == {"a": shared, "b": shared}
    assert parse("a: &x {b: 1}\nc: {<<: *x, d: 2}") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: {b: 1, b: 2}", r"a\.b is in line 1 and again in line 1"),
        ("a: &x [*x]", r"a\[0\] in line 1 holds itself"),
        ("a: " + "[" * (DEPTH + 1) + "]" * (DEPTH + 1), f"nested deeper than {DEPTH}"),
        ("[" * 100_000, "nested deeper"),
        ("a: 1" + "0" * 200, "a in line 1 has more than 100 digits"),
        ("? [a]\n: b", "has a key that is not text"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("x: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
         + "".join(f"y{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 12)),
         f"aliases stand for more than {VALUES} values"),
    ],
)  # fmt: skip
def test_what_could_do_harm_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(PlainError, match=words):
        parse(text)
