"""What one forward of attention would cost on a reference GPU, from what a trained model selects: on any machine.

- Bytes and operations of three stages, each as the kernels do it: scores of the indexer, selection, and attention over
  the unions of tiles of neighbouring queries (`kernels.attend`). Dense layers attend to every earlier key.
- A stage takes the longest of the times that its device memory, its second-level cache, its matrix products and its
  special functions need. Stages and layers follow one another.
- It is a model. It orders configurations, and at 64K tokens and more its milliseconds are near those of
  kernels/RESULTS.md. The host's part, a quarter of a forward's time at 8K tokens there, is not in it: a CUDA graph
  takes that away. Nor are projections and gates.
"""

import dataclasses
import math

from torch import Tensor

from gsa.attention.config import AttentionConfig
from gsa.attention.core import Parts
from gsa.attention.fused import keeps_all, rule_of
from gsa.evaluation.selections import Selected, observe
from gsa.model import GSAForCausalLM
from kernels.attend import Tiles
from kernels.enclose import MARKS
from kernels.unions import queries_at_once
from kernels.words import WORD

ELEMENT = 2  # bytes of bf16
MARKED = 0.95  # keys between the sampled bound and ceiling, over k (`kernels.enclose.Sampling`)
SAMPLED = 32  # one key in so many is scored for the bound


@dataclasses.dataclass(frozen=True)
class Reference:
    """A GPU: rates per second, and the shares of them that the stages reached on it."""

    name: str
    bandwidth: float  # bytes of device memory
    cache_bandwidth: float  # bytes gathered from the second-level cache
    operations: float  # of bf16 matrix products
    special: float  # sigmoids and exponentials
    dense_share: float  # of `operations`, in dense attention
    scores_share: float  # of `operations`, in the indexer's scores
    listed_share: float  # of `cache_bandwidth`, where the candidates of two levels are gathered and scored
    attention_share: float  # of `operations`, in attention over unions
    selection_share: float  # of both bandwidths, in selection


# NVIDIA's data sheet of the H100 SXM: 3.35 TB/s, 990 TFLOP/s. CUDA programming guide: 16 special functions per cycle of
# each of 132 multiprocessors, at 1.755 GHz. The rest is kernels/RESULTS.md at 128K: 5.5 TB/s of the cache; 595 TFLOP/s
# of cuDNN, 290 of "mark", 540 to 570 of attention over unions; the rest of selection takes 5.4 ms where its bytes take
# 3.5, and longer against its bytes in shorter sequences.
H100 = Reference(
    name="NVIDIA H100 SXM",
    bandwidth=3.35e12,
    cache_bandwidth=5.5e12,
    operations=990e12,
    special=16 * 132 * 1.755e9,
    dense_share=0.60,
    scores_share=0.29,
    listed_share=0.30,
    attention_share=0.53,
    selection_share=0.55,
)


@dataclasses.dataclass(frozen=True)
class Work:
    bytes: float = 0.0  # read and written in device memory
    gathered: float = 0.0  # bytes that come from the cache, as neighbouring tiles want the same keys
    operations: float = 0.0  # floating-point, of matrix products
    special: float = 0.0  # sigmoids and exponentials

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def milliseconds(self, reference: Reference, matrix_share: float, memory_share: float = 1.0) -> float:
        return 1e3 * max(
            self.bytes / (reference.bandwidth * memory_share),
            self.gathered / (reference.cache_bandwidth * memory_share),
            self.operations / (reference.operations * matrix_share),
            self.special / reference.special,
        )


@dataclasses.dataclass(frozen=True)
class LayerCost:
    sparse: bool
    keys: float  # that a query attends to, on average
    tile: int  # neighbouring queries that read their keys together
    overlap: float  # u(tile): the length of their union over `keys`
    scores: Work
    selection: Work
    attention: Work
    milliseconds: float
    workspace: float  # bytes held beside the inputs, output included

    @property
    def work(self) -> Work:
        return self.scores + self.selection + self.attention


@dataclasses.dataclass(frozen=True)
class Cost:
    """One forward of one sequence, by layer and in total."""

    reference: str
    length: int
    layers: tuple[LayerCost, ...]

    @property
    def work(self) -> Work:
        return sum((layer.work for layer in self.layers), Work())

    @property
    def milliseconds(self) -> float:
        return sum(layer.milliseconds for layer in self.layers)

    @property
    def workspace(self) -> float:
        """Bytes, of the layer that needs most."""
        return max(layer.workspace for layer in self.layers)


def modelled_cost(
    model: GSAForCausalLM,
    tokens: Tensor,
    target_length: int,
    reference: Reference = H100,
) -> Cost:
    """Cost of the attention of one forward at `target_length` tokens, batch 1, in bf16.

    Args:
        model: on any device; its selections are those of the mode, training or evaluation, that it is in.
        tokens: [B, T] of held-out text, one document a row. Selections are seen on it and carried over to the target
            (`gsa.evaluation.selections`).
        target_length: tokens.
        reference: the GPU.

    Raises:
        RequestError: there are no tokens, or `target_length` is below 1.
    """
    found = observe(model, tokens, target_length)
    configs = [model.config.attention_of(i) for i in range(len(found))]
    layers = (layer_cost(c, target_length, s, reference) for c, s in zip(configs, found, strict=True))
    return Cost(reference.name, target_length, tuple(layers))


