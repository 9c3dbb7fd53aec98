"""Scores of single examples. With p = softmax(outputs) and ∇ the gradient of the example's loss:

    loss             the example's loss
    EL2N             |p - onehot(label)|
    GraNd            |∇|
    margin           outputs[label] - the largest other output
    self-influence   Σ_t lr_t |∇_t|², over checkpoints t: TracIn of an example on itself
    forgetting       events in which an example is classified correctly at one checkpoint and wrongly at the next

Reference: EL2N and GraNd: Paul et al., "Deep learning on a data diet", NeurIPS 2021. Self-influence: Pruthi et al.,
"Estimating training data influence by tracing gradient descent", NeurIPS 2020. Forgetting: Toneva et al., "An empirical
study of example forgetting during deep neural network learning", ICLR 2019. Margin: Pleiss et al., "Identifying
mislabeled data using the area under the margin ranking", NeurIPS 2020.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import batch as batches
from .. import tree
from ..arguments import check_outputs_fn, check_params, check_takes, shown
from ..distributed import SINGLE_PROCESS, World, map_rows
from ..losses import cross_entropy
from ..losses.labels import check_labels, own
from ..per_sample import Plan, factored
from ..tree import Tree


class OutputScores(NamedTuple):
    """The scores that need outputs and labels alone, (N,) each.

    Fields:
        prediction: (N,) int64, the predicted label, that of the largest output.
        el2n: (N,), EL2N, |p - onehot(label)|, in [0, √2].
        margin: (N,), the label's output minus the largest other: below zero where the prediction is wrong.
    """

    prediction: Tensor
    """int64: the predicted label, that of the largest output."""
    el2n: Tensor
    """EL2N, |p - onehot(label)|, in [0, √2]."""
    margin: Tensor
    """The label's output minus the largest other: below zero where the prediction is wrong."""


class Scores(NamedTuple):
    """The scores of examples at one checkpoint, (N,) each, float32 or wider.

    Fields:
        loss: (N,), the loss of the example.
        grand: (N,), GraNd, the gradient norm |∇|.
        prediction: (N,) int64, the predicted label, that of the largest output.
        el2n: (N,), EL2N, |p - onehot(label)|, in [0, √2].
        margin: (N,), the label's output minus the largest other: below zero where the prediction is wrong.
    """

    loss: Tensor
    """The loss of the example."""
    grand: Tensor
    """GraNd, the gradient norm |∇|."""
    prediction: Tensor
    """int64: the predicted label, that of the largest output."""
    el2n: Tensor
    """EL2N, |p - onehot(label)|, in [0, √2]."""
    margin: Tensor
    """The label's output minus the largest other: below zero where the prediction is wrong."""


def scores(
    outputs_fn: Callable[..., Tensor],
    params: Tree,
    *inputs: Tensor,
    labels: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
    world: World = SINGLE_PROCESS,
) -> Scores:
    """Loss, GraNd, EL2N, margin and predicted label of each example at one checkpoint, in one backward pass.

    Args:
        outputs_fn: `outputs_fn(params, *input) -> (K,)`, of one example, without dropout.
        params: the checkpoint, a pytree of float tensors.
        inputs: tensors (N, …).
        labels: (N,) integers in [0, K).
        loss_fn: `loss_fn(outputs (K,), label ()) -> ()`.
        mask: (N,) bool; an example with False, whatever it holds, has scores of zero.
        chunk_size: examples taken at a time, at least 1; by default all.
        plan: how `per_sample` computes each parameter; by default the cheapest way.
        world: the processes, all with the same examples, which divide the chunks between them.

    Returns:
        The scores, (N,) each.

    Raises:
        ValueError: tensors differ in N, a label is out of range, or the chunk size or the plan does not fit.
        TypeError: the labels are not integers, the parameters are a module, or a function takes other arguments.
        RuntimeError: compiled or on a GPU, a label is out of range.

    Cost: that of `per_sample.norms`.

    Example:
        >>> result = scores(lambda w, x: w * x, torch.zeros(2), torch.ones(1, 2), labels=torch.tensor([0]))
        >>> result.grand, result.el2n
        (tensor([0.7071]), tensor([0.7071]))

    Reference: EL2N and GraNd: Paul, Ganguli, Dziugaite, "Deep learning on a data diet: finding important examples early
        in training", NeurIPS 2021, definitions 2.1 and 2.3; margin: Pleiss et al., "Identifying mislabeled data using
        the area under the margin ranking", NeurIPS 2020.
    """

    def both_fn(params: Tree, *example: Tensor) -> tuple[Tensor, Tensor]:
        outputs = outputs_fn(params, *example[:-1])
        return loss_fn(outputs, example[-1]), outputs

    def of(*batch: Tensor, mask: Tensor | None = None) -> Scores:
        rows = []
        for chunk in batches.chunks("attribution.scores", batch, mask, chunk_size):
            part = factored(both_fn, params, *chunk.batch, mask=chunk.mask, plan=plan, has_aux=True)
            (of_chunk,) = batches.blanked(chunk.batch[-1:], chunk.mask)
            columns = Scores(tree.wide(part.losses), part.norms(), *output_scores(part.aux, of_chunk))
            rows.append([chunk.unpadded(batches.masked(column, chunk.keep())) for column in columns])
        return Scores(*[torch.cat(column) for column in zip(*rows, strict=True)])

    check_params("attribution.scores", params)
    check_outputs_fn("attribution.scores", outputs_fn)
    check_takes(
        "attribution.scores", "loss_fn", loss_fn, ["outputs", "label"],
        "It is a function of one example's outputs (K,) and label, such as losses.cross_entropy.",
    )  # fmt: skip
    check_takes(
        "attribution.scores", "outputs_fn", outputs_fn, ["params", *["one input"] * len(inputs)],
        "It gives the outputs (K,) of one example; the labels are an argument of their own.",
    )  # fmt: skip
    batches.size_of_chunks("attribution.scores", (*inputs, labels), mask, chunk_size)
    return map_rows(world, of, *inputs, labels, mask=mask, unit=chunk_size)


