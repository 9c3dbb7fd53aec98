"""What clipping costs on modules as they are: the clipped sum over the module's own forward and backward pass.

A BERT and a GPT-2 of transformers and an LSTM go through `models.from_module` unchanged. The reference is the gradient
of the mean loss of the batch, by the module's own kernels; the LSTM stands beside the same network as a loop over
positions too. Clipped sums are compared with their definition, a loop over examples in float64, ordinary gradients with
the eager module's. Opacus clips the same module where it can.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functorch_mnist import models, per_sample, random, train, tree

from . import peers
from .measure import Arm, Case, Comparison, Question, Setup, Work
from .networks import CLASSES
from .problems import start
from .steps import relative_difference

TOLERANCE = 1e-4
"""Of sums in float32, against float64."""
ROUNDS = 15


class Sizes(NamedTuple):
    """Of a network and its batch."""

    batch: int
    positions: int
    layers: int
    width: int
    heads: int = 1
    tokens: int = 1000


QUICK = {"batch": 4, "positions": 16, "layers": 2, "width": 64, "tokens": 100}
TRANSFORMER, RECURRENT = Sizes(16, 128, 6, 256, 4), Sizes(16, 64, 2, 256)


class Recipe(NamedTuple):
    """How a network is made, for which others' packages may be needed."""

    name: str
    module: Callable[[Sizes], nn.Module]
    batch: Callable[[Sizes], tuple[dict[str, Tensor], Tensor]]
    """The forward's inputs by name, and the targets."""
    logits: Callable[[Any], Tensor]
    """Of what the forward returns, for the targets, of an example or of a batch."""
    sizes: Sizes
    max_norm: float
    """Among the norms of the examples, so that some are clipped and others are not."""
    compiles: bool = True
    as_loop: Callable[[Sizes], nn.Module] | None = None
    """The same network as a loop over positions, its parameters in the same order."""


@dataclass(frozen=True)
class Subject:
    """A network and a batch, made when the first arm needs them."""

    recipe: Recipe
    sizes: Sizes
    device: str

    @cached_property
    def module(self) -> nn.Module:
        """Arms take copies of it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.recipe.module(self.sizes).eval().to(self.device)

    @cached_property
    def batch(self) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs by name, and targets."""
        inputs, targets = self.recipe.batch(self.sizes)
        return {name: x.to(self.device) for name, x in inputs.items()}, targets.to(self.device)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """The mean cross-entropy, of an example or of a batch: examples have equally many targets."""
        logits = self.recipe.logits(outputs)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))

    def work(self, call: Callable[[], Sequence[Tensor]], weights: Sequence[Tensor]) -> Work:
        """Gradients of these weights, computed anew by each call."""
        inputs, targets = self.batch
        found: list[Sequence[Tensor]] = []

        def keep() -> None:
            found[:] = [call()]

        def outputs() -> dict[str, Tensor]:
            names = [name for name, _ in self.module.named_parameters()]
            return dict(zip(names, found[0], strict=True))

        return Work(keep, outputs, start(weights, (*inputs.values(), targets), torch.float32), found.clear)

    @cached_property
    def clipped_sum(self) -> models.Params:
        """The definition: gradients of one example after another, in float64, by the module."""
        module = copy.deepcopy(self.module).double()
        weights = dict(module.named_parameters())
        inputs, targets = self.batch
        total = {name: torch.zeros_like(p) for name, p in weights.items()}
        for i in range(len(targets)):
            example = {name: x[i : i + 1] for name, x in inputs.items()}
            example = {name: x.double() if x.is_floating_point() else x for name, x in example.items()}
            grads = torch.autograd.grad(self.loss(module(**example), targets[i : i + 1]), list(weights.values()))
            named = dict(zip(weights, grads, strict=True))
            factor = (self.recipe.max_norm / tree.norm(named)).clamp(max=1)
            total = {name: total[name] + factor * g for name, g in named.items()}
        return {name: g.float() for name, g in total.items()}


