"""What a configuration must show in a moment, before it is given hours: it trains, and it fits.

- It is tried on its small copy (`gsa.evaluation.shrink`), with the real model and the real training step, in torch:
  later tokens and other documents change nothing, no number is NaN or infinite, and gradients reach what each stage
  trains and nothing else.
- Memory is estimated at the real shapes (`gsa.evaluation.memory`).
- A refusal names the setting without which the check passes.
- What was found is kept by structure: a proposal that differs in its learning rate alone costs nothing.
"""

import contextlib
import copy
import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gsa.attention.config import Stage
from gsa.config import TrainConfig, assign, lookup
from gsa.data.packing import Batch
from gsa.errors import RequestError, one_line
from gsa.evaluation.memory import Memory, device_of, estimate, remedy
from gsa.evaluation.shrink import Small, shrink
from gsa.model import LAYER_SETTINGS, GSAForCausalLM
from gsa.training.stages import freeze
from gsa.training.step import Losses, TrainingStep

ROWS = 4  # sequences of a batch, the last of which repeats one token
BATCHES = 4  # after which a parameter without a gradient counts as dead; gates that begin closed open meanwhile
NOTHING = 1e-14  # gradients in fp64 that are rounding; those of a new model are far larger
PLACES = 7  # after which tokens are changed
LEAK = 1e-4  # of the largest logit; nothing changes by rounding, as all shapes stay the same

CONTROLLER, SELECTION = "model.attention.controller", "model.attention.selection"
GATES, INDEXER = "model.attention.gates", "model.attention.indexer"
FEW_KEYS = {f"{CONTROLLER}.k_min": 1, f"{CONTROLLER}.k": 4, f"{CONTROLLER}.k_max": 16}

LAYER_KEYS = {".".join(("model.attention", *path)): name for name, path in LAYER_SETTINGS.items()}

# Where a failure may come from, the narrowest first, and the settings with which it would not.
SUSPECTS: dict[str, dict[str, Any]] = {
    f"{SELECTION}.coarse": {f"{SELECTION}.coarse": None},
    f"{SELECTION}.share": {f"{SELECTION}.share": 1},
    f"{SELECTION}.reuse": {f"{SELECTION}.reuse": 0},
    f"{SELECTION}.local_window": {f"{SELECTION}.local_window": 0},
    f"{SELECTION}.sink_tokens": {f"{SELECTION}.sink_tokens": 0},
    f"{GATES}.gain": {f"{GATES}.gain": 0.1},
    f"{GATES}.bias": {f"{GATES}.bias": 0.5},
    f"{GATES}.activation": {f"{GATES}.activation": "sigmoid"},
    f"{GATES}.granularity": {f"{GATES}.granularity": "element"},
    f"{GATES}.places": {f"{GATES}.places": []},
    f"{INDEXER}.temperature": {f"{INDEXER}.temperature": 10.0},
    f"{INDEXER}.rope": {f"{INDEXER}.rope": False},
    f"{INDEXER}.kind": {f"{INDEXER}.kind": "gated_sigmoid"},
    f"{CONTROLLER}.temperature": {f"{CONTROLLER}.temperature": 1.0},
    f"{CONTROLLER}.target_mass": {f"{CONTROLLER}.target_mass": 0.9},
    f"{CONTROLLER}.threshold": {f"{CONTROLLER}.threshold": 0.0},
    f"{CONTROLLER}.k_max": {f"{CONTROLLER}.k_max": 16},
    f"{CONTROLLER}.k": FEW_KEYS,
    f"{CONTROLLER}.kind": {f"{CONTROLLER}.kind": "fixed"} | FEW_KEYS,
    "model.attention.rope_theta": {"model.attention.rope_theta": 10_000.0},
    "model.norm_eps": {"model.norm_eps": 1e-6},
    "model.tie_embeddings": {"model.tie_embeddings": True},
    "training.checkpoint_activations": {"checkpoint_activations": False},
    "data.context_length": {"context_length": 16},
    "model.attention.sparse": {"model.attention.sparse": False},
}


class GateError(RequestError):
    """A configuration that would not train.

    Args:
        check: `runs`, `finite`, `gradients`, `causality` or `memory`.
        found: what was found, in words.
        key: the setting that it most likely comes from, `None` where no single one explains it.
        value: what that setting is.
    """

    def __init__(self, check: str, found: str, key: str | None = None, value: object = None) -> None:
        self.check, self.found, self.key, self.value = check, found, key, value
        cause = f"{key} = {value!r}" if key else "no single setting explains it"
        super().__init__(f"{check}: {found} ({cause})")

    def __reduce__(self) -> tuple[type["GateError"], tuple[str, str, str | None, object]]:
        return type(self), (self.check, self.found, self.key, self.value)


class Failure(NamedTuple):
    """A check that did not pass, on the small copy."""

    check: str
    found: str


@dataclasses.dataclass(frozen=True)
class GateReport:
    """A configuration that passed."""

    memory: Memory
    seconds: float  # that the checks took, hardly any for a structure that is known


