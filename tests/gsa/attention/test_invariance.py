"""What must not matter: later tokens, the rest of the batch, padding, packing, chunks, and how decoding is cut."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gsa.attention.attention import AttentionResult, GatedSparseAttention
from gsa.attention.cache import LayerCache
from tests.draw import CONTROLLERS, INDEXERS, Draw


def attend(layer: GatedSparseAttention, hidden: Tensor, starts: Tensor | None = None) -> AttentionResult:
    return layer.attend(hidden, starts, keep_selection=True)


def assert_same(got: AttentionResult, expected: AttentionResult, rows: slice, expected_rows: slice) -> None:
    """The same outputs, selections and so k_t, of the tokens `rows` of one and `expected_rows` of the other."""
    assert got.selection is not None
    assert expected.selection is not None
    assert torch.equal(got.selection[:, rows, rows], expected.selection[:, expected_rows, expected_rows])
    assert not got.selection[:, rows, : rows.start].any()
    assert_close(got.output[:, rows], expected.output[:, expected_rows], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_future_tokens_change_nothing(draw: Draw, controller: str, training: bool) -> None:
    for indexer in INDEXERS:
        layer = draw.layer(draw.config(controller, indexer)).train(training)
        hidden = draw.hidden(layer, 2, 16)
        starts = draw.random.choice([None, draw.starts(2, 16)])
        before = attend(layer, hidden, starts)
        s = draw.random.randint(1, 15)
        changed = hidden.clone()
        changed[:, s:] = 5 * draw.normal(*changed[:, s:].shape)
        assert_same(attend(layer, changed, starts), before, slice(0, s), slice(0, s))


def test_future_tokens_get_no_gradient_from_past_outputs(draw: Draw) -> None:
    for controller in CONTROLLERS:
        layer = draw.layer(draw.config(controller))
        hidden = draw.hidden(layer, 1, 12).requires_grad_()
        (gradient,) = torch.autograd.grad(layer(hidden)[:, :7].square().sum(), hidden)
        assert not gradient[:, 7:].any()
        assert gradient[:, :7].any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(draw: Draw, controller: str, training: bool) -> None:
    for indexer in INDEXERS:
        layer = draw.layer(draw.config(controller, indexer)).train(training)
        hidden, starts = draw.hidden(layer, 3, 13), draw.starts(3, 13)
        together = attend(layer, hidden, starts)
        for b in range(3):
            row = AttentionResult(together.output[b : b + 1], None, None, None, {})
            assert together.selection is not None
            row.selection = together.selection[b : b + 1]
            whole = slice(0, 13)
            assert_same(row, attend(layer, hidden[b : b + 1], starts[b : b + 1]), whole, whole)


def test_padding_after_a_sequence_changes_nothing(draw: Draw) -> None:
    for controller in CONTROLLERS:
        layer = draw.layer(draw.config(controller))
        hidden = draw.hidden(layer, 2, 10)
        padded = torch.cat((hidden, draw.hidden(layer, 2, 5)), dim=1)
        assert_same(attend(layer, padded), attend(layer, hidden), slice(0, 10), slice(0, 10))


def test_padding_before_a_sequence_as_a_document_of_its_own_changes_nothing(draw: Draw) -> None:
    for controller in CONTROLLERS:
        layer = draw.layer(draw.config(controller))
        hidden = draw.hidden(layer, 2, 10)
        padded = torch.cat((draw.hidden(layer, 2, 5), hidden), dim=1)
        starts = torch.where(torch.arange(15) < 5, 0, 5).expand(2, 15)
        assert_same(attend(layer, padded, starts), attend(layer, hidden), slice(5, 15), slice(0, 10))


@pytest.mark.parametrize("training", [True, False])
def test_padding_that_sees_no_key_at_all_changes_nothing_and_makes_no_nan(draw: Draw, training: bool) -> None:
    """`starts` says 5 for the padding too: its rows of attention are empty."""
    for coarse in (False, True):
        config = draw.config()
        if not coarse:
            config.selection.coarse = None
        layer = draw.layer(config).train(training)
        hidden = draw.hidden(layer, 2, 10)
        padded = torch.cat((draw.hidden(layer, 2, 5), hidden), dim=1).requires_grad_()
        starts = torch.full((2, 15), 5)
        result = layer.attend(padded, starts, keep_selection=True, indexer_loss=True, measure=True)
        assert_same(result, attend(layer, hidden), slice(5, 15), slice(0, 10))
        assert result.indexer_loss is not None
        assert result.indexer_loss.isfinite()
        (result.output.sum() + result.indexer_loss).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in [padded, *layer.parameters()])
        assert all(value.isfinite() for value in result.statistics.values())
        assert result.uncertainty is None or result.uncertainty.isfinite().all()


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_packed_documents_give_what_each_gives_alone(draw: Draw, controller: str) -> None:
    for indexer in INDEXERS:
        layer = draw.layer(draw.config(controller, indexer))
        lengths = [draw.random.randint(1, 9) for _ in range(3)]
        first = [sum(lengths[:i]) for i in range(3)]
        starts = torch.tensor([f for f, n in zip(first, lengths, strict=True) for _ in range(n)])[None]
        hidden = draw.hidden(layer, 1, sum(lengths))
        packed = attend(layer, hidden, starts)
        for f, n in zip(first, lengths, strict=True):
            assert_same(packed, attend(layer, hidden[:, f : f + n]), slice(f, f + n), slice(0, n))


def test_query_chunk_changes_no_result(draw: Draw) -> None:
    for controller in CONTROLLERS:
        layer = draw.layer(draw.config(controller))
        hidden, starts = draw.hidden(layer, 2, 14), draw.starts(2, 14)
        found = []
        for chunk in (1, 4, 14):
            layer.config.query_chunk = chunk
            layer.zero_grad()
            result = layer.attend(hidden, starts, keep_selection=True, indexer_loss=True, measure=True)
            assert result.indexer_loss is not None
            (result.output.square().sum() + result.indexer_loss).backward()
            gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
            found.append([result.output, result.selection, result.indexer_loss, result.statistics, gradients])
            if result.uncertainty is not None:
                found[-1].append(result.uncertainty)
        for other in found[1:]:
            assert_close(other, found[0])


def decode(draw: Draw, layer: GatedSparseAttention, hidden: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and selections of calls of none, one or many tokens, the selections filled up to [B, T, T]."""
    cache, outputs = LayerCache(), []
    selection = torch.zeros(*starts.shape, starts.shape[1], dtype=torch.bool)
    for call in draw.splits(starts.shape[1]):
        result = layer.attend(hidden[:, call], starts[:, : call.stop], cache=cache, keep_selection=True)
        outputs.append(result.output)
        if result.selection is not None:
            selection[:, call, : call.stop] = result.selection
    return torch.cat(outputs, dim=1), selection