def output_scores(outputs: Tensor, labels: Tensor) -> OutputScores:
    """Predicted label, EL2N and margin: the scores that need no gradient.

    Args:
        outputs: (N, K) logits or log-probabilities, K at least 2.
        labels: (N,) integers in [0, K).

    Returns:
        The scores, (N,) each, float32 or wider.

    Raises:
        ValueError: shapes do not agree, a label is out of range, or K is below 2.
        TypeError: the labels are not integers.
        RuntimeError: compiled or on a GPU, a label is out of range.

    Example:
        >>> output_scores(torch.tensor([[2.0, 0.0]]), torch.tensor([1])).margin
        tensor([-2.])

    Reference: as of `scores`.
    """
    labels = check_labels("output_scores", outputs, labels)
    if outputs.shape[-1] < 2:
        raise ValueError(f"output_scores: a margin needs at least two classes. Found {outputs.shape[-1]}.")
    mine = own(labels, outputs.shape[-1])
    wide = tree.wide(outputs)
    errors = wide.softmax(-1) - mine.float()
    el2n = torch.linalg.vector_norm(errors, dim=-1, dtype=torch.float64).to(wide.dtype)  # of sure ones, 1e-22 and less
    others = wide.masked_fill(mine, -torch.inf).amax(-1)
    margin = wide.gather(-1, labels[..., None].long()).squeeze(-1) - others
    return OutputScores(outputs.argmax(-1), el2n, margin)


def self_influence(grand: Tensor, lrs: Tensor) -> Tensor:
    """Self-influence `Σ_t lr_t |∇_t|²`: TracIn of each example on itself.

    At a single checkpoint it ranks examples as GraNd does.

    Args:
        grand: (T, N), GraNd at T checkpoints.
        lrs: (T,), the learning rate at each.

    Returns:
        (N,) float64, for squares of small norms are below float32's range.

    Raises:
        ValueError: shapes do not fit.
        TypeError: `grand` or `lrs` is no tensor.

    Example:
        >>> self_influence(torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([1.0, 0.5]))
        tensor([1.0000, 8.5000], dtype=torch.float64)

    Reference: Pruthi et al., "Estimating training data influence by tracing gradient descent", NeurIPS 2020.
    """
    if not isinstance(grand, Tensor) or not isinstance(lrs, Tensor):
        raise TypeError(
            f"self_influence: grand (T, N) and lrs (T,) must be tensors. Found {shown(grand)} and {shown(lrs)}. "
            "Stack the checkpoints' scores?"
        )
    if grand.dim() != 2 or lrs.shape != grand.shape[:1]:
        raise ValueError(
            f"self_influence: grand must be (T, N) and lrs (T,). Found {tuple(grand.shape)} and {tuple(lrs.shape)}."
        )
    return lrs.double() @ grand.double().square()


def forgetting_events(correct: Tensor) -> Tensor:
    """Forgetting events: how often each example was classified correctly at one checkpoint and wrongly at the next.

    Args:
        correct: (T, N) bool, whether each example was classified correctly, in the order of training.

    Returns:
        (N,) int64; T for an example that was never learned, more than any other can have.

    Raises:
        ValueError: `correct` is not (T, N) bool.

    Example:
        >>> right = torch.tensor([[True, True, False], [False, True, False], [True, True, False]])
        >>> forgetting_events(right)
        tensor([1, 0, 3])

    Reference: Toneva et al., "An empirical study of example forgetting during deep neural network learning", ICLR 2019,
        section 3.
    """
    if correct.dim() != 2 or correct.dtype != torch.bool:
        raise ValueError(
            f"forgetting_events: correct must be bool (T, N). Found {correct.dtype} {tuple(correct.shape)}."
        )
    events = (correct[:-1] & ~correct[1:]).sum(0)
    return torch.where(correct.any(0), events, len(correct))
