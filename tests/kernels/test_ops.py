"""The custom operators: what PyTorch demands of them, and kernels against their definitions."""

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import kernels.enclose
import kernels.rows
from kernels.attend import attend
from kernels.divergence import divergence, divergence_gradients
from kernels.few import choose_few
from kernels.rule import Asked, Rule, Scores, scores_definition
from kernels.select import select
from kernels.support import problem
from kernels.target import target_definition
from kernels.windows import Windows, spread, spread_definition, visible
from kernels.words import pack, unpack
from tests.draw import INDEXERS, Draw

pytestmark = pytest.mark.slow  # kernels are interpreted

MODULES = [importlib.import_module(f"kernels.{name}") for name in ("attend", "best", "divergence", "levels", "windows")]


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators go to their PyTorch definitions, as they do on a CPU outside of Triton's interpreter."""
    use_definitions(monkeypatch)


def use_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES:
        monkeypatch.setattr(module, "runs_triton", lambda _: False)


@pytest.fixture(params=["rows", "marks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the best keys of more than a few queries are found: as in short sequences, or as in long ones."""
    if request.param == "marks":
        monkeypatch.setattr(kernels.rows, "ROOM", 0)
    return str(request.param)


def normal(draw: Draw, *shape: int) -> Tensor:
    return draw.normal(*shape, dtype=torch.float32)


def causal(draw: Draw, batch: int, length: int, keys: int) -> Tensor:
    """A random selection that looks at no later key; some queries select nothing."""
    positions = torch.arange(keys - length, keys)
    return (draw.integers(0, 2, batch, length, keys) == 0) & (torch.arange(keys) <= positions[:, None])


def attention(draw: Draw, group: int = 2, length: int = 35, keys: int = 40, size: int = 16) -> list[Any]:
    kv_heads = draw.random.choice([1, 2])
    words = pack(causal(draw, 2, length, keys))
    q, k, v = (normal(draw, 2, n, h, size) for n, h in ((length, kv_heads * group), (keys, kv_heads), (keys, kv_heads)))
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), words, keys]


def kl(draw: Draw, kind: str, at_once: bool) -> list[Any]:
    """Inputs of `divergence`; `at_once`: of which the last key is not selected, so that gradients are made at once."""
    q, k, v, words, keys = attention(draw)
    most = keys - at_once
    words[..., most:] = 0
    lse = attend(q, k, v, words, keys)[1].detach()
    heads, size = draw.random.choice([(1, 24), (3, 16)])
    index_q, index_k = normal(draw, *q.shape[:2], heads, size), normal(draw, *k.shape[:2], size)
    weight = None if kind == "sigmoid" else normal(draw, *q.shape[:2], heads).sigmoid()
    bias = None if kind == "relu" else normal(draw, heads)
    trained = [None if x is None else x.requires_grad_() for x in (index_q, index_k, weight, bias)]
    return [q.detach(), k.detach(), lse, words, *trained, most, kind, 10.0]


def selection(draw: Draw, controller: str, kind: str, keys: int, length: int, integers: bool, **options: Any) -> Any:
    heads, size = draw.random.choice([(1, 16), (1, 24), (3, 16)])
    q, k = normal(draw, 2, length, heads, size), normal(draw, 2, keys, size)
    weight, bias = normal(draw, 2, length, heads).sigmoid(), normal(draw, heads)
    if integers:  # products are exact, so that scores tie
        q, k = draw.integers(-1, 1, 2, length, heads, size).float(), draw.integers(-1, 1, 2, keys, size).float()
        weight = torch.ones_like(weight)
    starts = draw.random.choice([torch.zeros(2, keys, dtype=torch.long), draw.starts(2, keys)])
    k_min = draw.random.choice([1, 4])
    k_base = k_min + draw.random.choice([0, 5])
    k_max = k_base + draw.random.choice([0, 8])
    wanted = draw.integers(1, k_max, 2, length)
    of_kind = (None if kind == "sigmoid" else weight, None if kind == "relu" else bias)
    given = {"kind": kind, "controller": controller, "k_base": k_base, "k_min": k_min, "k_max": k_max}
    drawn = {"local_window": draw.random.choice([0, 3]), "sink_tokens": draw.random.choice([0, 2])}
    return (q, k, *of_kind, starts, wanted, wanted, torch.tensor(0.3), None, None), given | drawn | options