@pytest.mark.parametrize("indexer", INDEXERS)
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_prefill_then_decode_equals_one_forward(draw: Draw, controller: str, indexer: str) -> None:
    for share in (1, 4):
        layer = draw.layer(draw.config(controller, indexer, share=share))
        hidden = draw.hidden(layer, 2, 22)
        starts = draw.random.choice([torch.zeros(2, 22, dtype=torch.long), draw.starts(2, 22)])
        full = attend(layer, hidden, starts)
        output, selection = decode(draw, layer, hidden, starts)
        assert full.selection is not None
        assert torch.equal(selection, full.selection)
        assert_close(output, full.output, rtol=0, atol=1e-10)


def test_prefill_then_decode_equals_one_forward_in_fp32(draw: Draw) -> None:
    """To 1e-5, but where rounding has swapped two nearly equal keys: one query in a thousand at most."""
    same = []
    for controller in CONTROLLERS:
        layer = draw.layer(draw.config(controller, share=1), dtype=torch.float32)
        hidden, starts = draw.hidden(layer, 4, 30), draw.starts(4, 30)
        full = attend(layer, hidden, starts)
        output, selection = decode(draw, layer, hidden, starts)
        assert full.selection is not None
        agree = (selection == full.selection).all(-1)
        scale = full.output.detach().abs().amax().clamp_min(1)
        assert_close((output / scale)[agree], (full.output / scale)[agree], rtol=0, atol=1e-5)
        same.append(agree)
    assert (~torch.stack(same)).sum() <= 2


@pytest.mark.parametrize("share", [1, 2, 8])
def test_prefill_then_decode_equals_one_forward_where_a_selection_is_reused(draw: Draw, share: int) -> None:
    layer = draw.layer(draw.config(reuse=1, share=share), number=1)
    hidden, starts = draw.hidden(layer, 2, 22), draw.starts(2, 22)
    lower = draw.lower(starts)
    full = layer.attend(hidden, starts, lower=lower).output
    cache = LayerCache()
    for call in draw.splits(22):
        result = layer.attend(hidden[:, call], starts[:, : call.stop], lower=lower[:, call, : call.stop], cache=cache)
        assert_close(result.output, full[:, call], rtol=0, atol=1e-10)