def ordinary(subject: Subject, *, compile: bool = False, as_loop: bool = False) -> Work:
    """The module's own pass: the gradient of the mean loss."""
    module, (inputs, targets) = copy.deepcopy(subject.module), subject.batch
    if as_loop and subject.recipe.as_loop is not None:
        module = subject.recipe.as_loop(subject.sizes).to(subject.device)
        models.load_into(module, dict(zip(dict(module.named_parameters()), subject.module.parameters(), strict=True)))
    weights = list(module.parameters())

    def loss(inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return subject.loss(module(**inputs), targets)

    run = train.compiled(loss) if compile else loss
    return subject.work(lambda: torch.autograd.grad(run(inputs, targets), weights), weights)


def clipped(subject: Subject, *, compile: bool = False) -> Work:
    """The clipped sum by this library."""
    (inputs, targets), names = subject.batch, list(subject.batch[0])
    shapes = {name: x.dim() - 1 for name, x in inputs.items()}
    params, model = models.from_module(subject.module, example_ndim=shapes)

    def loss_fn(params: models.Params, *example: Tensor) -> Tensor:
        *values, target = example
        return subject.loss(model.apply(params, **dict(zip(names, values, strict=True))), target)

    def clipped_sum(params: models.Params, *batch: Tensor) -> Any:
        return per_sample.clipped_sum(loss_fn, params, *batch, max_norm=subject.recipe.max_norm).grads

    run = train.compiled(clipped_sum) if compile else clipped_sum
    return subject.work(lambda: list(run(params, *inputs.values(), targets).values()), list(params.values()))


def opacus(subject: Subject, *, mode: Literal["hooks", "ghost"]) -> Work:
    """The clipped sum by Opacus."""
    module, (inputs, targets) = copy.deepcopy(subject.module), subject.batch
    weights = list(module.parameters())
    call = peers.opacus_clipped_sum(
        module, inputs, targets, subject.recipe.logits, mode=mode, max_norm=subject.recipe.max_norm
    )
    return subject.work(call, weights)


def arms(subject: Subject, *, compile: bool) -> list[Arm]:
    """The module's own pass first, then clipped sums."""
    form = "compiled" if compile else "eager"
    found = [Arm(f"ordinary, {form} module", partial(ordinary, subject, compile=compile), TOLERANCE)]
    if subject.recipe.as_loop is not None:
        found.append(Arm(LOOP, partial(ordinary, subject, as_loop=True), TOLERANCE))
    ways: dict[str, Callable[[], Work]] = {f"clipped, {form}": partial(clipped, subject, compile=compile)}
    if not compile:
        ways["clipped, Opacus, hooks"] = partial(opacus, subject, mode="hooks")
        ways["clipped, Opacus, ghost clipping"] = partial(opacus, subject, mode="ghost")
    expected = partial(getattr, subject, "clipped_sum")
    return found + [Arm(name, make, TOLERANCE, expected=expected) for name, make in ways.items()]


LOOP = "ordinary, as a loop over positions"


def cases(setup: Setup) -> Iterator[Case]:
    """A case for each network, and one more where it is compiled."""
    for compile in (False, True):
        for recipe in RECIPES:
            if compile and (setup.quick or not recipe.compiles):
                continue
            sizes = recipe.sizes._replace(**QUICK) if setup.quick else recipe.sizes
            yield Case(
                f"{recipe.name}, {'compiled' if compile else 'eager'}",
                arms(Subject(recipe, sizes, setup.device), compile=compile),
                relative_difference,
                5 if setup.quick else ROUNDS,
                warmups=2,
                settings={"model": recipe.name, **sizes._asdict(), "max_norm": recipe.max_norm},
            )


def conclude(comparisons: Sequence[Comparison]) -> str:
    """Each clipped sum over the ordinary pass, with its interval, or why there is none."""
    lines = ["| module | clipped sum | over the module's own pass | over the loop |", "|---|---|---:|---:|"]
    for one in comparisons:
        for timing in one.timings:
            if timing.name.startswith("clipped"):
                cells = [_over(one, timing.name, name) for name in (one.timings[0].name, LOOP)]
                lines.append(f"| {one.case} | {timing.name} | " + " | ".join(cells) + " |")
        for missing in one.missing:
            reason = missing.reason.replace("|", "\\|")
            lines.append(f"| {one.case} | {missing.name}: {reason} | - | - |")
    return "\n".join(lines)


def _over(comparison: Comparison, name: str, base: str) -> str:
    """An arm's ratio to another, with its interval; a dash where that was not timed."""
    against = replace(comparison, timings=[replace(t, baseline=t.name == base) for t in comparison.timings])
    if not any(timing.baseline for timing in against.timings):
        return "-"
    timing = next(timing for timing in against.timings if timing.name == name)
    low, high = against.interval(timing)
    return f"{against.ratio(timing):.2f} ({low:.2f} to {high:.2f})"


def _bert(sizes: Sizes) -> nn.Module:
    package: Any = import_module("transformers")
    config = package.BertConfig(
        vocab_size=sizes.tokens, hidden_size=sizes.width, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, intermediate_size=4 * sizes.width, max_position_embeddings=sizes.positions,
        num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module: nn.Module = package.BertForSequenceClassification(config)
    return module


def _gpt2(sizes: Sizes) -> nn.Module:
    package: Any = import_module("transformers")
    config = package.GPT2Config(
        vocab_size=sizes.tokens, n_embd=sizes.width, n_layer=sizes.layers, n_head=sizes.heads,
        n_positions=sizes.positions, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    module: nn.Module = package.GPT2LMHeadModel(config)
    return module


class Lstm(nn.Module):
    """An LSTM and a linear layer of its last output."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.lstm = nn.LSTM(sizes.width, sizes.width, sizes.layers, batch_first=True)
        self.head = nn.Linear(sizes.width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


class LstmLoop(nn.Module):
    """The same, one cell after another."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(sizes.width, sizes.width) for _ in range(sizes.layers)])
        self.head = nn.Linear(sizes.width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        inputs = list(x.unbind(1))
        for cell in self.cells:
            state = x.new_zeros(2, len(x), self.head.in_features).unbind()
            for t, value in enumerate(inputs):
                state = cell(value, state)
                inputs[t] = state[0]
        logits: Tensor = self.head(inputs[-1])
        return logits


def _tokens(sizes: Sizes) -> Tensor:
    return random.randint(random.key(1), (sizes.batch, sizes.positions), 0, sizes.tokens)


def _labels(sizes: Sizes) -> Tensor:
    return random.randint(random.key(2), (sizes.batch,), 0, CLASSES)


def _texts(sizes: Sizes) -> tuple[dict[str, Tensor], Tensor]:
    return {"input_ids": _tokens(sizes)}, _labels(sizes)


def _padded_texts(sizes: Sizes) -> tuple[dict[str, Tensor], Tensor]:
    """Half of the positions are there in the shortest text, all in the longest."""
    lengths = torch.linspace(sizes.positions / 2, sizes.positions, sizes.batch).long()
    there = torch.arange(sizes.positions) < lengths[:, None]
    return {"input_ids": _tokens(sizes), "attention_mask": there.long()}, _labels(sizes)


def _next_tokens(sizes: Sizes) -> tuple[dict[str, Tensor], Tensor]:
    tokens = _tokens(sizes)
    return {"input_ids": tokens}, tokens[:, 1:]


def _vectors(sizes: Sizes) -> tuple[dict[str, Tensor], Tensor]:
    return {"x": random.normal(random.key(1), (sizes.batch, sizes.positions, sizes.width))}, _labels(sizes)


def _of_output(outputs: Any) -> Tensor:
    logits: Tensor = outputs.logits
    return logits


def _but_the_last(outputs: Any) -> Tensor:
    return _of_output(outputs)[..., :-1, :]


def _itself(outputs: Any) -> Tensor:
    logits: Tensor = outputs
    return logits


RECIPES = (
    Recipe("LSTM", Lstm, _vectors, _itself, RECURRENT, 1.39, compiles=False, as_loop=LstmLoop),
    Recipe("BERT", _bert, _texts, _of_output, TRANSFORMER, 7.9),
    Recipe("BERT, padded", _bert, _padded_texts, _of_output, TRANSFORMER, 7.9),
    Recipe("GPT-2", _gpt2, _next_tokens, _but_the_last, TRANSFORMER, 7.9),
)

QUESTION = Question("modules", "clipped sums of BERT, GPT-2 and an LSTM over the modules' own passes", cases, conclude)