@pytest.mark.parametrize("deterministic", [False, True])
def test_attention_passes_opcheck(draw: Draw, definitions: None, deterministic: bool) -> None:
    torch.library.opcheck(attend, (*attention(draw), deterministic))


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("kind", INDEXERS)
def test_divergence_passes_opcheck(draw: Draw, definitions: None, kind: str, at_once: bool) -> None:
    inputs = kl(draw, kind, at_once)
    torch.library.opcheck(divergence, tuple(inputs))
    torch.library.opcheck(
        divergence_gradients, (*(None if x is None else x.detach() for x in inputs[:8]), *inputs[8:], False)
    )


def test_selection_and_windows_pass_opcheck(draw: Draw, definitions: None) -> None:
    for share in (1, 4):
        inputs, options = selection(draw, "variance", "relu", 40, 35, False, share=share)
        torch.library.opcheck(select, inputs, options)
    words = pack(causal(draw, 2, 64, 40))
    number, places = draw.integers(-1, 63, 2, 35), draw.integers(0, 39, 2, 2, 35)
    for carried in (None, draw.integers(0, 1, 2, 30).bool()):
        torch.library.opcheck(spread, (words, carried, number, *places))


@pytest.mark.parametrize("group", [1, 2, 3, 5, 80])
def test_attention_equals_its_definition(draw: Draw, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    length = draw.random.choice([1, 31, 70]) if group < 80 else 3
    inputs = attention(draw, group, length, length + draw.random.choice([0, 9]), draw.random.choice([16, 32]))
    found = []
    for _ in range(2):
        out, lse = attend(*inputs)
        found.append((out, lse, *torch.autograd.grad(out.square().sum(), inputs[:3])))
        use_definitions(monkeypatch)
    assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
    nothing = ~unpack(inputs[3], length).any(-1)
    assert (found[0][0][nothing] == 0).all()
    assert (found[0][1][nothing] == -torch.inf).all()


@pytest.mark.parametrize(("at_once", "trains"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", INDEXERS)
def test_divergence_equals_its_definition(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, kind: str, deterministic: bool, at_once: bool, trains: bool
) -> None:
    inputs = kl(draw, kind, at_once)
    trained = [x for x in inputs[4:8] if x is not None]
    found = []
    for _ in range(2):
        loss = divergence(*inputs, trains, deterministic)[0]
        found.append((loss, *torch.autograd.grad(loss.square(), trained)))
        use_definitions(monkeypatch)
    scale = 1 + 2 * found[1][0].item()  # what gradients are scaled by
    assert_close([x / scale for x in found[0]], [x / scale for x in found[1]], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", INDEXERS)
def test_gradients_of_the_divergence_are_those_of_autograd(draw: Draw, definitions: None, kind: str) -> None:
    """They are written out in `divergence_definition`; here the loss alone is, and PyTorch differentiates it."""
    q, k, lse, words, *given, most, _, tau = kl(draw, kind, at_once=True)
    trained = [x for x in given if x is not None]
    loss = divergence(q, k, lse, words, *given, most, kind, tau)[0]
    target = target_definition(q, k, lse, words)
    logits = (tau * scores_definition(Scores(*given), kind)).masked_fill(~unpack(words, q.shape[1]), -torch.inf)
    log_p = logits.log_softmax(-1)
    expected = (target * (target.clamp_min(1e-30).log() - log_p))[target > 0].sum()
    assert_close((loss,), (expected,), atol=1e-3, rtol=1e-4)
    found = torch.autograd.grad(loss, trained)
    assert_close(found, torch.autograd.grad(expected, trained), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", INDEXERS)
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("length", [7, 50])
def test_selection_equals_its_definition(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, way: str, kind: str, integers: bool, length: int
) -> None:
    """Many more keys than lists have room for: bounds are sampled, and where integers tie the sample says little.

    Scores of integers are exact, and selections equal. Of other scores each query by itself selects the highest.
    """
    controller = draw.random.choice(["given", "threshold", "variance", "entropy"])
    share, block = (draw.random.choice([1, 8, 32]), draw.random.choice([0, 8])) if integers else (1, 0)
    inputs, options = selection(draw, controller, kind, 170, length, integers, share=share, block=block)
    found = []
    for _ in range(2):
        found.append(select(*inputs, **options))
        use_definitions(monkeypatch)
    assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)
    mine, expected = (unpack(words, length) for words, _, _ in found)
    if integers:
        assert torch.equal(mine, expected)
        return
    assert_highest(mine, inputs, options)
    scores, reference = exact_scores(inputs, options), float(inputs[7])
    certain = torch.ones(2, length, dtype=torch.bool)
    if controller == "threshold":
        certain = ((scores - 1.0).abs() > ROUNDING).all(-1)
    elif controller != "given":
        wanted = options["k_base"] * (0.5 + 1 / (1 + found[1][1].double() / reference))
        certain = (wanted - wanted.round()).abs() > 1e-3
    off = (mine.sum(-1) - expected.sum(-1)).abs()
    assert not off[certain].any()
    assert (off <= 1).all()


ROUNDING = 1e-5  # of an fp32 score


def exact_scores(inputs: Any, options: dict[str, Any]) -> Tensor:
    """Scores in fp64 [B, T, S], infinite where a query does not see the key."""
    q, k, weight, bias, starts, *_ = inputs
    of_heads = (None if x is None else x.double() for x in (weight, bias))
    precise = Scores(q.double(), k.double(), *of_heads)
    key, first = torch.arange(k.shape[1]), k.shape[1] - q.shape[1]
    seen = (key >= starts[:, first:, None]) & (key <= key[first:, None])
    return scores_definition(precise, options["kind"]).masked_fill(~seen, -torch.inf)


def assert_highest(mask: Tensor, inputs: Any, options: dict[str, Any]) -> None:
    """No key that a query leaves out has a higher score than one that it takes and need not, but for rounding."""
    scores = exact_scores(inputs, options)
    key, first = torch.arange(mask.shape[2]), mask.shape[2] - mask.shape[1]
    forced = (key > key[first:, None] - options["local_window"]) | (
        key < inputs[4][:, first:, None] + options["sink_tokens"]
    )
    worst = scores.masked_fill(~mask | forced, torch.inf).amin(-1)
    best = scores.masked_fill(mask, -torch.inf).amax(-1)
    assert (worst >= best - 2 * ROUNDING).all()


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("deviations", [-0.5, 1.0])
def test_wrong_bounds_and_ceilings_change_nothing(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, integers: bool, deviations: float
) -> None:
    """Bounds that are too high and ceilings that are too low for half of the queries, or for a few."""
    monkeypatch.setattr(kernels.rows, "ROOM", 0)
    monkeypatch.setattr(kernels.enclose, "LIKELY", deviations)
    failed = []

    def counting(*given: Any) -> None:
        failed.append(int((given[-1] >= 0).sum()))
        choose_few(*given)

    monkeypatch.setattr(kernels.enclose, "choose_few", counting)
    length = 24
    inputs, options = selection(draw, "given", draw.random.choice(INDEXERS), 200, length, integers)
    q, k, weight, bias, starts, _, _, *rest = inputs
    wanted = draw.integers(20, 40, 2, length)
    given = (q, k, weight, bias, torch.zeros_like(starts), wanted, wanted, *rest)
    found = []
    for _ in range(2):
        found.append(unpack(select(*given, **options | {"k_base": 20, "k_max": 40})[0], length))
        use_definitions(monkeypatch)
    assert torch.equal(found[0].sum(-1), found[1].sum(-1))
    if integers:
        assert torch.equal(*found)
    assert_highest(found[0], given, options)
    if deviations < 0:
        assert sum(failed) > 5


@pytest.mark.parametrize("value", [0.0, 1e4, -1e4, 1e-30])
@pytest.mark.parametrize("length", [3, 40])
def test_equal_scores_select_the_earliest_keys(draw: Draw, way: str, value: float, length: int) -> None:
    inputs, options = selection(draw, "given", "relu", 150, length, True, local_window=0, sink_tokens=0)
    q, k, weight, bias, starts, wanted, _, *rest = inputs
    words, _, _ = select(torch.ones_like(q), k * 0 + value, weight, bias, starts, wanted, wanted, *rest, **options)
    place = torch.arange(150) - starts[:, 150 - length :, None]
    available = torch.arange(150 - length, 150) - starts[:, 150 - length :] + 1
    kept = torch.minimum(wanted.clamp(options["k_min"], options["k_max"]), available)
    assert torch.equal(unpack(words, length), (place >= 0) & (place < kept[..., None]))


@pytest.mark.parametrize("share", [1, 4])
@pytest.mark.parametrize("length", [3, 90])
def test_as_many_keys_are_kept_as_are_wanted_or_forced(draw: Draw, way: str, length: int, share: int) -> None:
    inputs, options = selection(draw, "given", draw.random.choice(INDEXERS), 150, length, False)
    local, sink = draw.random.randint(0, 6), draw.random.randint(0, 6)
    words, _, _ = select(*inputs, **options | {"local_window": local, "sink_tokens": sink, "share": share})
    mask, starts, wanted = unpack(words, length), inputs[4][:, 150 - length :], inputs[5]
    place = torch.arange(150 - length, 150)
    for b, t in itertools.product(range(2), range(length)):
        first = max(int(place[t] - (place[t] - starts[b, t]) % share), 0)  # of the window
        if first < 150 - length:
            continue  # led by a query that is not among these
        there = int(first - starts[b, t]) + 1
        forced = min(there, min(there, local) + min(there, sink))
        asked = int(wanted[b, first - 150 + length].clamp(options["k_min"], options["k_max"]))
        number = min(max(asked, forced), there)
        # the first of a window sees itself, chosen or not
        assert mask[b, t, : first + 1].sum() in ((number,) if local or share == 1 else (number, number + 1))
        assert mask[b, t, first + 1 :].sum() == place[t] - first


@pytest.mark.parametrize("length", [3, 40])
def test_nan_and_infinite_scores_rank_first(draw: Draw, way: str, length: int) -> None:
    inputs, options = selection(draw, "given", "relu", 150, length, True, local_window=0, sink_tokens=0)
    q, k, weight, bias, _, _, _, *rest = inputs
    starts, wanted = torch.zeros(2, 150, dtype=torch.long), torch.full((2, length), 4)
    options |= {"k_min": 1, "k_max": 4}
    k[:, [3, 50]], k[:, 77], q = torch.nan, torch.inf, q.abs() + 1
    words, _, _ = select(q, k, weight, bias, starts, wanted, wanted, *rest, **options)
    mask = unpack(words, length)
    assert mask[:, :, [3, 50, 77]].all()
    assert (mask.sum(-1) == 4).all()


@pytest.mark.parametrize("block", [0, 8])
def test_a_few_queries_select_what_they_do_among_many(draw: Draw, way: str, block: int) -> None:
    """Decoding against prefill, on small integers, whose scores are exact."""
    inputs, options = selection(draw, "given", "relu", 120, 60, True, block=block)
    q, k, weight, bias, starts, wanted, _, *rest = inputs
    whole, _, _ = select(q, k, weight, bias, starts, wanted, wanted, *rest, **options)
    for count in (1, 5):
        last = (q[:, -count:], k, weight[:, -count:], bias, starts, wanted[:, -count:], wanted[:, -count:], *rest)
        words, _, _ = select(*last, **options)
        assert torch.equal(unpack(words, count), unpack(whole, 60)[:, -count:])


@pytest.mark.parametrize("share", [1, 4])
def test_keys_beyond_the_last_query_are_not_looked_at(draw: Draw, share: int) -> None:
    """A cache with room to grow: rows of different lengths, and NaN where nothing is held yet."""
    length, keys = draw.random.choice([1, 5]), 60
    block = draw.random.choice([0, 8])
    inputs, options = selection(draw, "given", "sigmoid", keys, length, True, share=share, block=block)
    q, k, weight, bias, starts, wanted, _, reference, *_ = inputs
    past = draw.integers(8, keys - length, 2)
    for b in range(2):
        starts[b], k[b, past[b] + length :] = draw.random.randint(0, 7), torch.nan
    words, _, leader = select(q, k, weight, bias, starts, wanted, wanted, reference, None, past, **options)
    for b in range(2):
        held = int(past[b]) + length
        row = (None if x is None else x[b : b + 1] for x in (q, k[:, :held], weight))
        alone = (*row, bias, starts[b : b + 1, :held], wanted[b : b + 1], wanted[b : b + 1], reference, None, None)
        expected, _, led = select(*alone, **options)
        assert torch.equal(words[b, :, :held], expected[0])
        assert not words[b, :, held:].any()
        assert torch.equal(leader[b, : led.shape[1]], led[0])


def test_attention_without_keys_or_queries_is_nothing(draw: Draw) -> None:
    q, k = normal(draw, 1, 0, 2, 16), normal(draw, 1, 5, 1, 16)
    out, lse = attend(q, k, k, torch.zeros(1, 0, 5, dtype=torch.int32), 5)
    assert (out.shape, lse.shape) == (q.shape, (1, 0, 2))
    out, _ = attend(k.expand(1, 5, 1, 16), k, k, torch.zeros(1, 1, 5, dtype=torch.int32), 5)
    assert (out == 0).all()


@pytest.mark.parametrize("length", [5, 50])
def test_one_level_selects_what_two_do_where_all_keys_are_candidates(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    options = {"block": 8, "k_base": 12, "k_min": 12, "k_max": draw.random.choice([12, 20]), "candidates": 8}
    inputs, options = selection(draw, "given", "relu", 96, length, True, **options)
    nominal = inputs[5].clamp_min(12)
    inputs = (*inputs[:5], nominal, *inputs[6:])
    found = select(*inputs, **options)[0]
    assert not Rule(**{"k" if name == "k_base" else name: value for name, value in options.items()}).two_levels(96)
    monkeypatch.setattr(Rule, "two_levels", lambda *_: True)
    assert torch.equal(found, select(*inputs, **options)[0])


@pytest.mark.parametrize("share", [1, 3, 32])
def test_windows_equal_their_definition(draw: Draw, share: int) -> None:
    length, keys = draw.random.choice([1, 16, 75]), 80
    padding = draw.integers(0, keys, 2, 1)
    starts = draw.random.choice([torch.maximum(draw.starts(2, keys), padding), padding.expand(2, keys)])
    lasts = torch.arange(keys - length, keys).expand(2, -1)
    asked = Asked(starts[:, keys - length :], lasts, *draw.integers(1, 9, 2, 2, length))
    number_of_documents = 1 + int((starts.diff() != 0).sum(1).max())
    most = min(length, length // share + number_of_documents)
    found, expected = Windows.of(asked, share, most), Windows.definition(asked, share, most)
    for x, y in zip((*found[:3], *found.asked), (*expected[:3], *expected.asked), strict=True):
        assert torch.equal(x, y)
    assert (found.number < most).all()
    led = torch.where(found.firsts < keys - length, -1, found.leaders.gather(1, found.number.clamp_min(0).long()))
    assert torch.equal(led, (found.firsts - (keys - length)).clamp_min(-1).long())


@pytest.mark.parametrize("held", [None, 0, 20, 90])
def test_spreading_equals_its_definition(draw: Draw, held: int | None) -> None:
    length, keys = draw.random.choice([1, 32, 75]), 90
    limit = draw.random.choice([5, 50, keys])  # no selection goes as far as any query sees
    words = pack(draw.integers(0, 1, 2, 64, keys).bool() & (torch.arange(keys) < limit))
    number = draw.integers(-1, 63, 2, length)
    number = draw.random.choice([number, number[:, :1].expand(-1, length)])
    carried = None if held is None else draw.integers(0, 1, 2, held).bool() & (torch.arange(held) < limit)
    firsts, lasts = draw.integers(0, keys - 1, 2, length), draw.integers(limit - 1, keys - 1, 2, length)
    found = spread(words, carried, number, firsts, lasts)
    expected = spread_definition(words, carried, number, firsts, lasts)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_a_bound_on_documents_changes_no_selection(draw: Draw, way: str) -> None:
    length = draw.random.choice([5, 40, 75])
    inputs, options = selection(draw, "given", "gated_sigmoid", 80, length, False, share=draw.random.choice([4, 32]))
    documents = 1 + int((inputs[4].diff() != 0).sum(1).max())
    for x, y in zip(select(*inputs, **options), select(*inputs, **options, documents=documents), strict=True):
        assert torch.equal(x, y)


def test_visible_words_are_causal_and_stay_in_their_document(draw: Draw) -> None:
    key, period = torch.arange(110), draw.random.randint(50, 110)
    for starts in (draw.starts(2, 110), (key // period * period).expand(2, -1)):
        expected = (key >= starts[..., None]) & (key <= key[:, None])
        assert torch.equal(unpack(visible(starts, key, 110), 110), expected)
        assert torch.equal(unpack(pack(expected), 110), expected)


def test_some_rows_of_words_are_those_of_the_whole_selection(draw: Draw) -> None:
    length = draw.random.randint(1, 200)
    mask = torch.rand(2, length, 9, generator=draw.generator) < 0.5
    for _ in range(20):
        first = draw.random.randrange(length)
        count = draw.random.randint(0, length - first)
        assert torch.equal(unpack(pack(mask), count, first), mask[:, first : first + count])


def test_fixed_point_gradients_do_not_depend_on_order(draw: Draw) -> None:
    inputs = attention(draw, 2, 70, 70)
    found = []
    for _ in range(2):
        out, _ = attend(*inputs, True)
        found.append(torch.autograd.grad(out.sum(), inputs[:3]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_machine_is_a_constant_to_the_compiler() -> None:
    """What PyTorch's own decorator marks, without its import (`kernels.support.problem`)."""
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(problem).items() >= vars(marked).items() > {}.items()
