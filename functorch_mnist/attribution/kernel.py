"""The empirical neural tangent kernel of a model at its parameters, and regression with it.

    K_ij = (1 / C) Σ_c ⟨∇f_c(x_i), ∇f_c(x_j)⟩

over the C outputs: the trace form. In it the model linearised at its parameters predicts, with ridge λ,

    f(x) + K(x, X) (K(X, X) + λ)⁻¹ (Y - f(X))

Reference: Jacot et al., "Neural tangent kernel: convergence and generalization in neural networks", NeurIPS 2018; the
trace form: Novak et al., "Fast finite width neural tangent kernel", ICML 2022, section 2.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..arguments import check_outputs_fn, check_params
from ..distributed import SINGLE_PROCESS, World
from ..per_sample import Plan, gram
from ..tree import Tree
from .solve import finite, rounding, solve


def tangent_kernel(
    outputs_fn: Callable[..., Tensor],
    params: Tree,
    a: Sequence[Tensor],
    b: Sequence[Tensor] | None = None,
    *,
    chunk_size: int | None = None,
    plan: Plan | None = None,
    world: World = SINGLE_PROCESS,
) -> Tensor:
    """The empirical neural tangent kernel (NTK) of a model, in its trace form.

    Args:
        outputs_fn: `outputs_fn(params, *input) -> (C,)`, of one example.
        params: a pytree of float tensors.
        a, b: tuples of inputs (N, …) and (M, …), with at least one example; without `b` all pairs of `a`.
        chunk_size: examples taken at a time, at least 1; by default all.
        plan: how `per_sample` computes each parameter; by default the cheapest way.
        world: the processes, all with the same examples, which divide the rows between them.

    Returns:
        (N, M), or (N, N) without `b`: `(1 / C) Σ_c ⟨∇f_c(x_i), ∇f_c(x_j)⟩`.

    Raises:
        ValueError: `a` or `b` is no tuple of tensors with an example, or the outputs are not (C,).
        TypeError: the parameters or `outputs_fn` are a module.

    Cost: C backward passes over each set.

    Example:
        >>> tangent_kernel(lambda w, x: w @ x, torch.zeros(2, 2), (torch.eye(2),))
        tensor([[1., 0.],
                [0., 1.]])

    Reference: Jacot, Gabriel, Hongler, "Neural tangent kernel: convergence and generalization in neural networks",
        NeurIPS 2018; the trace form: Novak, Sohl-Dickstein, Schoenholz, "Fast finite width neural tangent kernel", ICML
        2022.
    """
    if isinstance(a, Tensor) or isinstance(b, Tensor) or not a or not len(a[0]):
        raise ValueError(
            "tangent_kernel: a and b must be tuples of tensors, such as (x,), with an example each. Found others."
        )
    check_params("tangent_kernel", params)
    check_outputs_fn("tangent_kernel", outputs_fn)
    shape = tuple(outputs_fn(params, *[x[0] for x in a]).shape)
    if len(shape) != 1:
        raise ValueError(f"tangent_kernel: the outputs of one example must be (C,). Found {shape}.")
    count = shape[0]

    def output_fn(params: Tree, *example: Tensor) -> Tensor:  # one of the outputs, that which the last tensor marks
        return (outputs_fn(params, *example[:-1]) * example[-1]).sum(-1)

    parts = []
    for unit in torch.eye(count, device=a[0].device):
        first, second = (None if x is None else (*x, unit.expand(len(x[0]), count)) for x in (a, b))
        parts.append(gram(output_fn, params, first or (), second, chunk_size=chunk_size, plan=plan, world=world))
    return torch.stack(parts).mean(0)


def kernel_regression(kernel: Tensor, residuals: Tensor, cross: Tensor, *, ridge: float) -> Tensor:
    """Kernel ridge regression with a tangent kernel: the correction of new examples' outputs.

    Args:
        kernel: (N, N), of the training examples.
        residuals: (N, C), their targets minus the model's outputs.
        cross: (M, N), of new and training examples.
        ridge: λ, at least 0.

    Returns:
        (M, C) float64: `cross (kernel + λ)⁻¹ residuals`, to be added to the model's outputs.

    Raises:
        ValueError: shapes do not fit, the kernel is not symmetric, a number is not finite, the ridge is below 0, or the
            kernel with it is so nearly singular that its rounding would be divided by. Compiled, the last gives NaN
            instead.

    Example:
        >>> kernel_regression(torch.eye(2), torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 1.0]]), ridge=1.0)
        tensor([[1.5000]], dtype=torch.float64)

    Reference: Jacot, Gabriel, Hongler, NeurIPS 2018, section 5.
    """
    count = len(kernel)
    good = residuals.dim() == 2 and len(residuals) == count
    if kernel.shape != (count, count) or not good or cross.shape[1:] != (count,) or not 0 <= ridge < math.inf:
        raise ValueError(
            f"kernel_regression: kernel (N, N), residuals (N, C), cross (M, N), ridge at least 0. "
            f"Found {tuple(kernel.shape)}, {tuple(residuals.shape)}, {tuple(cross.shape)}, {ridge}."
        )
    finite("kernel_regression", cross)
    weights = solve("kernel_regression", kernel, residuals, damping=ridge, least=rounding(kernel), name="ridge")
    corrections: Tensor = cross.double() @ weights
    return corrections