def layer_cost(
    config: AttentionConfig,
    length: int,
    selected: Selected | None,
    reference: Reference = H100,
) -> LayerCost:
    """Cost of one layer at `length` tokens; `selected` are its selections there, `None` for dense attention."""
    if selected is None or keeps_all(config, length):
        attention = _dense(config, length)
        time = attention.milliseconds(reference, reference.dense_share)
        none = Work()
        return LayerCost(False, _visible(length), 1, 1.0, none, none, attention, time, _output_bytes(config, length))
    config = _as_run(config, length)
    tile = Tiles.of_forward(config.num_heads // config.num_kv_heads, roles=True).queries
    union = min(selected.union(tile), _visible(length) + tile / 2)
    scores, selection = _scores(config, length, selected), _selection(config, length, selected)
    attention = _attention(config, length, tile, union)
    time = scores.milliseconds(reference, reference.scores_share, reference.listed_share)
    time += selection.milliseconds(reference, 1.0, reference.selection_share)
    time += attention.milliseconds(reference, reference.attention_share)
    chunks = max(_selection_bytes(config, length, selected), _lists_bytes(length, length, tile, selected.keys))
    workspace = _output_bytes(config, length) + _words_bytes(length) + chunks
    overlap = union / max(selected.keys, 1.0)
    return LayerCost(True, selected.keys, tile, overlap, scores, selection, attention, time, workspace)


def _as_run(config: AttentionConfig, length: int) -> AttentionConfig:
    """The layer as the kernels run it: two levels whose candidates are all keys are one."""
    if rule_of(Parts(config, None, None, False)).two_levels(length):
        return config
    return dataclasses.replace(config, selection=dataclasses.replace(config.selection, coarse=None))


def _visible(length: int) -> float:
    return (length + 1) / 2


def _dense(config: AttentionConfig, length: int) -> Work:
    pairs = length * _visible(length) * config.num_heads
    moved = length * config.head_dim * 2 * (config.num_heads + config.num_kv_heads) * ELEMENT
    return Work(bytes=moved, operations=4 * config.head_dim * pairs, special=pairs)


def _scores(config: AttentionConfig, length: int, selected: Selected) -> Work:
    if config.selection.reuse:
        return Work()
    heads, size = config.indexer.num_heads, config.indexer.head_dim
    queries = math.ceil(length / config.selection.share)
    keys, coarse = _visible(length), config.selection.coarse
    if coarse is not None:
        keys = keys / coarse.block + _listed(config, length, selected)
    pairs = queries * keys
    moved = (length + queries * heads) * size * ELEMENT
    gathered = queries / WORD * _listed(config, length, selected) * size * ELEMENT if coarse is not None else 0.0
    special = pairs * heads if _needs_sigmoid(config) else 0.0
    return Work(bytes=moved, gathered=gathered, operations=2 * heads * size * pairs, special=special)


def _listed(config: AttentionConfig, length: int, selected: Selected) -> float:
    """Candidates of two levels that a word of queries scores together, which are taken to agree as selections do."""
    assert config.selection.coarse is not None
    return min(selected.overlap[-1] * config.selection.coarse.candidates * selected.keys, _visible(length))


def _needs_sigmoid(config: AttentionConfig) -> bool:
    """One head's order is that of its products: only a controller that looks at the scores needs more."""
    watched = config.controller.kind in ("variance", "entropy", "threshold")
    return config.indexer.kind != "relu" and (config.indexer.num_heads > 1 or watched)


def _selection(config: AttentionConfig, length: int, selected: Selected) -> Work:
    words, share, coarse = _words_bytes(length), config.selection.share, config.selection.coarse
    if config.selection.reuse:
        return Work(bytes=words / 2)
    queries, marked = math.ceil(length / share), _marked(length, selected)
    sampled = queries * _visible(length) / SAMPLED * 2 * 4  # fp32, written and read
    candidates = 2.5 * words / share if coarse is not None else 0.0  # their words
    spread = 2.5 * words  # the selection's: cleared, then set and listed in the causal half
    return Work(bytes=sampled + candidates + queries * marked * 2 * 8 + spread)


def _marked(length: int, selected: Selected) -> float:
    return min(MARKED * selected.keys, _visible(length))


def _attention(config: AttentionConfig, length: int, tile: int, union: float) -> Work:
    tiles = length / tile
    pairs = length * union * config.num_heads
    gathered = tiles * union * config.num_kv_heads * 2 * config.head_dim * ELEMENT
    moved = length * config.head_dim * 2 * (config.num_heads + config.num_kv_heads) * ELEMENT + tiles * union * 2 * 8
    return Work(moved, gathered, 4 * config.head_dim * pairs, pairs)


def _output_bytes(config: AttentionConfig, length: int) -> float:
    return length * config.num_heads * (config.head_dim * ELEMENT + 4)  # and a logarithm for each query and head


def _words_bytes(length: int) -> float:
    return length**2 / 8


def _selection_bytes(config: AttentionConfig, length: int, selected: Selected) -> float:
    """What exists at one time of marks and, with two levels, of candidates and their lists."""
    if config.selection.reuse:
        return 0.0
    leaders, marked = math.ceil(length / config.selection.share), _marked(length, selected)
    marks = min(leaders * marked * 8, MARKS)
    if config.selection.coarse is None:
        return marks
    words = min(queries_at_once(1, length), leaders) * length / 8
    return marks + words + _lists_bytes(length, leaders, WORD, _listed(config, length, selected))


def _lists_bytes(length: int, queries: int, tile: int, keys: float) -> float:
    """Lists of unions, of words and of tiles, for the queries that are handled at once; a key and its word, 8 bytes."""
    sizes = {WORD, tile}
    return 8 * min(queries_at_once(1, length), queries) * sum(min(keys * size, length) / size for size in sizes)