def check_trainable(
    config: TrainConfig, vocab_size: int, device: torch.device | None = None, memory_bytes: int | None = None
) -> GateReport:
    """Refuse a configuration that would not train, or would not fit.

    Args:
        config: a checked configuration.
        vocab_size: of the tokenizer, which `model.vocab_size` may exceed.
        device: what it would train on; `None` for a GPU if the configuration's workers have one.
        memory_bytes: what one worker may use there; `None` for any amount.

    Raises:
        GateError: for the first check that fails.
    """
    began = time.perf_counter()
    device = device or device_of(config)
    memory = estimate(config, vocab_size, device)
    if memory_bytes is not None and memory.total > memory_bytes:
        key = remedy(config, vocab_size, device, memory_bytes)
        found = f"training needs about {memory.total / 2**30:.3g} GiB, there are {memory_bytes / 2**30:.3g} GiB"
        raise GateError("memory", found, key, lookup(config, key))
    small = shrink(config, vocab_size)
    failure = examine(small)
    if failure is not None:
        raise _explained(config, small, failure)
    return GateReport(memory, time.perf_counter() - began)


@functools.lru_cache(maxsize=4096)
def examine(small: Small) -> Failure | None:
    """The first check that a small copy fails."""
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.default_generator.manual_seed(0)
        model = GSAForCausalLM(small.model).train()
        try:
            return next(_failures(model, small), None)
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            return Failure("runs", one_line(f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """On tensors this small several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _failures(model: GSAForCausalLM, small: Small) -> Iterator[Failure]:
    precise = copy.deepcopy(model).double()  # in which what is nothing and what is little differ
    for stage in small.stages:
        yield from _step_failures(model, small, stage)
    yield from _untrained(precise, small)
    _spread_out(model, small)
    for stage in small.stages:
        yield from _leaks(model, small, stage)


def _step_failures(model: GSAForCausalLM, small: Small, stage: Stage) -> Iterator[Failure]:
    """What is wrong with the numbers of one stage's step, and with where its gradients go."""
    freeze(model, stage)
    logits: list[Tensor] = []
    hook = model.head.register_forward_hook(lambda module, inputs, output: logits.append(output))
    losses: Losses = TrainingStep(model, stage, small.checkpoint_activations)(_batch(small), False)
    hook.remove()
    for name, value in (("logits", logits[0]), ("loss", losses.language), ("indexer_loss", losses.indexer)):
        if value is not None and not value.isfinite().all():
            yield Failure("finite", f"{name} in stage {stage!r} hold NaN or infinity")
    if not losses.total.requires_grad:
        yield Failure("gradients", f"the loss of stage {stage!r} depends on no parameter")
    if stage == "sparse" and losses.indexer is not None:
        yield from _mixed_losses(model, small, losses.indexer)
    losses.total.backward()
    for name, parameter in model.named_parameters():
        where = f"{_real(name, small)} in stage {stage!r}"
        if (parameter.grad is not None) != parameter.requires_grad:
            found = "gets no gradient" if parameter.requires_grad else "gets a gradient, and is frozen"
            yield Failure("gradients", f"{where} {found}")
        elif parameter.grad is not None and not parameter.grad.isfinite().all():
            yield Failure("finite", f"the gradient of {where} holds NaN or infinity")
    model.zero_grad()


def _untrained(model: GSAForCausalLM, small: Small) -> Iterator[Failure]:
    """Parameters that a stage should train and does not, but where another stage trains what one cannot."""
    trained: set[str] = set()
    idle: dict[str, None] = {}
    for stage in small.stages:
        freeze(model, stage)
        step = TrainingStep(model, stage, small.checkpoint_activations)
        wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        silent = _silent(model, small, step)
        trained |= wanted - silent
        excused = _single_key(model, step, _batch(small)) if silent else set()
        for name in sorted(silent - excused):
            yield Failure("gradients", f"the gradient of {_real(name, small)} in stage {stage!r} is always 0")
        idle |= dict.fromkeys(sorted(silent))
    for name in (n for n in idle if n not in trained):
        yield Failure("gradients", f"{_real(name, small)} is never trained: each query attends to a single key")


def _silent(model: GSAForCausalLM, small: Small, step: TrainingStep) -> set[str]:
    """Parameters whose gradient is 0 in each of a few steps."""
    silent = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(BATCHES):
        step(_batch(small), False).total.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and parameter.grad.abs().max() > NOTHING:
                silent.discard(name)
        if silent:
            optimizer.step()
        optimizer.zero_grad()
        if not silent:
            break
    return silent


def _mixed_losses(model: GSAForCausalLM, small: Small, indexer_loss: Tensor) -> Iterator[Failure]:
    """The indexer's loss is to train the indexer alone, or the model would learn to please its indexer."""
    own = {id(p) for p in model.indexer_parameters()}
    rest = [(name, p) for name, p in model.named_parameters() if id(p) not in own]
    gradients = torch.autograd.grad(indexer_loss, [p for _, p in rest], retain_graph=True, allow_unused=True)
    for (name, _), gradient in zip(rest, gradients, strict=True):
        if gradient is not None and gradient.any():
            yield Failure("gradients", f"the indexer's loss reaches {_real(name, small)}, which it is not to train")


@torch.no_grad()
def _single_key(model: GSAForCausalLM, step: TrainingStep, batch: Batch) -> set[str]:
    """Parameters that only weigh keys against each other, in layers where no query attends to two."""
    sums = step(batch, True).statistics
    names = set()
    for layer in (sums["selected"] <= sums["queries"]).nonzero().flatten().tolist():
        parts = ("query.", "key.", "gates.G3.", "gates.G4.", "indexer.")
        prefixes = tuple(f"blocks.{layer}.attention.{part}" for part in parts)
        names |= {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    return names


@torch.no_grad()
def _spread_out(model: GSAForCausalLM, small: Small) -> None:
    """Weights as large as trained ones, and references to match: a leak shall show, and scores shall differ."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".gates." not in name:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    batch = _batch(small)
    uncertainty = model.run(batch.tokens, starts=batch.starts).uncertainty
    if uncertainty is not None:
        model.update_references(uncertainty)


@torch.no_grad()
def _leaks(model: GSAForCausalLM, small: Small, stage: Stage) -> Iterator[Failure]:
    """Rows of equal tokens, of which each changes other tokens: logits that must not know of them must not change."""
    length = small.context_length
    firsts = sorted({length * i // PLACES for i in range(1, PLACES)} - {0})  # the first token that changes
    later = [] if small.attend_across_documents else _documents(length)[1:]
    rows = len(firsts) + len(later)
    if not rows:
        return
    tokens = _batch(small).tokens[:1].expand(rows, -1)
    changed = (tokens + torch.randint(1, small.model.vocab_size or 2, tokens.shape)) % (small.model.vocab_size or 2)
    place = torch.arange(length)
    kept = torch.stack([place < t for t in firsts] + [place >= s for s in later])
    starts = _starts(small, rows)
    before = model.run(tokens, starts=starts, stage=stage).logits
    after = model.run(torch.where(kept, tokens, changed), starts=starts, stage=stage).logits
    difference = (after - before).abs().amax(-1) * kept
    for row in (difference > LEAK * before.abs().max()).any(1).nonzero().flatten().tolist():
        token = int(difference[row].argmax())
        what = f"tokens from {firsts[row]} on" if row < len(firsts) else "the documents before its own"
        yield Failure("causality", f"in stage {stage!r} token {token} of {length} knows {what}")


def _batch(small: Small) -> Batch:
    tokens = torch.randint(small.model.vocab_size or 2, (ROWS, small.context_length + 1))
    tokens[-1] = tokens[-1, 0]
    return Batch(tokens[:, :-1], tokens[:, 1:], _starts(small, ROWS))


def _documents(length: int) -> list[int]:
    """Where the documents of a sequence start."""
    return sorted({0, length // 3, 2 * length // 3 + 1} & set(range(length)))


def _starts(small: Small, rows: int) -> Tensor:
    starts = torch.zeros(rows, small.context_length, dtype=torch.long)
    for first in [] if small.attend_across_documents else _documents(small.context_length):
        starts[:, first:] = first
    return starts


def _real(name: str, small: Small) -> str:
    """A parameter of the small model by its name in the real one."""
    head, _, rest = name.partition("blocks.")
    number, _, rest = rest.partition(".")
    return f"blocks.{small.layers[int(number)]}.{rest}" if number else head


def _explained(config: TrainConfig, small: Small, failure: Failure) -> GateError:
    """The failure with the first suspect whose harmless settings make all checks pass."""
    for key, changes in SUSPECTS.items():
        if _passes(small, changes, "*"):
            named = _where_set(config, small, key, changes)
            return GateError(*failure, named, lookup(config, named))
    return GateError(*failure)


def _where_set(config: TrainConfig, small: Small, key: str, changes: dict[str, Any]) -> str:
    """The suspect's key, or one layer's own where that one is to blame."""
    for place, layer in enumerate(small.layers if key in LAYER_KEYS else ()):
        own = f"model.layers[{layer}].{LAYER_KEYS[key]}"
        if lookup(config, own) is not None and _passes(small, changes, str(place)):
            return own
    return key


def _passes(small: Small, changes: dict[str, Any], layers: str) -> bool:
    """Whether a small copy passes with other settings; those that layers may set, in these layers alone."""
    data = dataclasses.asdict(small)
    for key, value in changes.items():
        if key == "context_length" and data[key] >= value:
            return False
        assign(Small, data, key, value)
        if key in LAYER_KEYS:
            assign(Small, data, f"model.layers[{layers}].{LAYER_KEYS[key]}", value)
    if not any(layer["sparse"] for layer in data["model"]["layers"]):
        data["stages"] = [stage for stage in data["stages"] if stage != "warmup"]
    try:
        other = Small.of(data)
    except RequestError:  # these settings may not be combined with the others
        return False
    return other != small and examine(other) is None
