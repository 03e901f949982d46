"""How much of a device's memory training takes: an estimate, before anything is built.

- The estimate counts what is alive at one time: parameters, gradients and AdamW's state, what the forward keeps for
  the backward, and the largest of what exists only for a moment. It is one worker's.
- It counts tensors. What an allocator holds beyond them, and a GPU's context (about half a GiB), come on top.
- Logged steps and evaluations compare with dense attention, which takes memory of its own.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gsa.attention.config import AttentionConfig
from gsa.attention.core import Parts
from gsa.attention.fused import HEAD_SIZES, INDEX_HEADS, INDEX_SIZE, rule_of
from gsa.attention.gates import PLACES
from gsa.config import TrainConfig, build
from gsa.model import GSAForCausalLM, ModelConfig
from gsa.training.precision import uses_bf16
from kernels import rows
from kernels.enclose import Sampling, marked_at_once
from kernels.rule import Rule
from kernels.unions import queries_at_once
from kernels.words import WORD

FLOAT = 4  # bytes of what is always fp32: parameters, the residual stream, losses


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one worker at the moment when it holds most."""

    parameters: int
    gradients: int  # with the buckets of data parallelism
    optimizer: int  # AdamW's two moments
    activations: int  # kept from the forward for the backward
    workspace: int  # logits and their gradients, or one layer's attention: the larger

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.workspace


def device_of(config: TrainConfig) -> torch.device:
    """A GPU where the configuration gives its workers one, else the CPU; only the type is meant."""
    return torch.device("cuda" if config.workers.gpus_per_worker else "cpu")


def estimate(config: TrainConfig, vocab_size: int, device: torch.device) -> Memory:
    """Memory of training at the configuration's real shapes, `vocab_size` being the tokenizer's; only the type of
    `device` matters."""
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or vocab_size)
    count, of_indexer = _parameters(json.dumps(dataclasses.asdict(model), sort_keys=True))
    trained = {"dense": count - of_indexer, "warmup": of_indexer, "sparse": count}
    stages = [stage for stage in config.training.stages if stage.steps and trained[stage.kind]]
    kinds = {stage.kind for stage in stages}
    layers = [model.attention_of(i) for i in range(model.num_layers)]
    shapes = Shapes.of(config, model.vocab_size or vocab_size, device)
    buckets = 1 if config.workers.num_workers == 1 else 2  # of DistributedDataParallel, next to the gradients
    moments = []
    for stage in stages:
        at = dataclasses.replace(shapes, length=stage.context_length or shapes.length)
        kept, passing = _moment(at, layers, config, count, stage.kind)
        moments.append((trained[stage.kind] * FLOAT * buckets, kept, passing))
        moments.append((0, 0, _evaluating(at, layers, config, count, stage.kind)))
    gradients, activations, workspace = max(moments, key=sum, default=(0, 0, 0))
    has_state = count if len(kinds) > 1 else max((trained[kind] for kind in kinds), default=0)
    return Memory(count * FLOAT, gradients, 2 * has_state * FLOAT, activations, workspace)


@functools.lru_cache(maxsize=4096)
def _parameters(model: str) -> tuple[int, int]:
    """Numbers of a model, given as JSON, and of its indexers."""
    with torch.device("meta"), _Uninitialized():  # exact, and takes neither memory nor random numbers
        built = GSAForCausalLM(build(ModelConfig, json.loads(model)))
    return sum(p.numel() for p in built.parameters()), sum(p.numel() for p in built.indexer_parameters())


