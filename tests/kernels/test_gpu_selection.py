"""Selection on a GPU, in bf16, every way of finding the best keys: `make test-gpu`."""

import pytest
import torch

import kernels.best
from kernels.attend import attend, attend_definition
from kernels.bench import Indexer
from kernels.levels import pool
from kernels.rule import Rule, Scores, scores_definition
from kernels.select import select
from kernels.words import WORD, pack, unpack
from tests.draw import Draw
from tests.gpu import needs_gpu, off
from tests.kernels.ways import go_the_way

pytestmark = [pytest.mark.gpu, needs_gpu]
TANH = 2**-11  # the largest error of tanh.approx


@pytest.mark.parametrize("options", [{}, {"block": 32}, {"share": 32}, {"local_window": 40, "sink_tokens": 4}])
@pytest.mark.parametrize(("heads", "size"), [(1, 128), (4, 64)])
def test_selections_pass_the_certificate(
    heads: int, size: int, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only the kernel selected scores at least what only the definition did, up to the error of a score.

    On two levels, keys are left out of this whose block scores as the last one that is looked into, up to that error.
    """
    length, k = 9000, 256
    indexer = Indexer(length, heads, size, k, 0.9, **options)
    mine = unpack(indexer.select(), length)
    monkeypatch.setattr(kernels.best, "runs_triton", lambda _: False)
    exact = unpack(indexer.select(), length)
    assert torch.equal(mine.sum(-1), exact.sum(-1))
    differ = (mine != exact).any(-1)[0].nonzero().flatten()
    assert len(differ) < (0.04 if options.get("share") else 0.01) * length  # 32 queries of a window differ together
    if options.get("share"):
        return
    scores = scores_definition(
        Scores(indexer.q[:, differ], indexer.k, indexer.weight[:, differ], indexer.bias), "gated_sigmoid"
    )
    error = 2 * heads * TANH
    missed = (exact & ~mine)[:, differ]
    if block := options.get("block"):
        pooled, of_key = pool(indexer.k, torch.zeros(1, length, dtype=torch.long, device="cuda"), block)
        of_block = scores_definition(
            Scores(indexer.q[:, differ], pooled.to(indexer.k.dtype), indexer.weight[:, differ], indexer.bias),
            "gated_sigmoid",
        )
        own = (differ // block)[:, None]
        near = torch.arange(of_block.shape[2], device=own.device) >= own  # looked into whatever they score
        scored = of_block.masked_fill(near, -torch.inf).sort(descending=True).values
        looked_into = Rule(k=k, block=block).blocks(k)
        last = scored.gather(2, (own.clamp(1, looked_into) - 1)[None])
        sure = (of_block > last + error) | near | (own <= looked_into)
        missed &= sure.gather(2, of_key[:, None].expand_as(missed))
    missed = scores.masked_fill(~missed, -torch.inf).amax(-1)
    extra = scores.masked_fill(~(mine & ~exact)[:, differ], torch.inf).amin(-1)
    assert (missed - extra <= error).all()


@pytest.mark.parametrize(
    ("length", "way"),
    [(1, "few"), (13, "few"), (5000, "rows"), (70, "long rows"), (5000, "marks"), (5000, "wrong bounds")],
)
@pytest.mark.parametrize(("kind", "heads", "size"), [("gated_sigmoid", 1, 128), ("relu", 4, 64)])
def test_selections_of_exactly_representable_scores_are_exact(
    draw: Draw, kind: str, heads: int, size: int, length: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small integers, many of them equal: every row as the definition has it, for all and for the last few queries."""
    go_the_way(way, monkeypatch)
    keys, k = 12_000 if way == "long rows" else 5000, draw.random.choice([1, 100, 512])
    q, index_k = draw.integers(-2, 2, 2, length, heads, size), draw.integers(-2, 2, 2, keys, size)
    weight = torch.ones(2, length, heads)
    starts = torch.zeros(2, keys, dtype=torch.long)
    starts[:, 1000:] = 1000
    wanted = draw.integers(0, k, 2, length)
    rounded = (x.bfloat16() for x in (q, index_k, weight))
    inputs = [x.cuda() for x in (*rounded, torch.zeros(heads), starts, wanted)]
    found = []
    for _ in range(2):
        found.append(select(*inputs, inputs[-1], None, None, None, kind=kind, k_base=k, k_max=k, local_window=3)[0])
        monkeypatch.setattr(kernels.best, "runs_triton", lambda _: False)
    assert torch.equal(*found)


@pytest.mark.parametrize("way", ["rows", "marks", "wrong bounds"])
@pytest.mark.parametrize(("heads", "size"), [(1, 128), (4, 64)])
def test_nan_and_infinite_scores_rank_first(
    draw: Draw, heads: int, size: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_the_way(way, monkeypatch)
    length, k = 5000, 300
    q, index_k = torch.rand(1, length, heads, size) + 1, draw.normal(1, length, size).float()
    index_k[:, [3, 50]], index_k[:, 77] = torch.nan, torch.inf
    weight, starts = torch.ones(1, length, heads), torch.zeros(1, length, dtype=torch.long)
    inputs = [x.cuda() for x in (q.bfloat16(), index_k.bfloat16(), weight.bfloat16())]
    wanted = torch.full((1, length), k).cuda()
    words, *_ = select(*inputs, None, starts.cuda(), wanted, wanted, None, None, None, kind="relu", k_base=k, k_max=k)
    mask = unpack(words, length)
    assert mask[:, 77:, [3, 50, 77]].all()
    assert torch.equal(mask.sum(-1)[0].cpu(), torch.arange(1, length + 1).clamp_max(k))


def test_rows_of_128k_tokens_equal_the_definition() -> None:
    """Spot rows: selections by the certificate, outputs within bf16's rounding of fp64."""
    length, k, heads = 131_072, 2048, 8
    indexer = Indexer(length, 4, 64, k, 0.99)
    q, key, value = (torch.randn(1, length, n, 128, device="cuda").bfloat16() for n in (heads, 2, 2))
    words = indexer.select()
    out, _ = attend(q, key, value, words, k)
    rows = torch.cat((torch.tensor([0, 1, 31, 2047, 2048, 65_536, length - 1]), torch.randint(0, length, (25,)))).cuda()
    selected = ((words[:, rows // WORD] >> (rows % WORD)[:, None].int()) & 1).bool()
    of_rows = Scores(indexer.q[:, rows], indexer.k, indexer.weight[:, rows], indexer.bias)
    scores = scores_definition(of_rows, "gated_sigmoid")
    visible = torch.arange(length, device="cuda") <= rows[:, None]
    assert not (selected & ~visible).any()
    assert torch.equal(selected.sum(-1)[0], (rows + 1).clamp_max(k))
    least = scores.masked_fill(~selected, torch.inf).amin(-1)
    most = scores.masked_fill(selected | ~visible, -torch.inf).amax(-1)
    assert (most - least <= 2 * 4 * TANH).all()
    packed = pack(selected)
    expected, _ = attend_definition(q[:, rows].double(), key.double(), value.double(), packed)
    assert off(out[:, rows], expected) < 0.005
