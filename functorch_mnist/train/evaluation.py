"""Evaluation: counts over a data set, added up over batches and divided once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import check_fn, check_params, check_takes
from ..batch import check
from ..distributed import SINGLE_PROCESS, World, map_rows
from ..losses.labels import check_labels
from ..tree import Tree


class Evaluation(NamedTuple):
    """The confusion matrix and mean loss of a classifier on a data set, and the metrics that follow from them."""

    confusion: Tensor
    """(K, K) int64, the confusion matrix: how many examples of the row's class have the column's predicted label."""
    loss: Tensor
    """0-d float64: the mean loss per example."""

    @property
    def correct(self) -> int:
        """The number of examples whose predicted label is their label."""
        return int(self.confusion.diagonal().sum())

    @property
    def total(self) -> int:
        """The number of examples."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """`correct / total`."""
        return self.correct / self.total

    @property
    def recall(self) -> Tensor:
        """(K,) float64: of each class's examples, the fraction predicted as it; NaN for a class without examples."""
        return self.confusion.diagonal().double() / self.confusion.sum(1)

    @property
    def precision(self) -> Tensor:
        """(K,) float64: of the examples predicted as each class, the fraction that is of it; 0 where none is."""
        return self.confusion.diagonal().double() / self.confusion.sum(0).clamp(min=1)

    @property
    def f1(self) -> Tensor:
        """(K,) float64: for each class, the harmonic mean of recall and precision; 0 without a correct prediction."""
        either = self.confusion.sum(0) + self.confusion.sum(1)
        return 2 * self.confusion.diagonal().double() / either.clamp(min=1)

    @property
    def macro_f1(self) -> float:
        """The mean of `f1` over the classes that have examples."""
        return self.f1[self.confusion.sum(1) > 0].mean().item()

    @property
    def balanced_accuracy(self) -> float:
        """The mean of `recall` over the classes that have examples."""
        return self.recall.nanmean().item()


def evaluate(
    apply_fn: Callable[..., Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    params: Tree,
    x: Tensor | tuple[Tensor, ...],
    labels: Tensor,
    *,
    batch_size: int = 1000,
    world: World = SINGLE_PROCESS,
) -> Evaluation:
    """The confusion matrix, accuracy and mean loss of a classifier on a data set.

    Args:
        apply_fn: `apply_fn(params, *inputs) -> (B, K)`, the outputs of a batch, such as `model.apply`.
        loss_fn: `loss_fn(outputs (B, K), labels (B,)) -> (B,)`, one loss per example, such as `losses.cross_entropy`.
        params: the parameters.
        x: (N, …), at least one example; or a tuple of such tensors, for several inputs.
        labels: (N,) integers in [0, K).
        batch_size: examples per call, at least 1.
        world: the processes, which divide the calls between them.

    Returns:
        The evaluation, the same on all processes.

    Raises:
        ValueError: there is no example, `batch_size` is below 1, outputs are not (N, K), labels are not (N,) in [0, K),
            or the losses are not one per example.
        TypeError: the labels are not integers, the parameters are a module or a state, or the loss does not take
            outputs and labels.

    Guarantees: the counts do not depend on `batch_size`, nor any bit of the result on the number of processes.

    Cost: a forward pass, without gradients.

    Example:
        >>> from functorch_mnist.losses import cross_entropy
        >>> evaluate(lambda params, x: x, cross_entropy, (), torch.eye(2), torch.tensor([0, 0])).accuracy
        0.5
    """
    check_takes(
        "evaluate", "loss_fn", loss_fn, ["outputs", "labels"],
        "It is a function of outputs (B, K) and labels (B,), such as losses.cross_entropy, not of parameters.",
    )  # fmt: skip
    outputs = predictions(apply_fn, params, x, batch_size=batch_size, world=world)
    if outputs.dim() != 2:
        raise ValueError(
            f"evaluate: outputs must be (N, K). Found {tuple(outputs.shape)}. Is there an axis of positions?"
        )
    check_labels("evaluate", outputs, labels.cpu())  # on the CPU, where the error can show values
    classes = outputs.shape[-1]
    pairs = torch.bincount(labels.long() * classes + outputs.argmax(-1), minlength=classes**2)
    losses = loss_fn(outputs, labels)
    if losses.shape != labels.shape:
        raise ValueError(
            f"evaluate: loss_fn must return one loss per example, ({len(labels)},). Found {tuple(losses.shape)}. "
            "Does it take a mean, or is it for a single example?"
        )
    return Evaluation(pairs.view(classes, classes), losses.double().mean())


def predictions(
    apply_fn: Callable[..., Tensor],
    params: Tree,
    x: Tensor | tuple[Tensor, ...],
    *,
    batch_size: int = 1000,
    world: World = SINGLE_PROCESS,
) -> Tensor:
    """The outputs of a model for each example, in batches.

    Args:
        apply_fn: `apply_fn(params, *inputs) -> (B, …)`, the outputs of a batch.
        params: the parameters.
        x: (N, …), at least one example; or a tuple of such tensors, for several inputs.
        batch_size: examples per call, at least 1.
        world: the processes, which divide the calls between them.

    Returns:
        (N, …), such as logits (N, K); no gradient flows to it.

    Raises:
        ValueError: there is no example, the inputs differ in their number, or `batch_size` is below 1.
        TypeError: the parameters are a module or a state, or `apply_fn` is a module.

    Example:
        >>> predictions(torch.mul, torch.tensor(2.0), torch.tensor([[1.0], [3.0]])).tolist()
        [[2.0], [6.0]]
    """
    check_params("evaluate", params)
    if isinstance(apply_fn, nn.Module):
        raise TypeError(
            f"evaluate: apply_fn must be a function of params and inputs. Found the module {type(apply_fn).__name__}. "
            "Take params, model = models.from_module(module), and model.apply?"
        )
    check_fn("evaluate", "apply_fn", apply_fn)
    inputs = x if isinstance(x, tuple) else (x,)
    if check("evaluate", inputs, None) < 1 or batch_size < 1:
        raise ValueError(
            f"evaluate: examples and batch_size must be at least 1. Found {len(inputs[0])} and {batch_size}."
        )

    def of(*rows: Tensor) -> Tensor:
        parts = zip(*[x.split(batch_size) for x in rows], strict=True)
        return torch.cat([apply_fn(params, *part) for part in parts])

    with torch.no_grad():
        return map_rows(world, of, *inputs, unit=batch_size)