class _Uninitialized(TorchFunctionMode):
    """Leaves new parameters as they are: drawing them, even on the meta device, imports PyTorch's compiler (3 s)."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", None) == torch.nn.init.__name__:
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def remedy(config: TrainConfig, vocab_size: int, device: torch.device, memory_bytes: int) -> str:
    """The setting whose change makes training fit, tried from what costs least; else the one to think about."""
    training = config.training

    def fits(**changes: object) -> bool:
        other = dataclasses.replace(config, training=dataclasses.replace(training, **changes))  # type: ignore[arg-type]
        return estimate(other, vocab_size, device).total <= memory_bytes

    if not training.checkpoint_activations and fits(checkpoint_activations=True):
        return "training.checkpoint_activations"
    if fits(micro_batch_size=1):
        return "training.micro_batch_size"
    small = dataclasses.replace(config.evaluation, batch_size=1)
    if estimate(dataclasses.replace(config, evaluation=small), vocab_size, device).total <= memory_bytes:
        return "evaluation.batch_size"
    return "data.context_length"


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What all layers share."""

    batch: int
    length: int
    hidden: int
    vocab: int
    bytes: int  # of an activation
    device: torch.device

    @classmethod
    def of(cls, config: TrainConfig, vocab: int, device: torch.device) -> "Shapes":
        hidden = config.model.attention.hidden_size
        size = 2 if uses_bf16(config.training.precision, device) else FLOAT
        return cls(config.training.micro_batch_size, config.data.context_length, hidden, vocab, size, device)

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def residual(self) -> int:
        """Bytes of the residual stream."""
        return self.tokens * self.hidden * FLOAT

    def fused(self, layer: AttentionConfig) -> bool:
        """Whether the kernels run a layer (`gsa.attention.fused.problem`)."""
        if layer.backend == "torch" or self.device.type != "cuda" or self.bytes != 2:
            return False
        fits = layer.indexer.num_heads <= INDEX_HEADS and layer.indexer.head_dim <= INDEX_SIZE
        return layer.head_dim in HEAD_SIZES and (fits or not layer.sparse)

    def logits(self, trained: bool) -> int:
        """Logits, their logarithms and, in training, the gradients of both; what is not fp32 is there besides."""
        passes = 2 if trained else 1
        copies = (1 + passes) * FLOAT + (passes * self.bytes if self.bytes < FLOAT else 0)
        return self.tokens * self.vocab * copies


def _moment(
    shapes: Shapes, layers: list[AttentionConfig], config: TrainConfig, parameters: int, kind: str
) -> tuple[int, int]:
    """Activations and workspace of one stage."""
    intermediate, checkpoints = config.model.intermediate_size, config.training.checkpoint_activations
    trains_model, trains_indexer = kind != "warmup", kind != "dense"
    with_indexer = [x for x in layers if trains_indexer and x.sparse and not x.selection.reuse]
    each = [
        (_block(shapes, x, intermediate) if trains_model else _projections(shapes, x) * trains_indexer)
        + (_indexer(shapes, x) if x in with_indexer else 0)
        + (_reused(shapes, x) if kind == "sparse" and x.sparse else 0)
        for x in layers
    ]
    kept = sum(each)
    if checkpoints:
        targets = [_target(shapes, x) for x in with_indexer]
        kept = len(layers) * shapes.residual + max(each) + sum(targets) - max(targets, default=0)
    kept += 3 * shapes.residual if trains_model else 0  # the embedding and the last norm
    kept += parameters * shapes.bytes if shapes.bytes < FLOAT else 0  # autocast keeps the weights that it has cast
    passing = max(_attention_workspace(shapes, x, kind) for x in layers)
    if trains_model:  # while the last layer attends, the second half of its block is not there yet
        passing = max(0, passing - shapes.tokens * 4 * intermediate * shapes.bytes)
    return kept, max(passing, shapes.logits(trains_model))


def _evaluating(shapes: Shapes, layers: list[AttentionConfig], config: TrainConfig, parameters: int, kind: str) -> int:
    """What an evaluation after a stage holds, in the precision of training: one layer's projections and attention, its
    SwiGLU, or the logits."""
    shapes = dataclasses.replace(shapes, batch=config.evaluation.batch_size)
    words = shapes.tokens * shapes.length * FLOAT // WORD
    attention = max(
        _projections(shapes, x) + _attention_workspace(shapes, x, kind) + words * shapes.fused(x) for x in layers
    )
    swiglu = shapes.tokens * 4 * config.model.intermediate_size * shapes.bytes
    cast = parameters * shapes.bytes if shapes.bytes < FLOAT else 0  # autocast keeps the weights that it has cast
    return cast + 2 * shapes.residual + max(attention, swiglu, shapes.logits(trained=False))


def _block(shapes: Shapes, layer: AttentionConfig, intermediate: int) -> int:
    """What one block keeps for its backward, but for its indexer."""
    hidden, width, kv_width = layer.hidden_size, layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    size, half = shapes.bytes, shapes.bytes < FLOAT
    per_token = 4 * intermediate * size + 4 * layer.head_dim // 2 * FLOAT + layer.num_heads * FLOAT
    # two norms; linear layers take fp32 inputs as they are, and with autocast each makes a copy of its own
    per_token += hidden * (4 * FLOAT + (4 + len(layer.gates.places)) * size if half else 6 * FLOAT)
    if shapes.fused(layer):
        per_token += 2 * (width + kv_width) * size + shapes.length * FLOAT // WORD
    else:  # keys and values are repeated for the heads that share them; the mask is a number for each pair
        per_token += 5 * width * size + shapes.length * size
    gated = dict(zip(PLACES, (width, kv_width, kv_width, width, hidden), strict=True))
    copies = 2 if layer.gates.granularity == "element" else 1
    per_token += sum(gated[place] * copies * size for place in layer.gates.places)
    return shapes.tokens * per_token


def _projections(shapes: Shapes, layer: AttentionConfig) -> int:
    """Queries, keys, values and the output of attention without gradients."""
    return shapes.tokens * layer.num_heads * layer.head_dim * 4 * shapes.bytes


def _indexer(shapes: Shapes, layer: AttentionConfig) -> int:
    """What the indexer's loss keeps: projections, and with torch every target."""
    config, size = layer.indexer, shapes.bytes
    per_token = (config.num_heads + 1) * config.head_dim * size + 2 * config.head_dim * FLOAT
    per_token += layer.hidden_size * (3 * size if size < FLOAT else FLOAT)
    if shapes.fused(layer):
        per_token += shapes.length * FLOAT // WORD
    return shapes.tokens * per_token + _target(shapes, layer)


def _target(shapes: Shapes, layer: AttentionConfig) -> int:
    """The attention that the indexer is to predict and where: it outlives even checkpointed blocks."""
    return 0 if shapes.fused(layer) else shapes.tokens * shapes.length * (FLOAT + 1)


def _reused(shapes: Shapes, layer: AttentionConfig) -> int:
    """A layer that reuses a selection keeps it alive."""
    if not layer.selection.reuse:
        return 0
    return shapes.tokens * shapes.length // (WORD // FLOAT if shapes.fused(layer) else 1)


def _attention_workspace(shapes: Shapes, layer: AttentionConfig, kind: str) -> int:
    """The most that one layer's attention holds for a moment."""
    heads, index_heads = layer.num_heads, layer.indexer.num_heads if layer.sparse and kind != "dense" else 0
    # of a pair of query and key: four fp32 tensors by head compare with dense attention, scores or a variance precede
    comparing = 4 * FLOAT * heads + 3 * FLOAT
    scoring = max(3 * FLOAT * index_heads, 4 * 8) + 4 * FLOAT if index_heads else 0
    chunk = shapes.batch * min(layer.query_chunk, shapes.length) * shapes.length * max(comparing, scoring)
    if not shapes.fused(layer):
        return chunk
    unpacked = shapes.batch * min(layer.query_chunk + 2 * WORD, shapes.length) * shapes.length  # words as booleans
    return max(_lists(shapes, layer), chunk + unpacked * (2 * FLOAT + 1))


def _lists(shapes: Shapes, layer: AttentionConfig) -> int:
    """Lists of keys of the kernels, or the candidates of a selection; and fp32 gradients of keys and values."""
    rule = rule_of(Parts(layer, None, None, True))
    most = rule.most_attended(shapes.length) if layer.sparse else shapes.length
    queries = min(queries_at_once(shapes.batch, shapes.length), shapes.length)
    group = layer.num_heads // layer.num_kv_heads
    tiles = {WORD, max(1, min(WORD, 64 >> math.ceil(math.log2(group))))}
    entry = 2 * FLOAT  # a key and its word or value
    listed = sum(shapes.batch * queries // tile * min(most * tile, shapes.length) * entry for tile in tiles)
    gradients = shapes.tokens * 2 * layer.num_kv_heads * layer.head_dim * FLOAT
    return max(listed + gradients, _scored(shapes, rule, most) if layer.sparse else 0)


def _scored(shapes: Shapes, rule: Rule, most: int) -> int:
    """Scores of the kernels at one time: all of some queries, or samples and marks."""
    if shapes.length <= rows.ROOM:
        queries = min(queries_at_once(shapes.batch, shapes.length, rows.PAIRS), shapes.length)
        return shapes.batch * queries * shapes.length * FLOAT
    plan = Sampling.of(most, shapes.length, rule.controller == "given")
    queries = min(marked_at_once(shapes.batch, shapes.length, plan.room), shapes.length)
    again = shapes.batch * plan.places(queries) * shapes.length * FLOAT
    return shapes.batch * queries * max(plan.room * 2 * FLOAT, shapes.length // plan.stride * FLOAT) + again
