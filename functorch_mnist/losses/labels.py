"""Labels out of range are refused before any number is made of them.

Where the program may wait, eagerly on a CPU, it looks at the labels and raises. Elsewhere, on a GPU and compiled, the
assertion is part of the computation. A transform of `torch.func` hides a batch of labels from its loss, so they are
looked at beneath the transforms; and the compiler cannot look beneath them, so to it the check is an operator.
"""

import torch
from torch import Tensor

from .. import native


def check_labels(where: str, outputs: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """The labels, refused where they are not integers (...) in [0, K) for outputs (..., K).

    Args:
        where: the function that an error names.
        outputs: (..., K).
        labels: (...) integers in [0, K).
        mask: (...) bool, `False` where a label does not matter; there it becomes 0.

    Returns:
        (...): to be used in place of the labels, so that no compiler drops the check.

    Raises:
        ValueError: shapes do not agree, or a label is out of range.
        TypeError: the labels are not integers.
        RuntimeError: compiled or on a GPU, a label is out of range.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{where}: labels must be a tensor. Found {type(labels).__name__}. Use torch.tensor.")
    if outputs.dim() == 0 or outputs.shape[:-1] != labels.shape:
        raise ValueError(
            f"{where}: outputs (..., K) and labels (...) must share their leading axes. "
            f"Found {tuple(outputs.shape)} and {tuple(labels.shape)}.{_one_hot(outputs, labels)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{where}: labels must be integers in [0, K). Found {labels.dtype}.")
    return in_range(where, labels if mask is None else labels.masked_fill(~mask, 0), outputs.shape[-1])


def in_range(where: str, labels: Tensor, classes: int) -> Tensor:
    """The labels, refused as `check_labels` does where one is not in [0, classes)."""
    if torch.compiler.is_dynamo_compiling():
        found: Tensor = torch.ops.functorch_mnist.in_range(labels, classes, where)
        return found.long().clamp(0, classes - 1)  # a kernel that runs before the assertion finds its index too
    return _in_range(labels, classes, where)


def own(labels: Tensor, classes: int) -> Tensor:
    """True at each label: (...) integers to (..., classes) bool. Works under `vmap`."""
    return labels[..., None] == torch.arange(classes, device=labels.device)


def _in_range(labels: Tensor, classes: int, where: str) -> Tensor:
    with torch._C.DisableTorchFunction():  # a mode that follows a loss's ops is not to see these
        plain = native.beneath(labels)
        waits = type(plain) is Tensor and plain.device.type not in ("cuda", "meta")
        if not waits or torch._C._len_torch_dispatch_stack():
            torch._assert_async(((plain >= 0) & (plain < classes)).all(), _refusal(where, classes, ""))
        elif plain.numel():
            least, most = [int(end) for end in plain.long().aminmax()]
            if least < 0 or most >= classes:
                raise ValueError(_refusal(where, classes, f" Found {least if least < 0 else most}."))
    return labels


def _one_hot(outputs: Tensor, labels: Tensor) -> str:
    """The remedy for labels of the outputs' shape."""
    return " Labels are class numbers (N,). One-hot? Pass y.argmax(-1)." if outputs.shape == labels.shape else ""


def _refusal(where: str, classes: int, found: str) -> str:
    bound = classes if isinstance(classes, int) else "K"  # a compiler may not know it
    return f"{where}: labels must be in [0, {bound}).{found} Leave out such examples, or mask them."


_LIBRARY = torch.library.Library("functorch_mnist", "FRAGMENT")
_LIBRARY.define("in_range(Tensor(a) labels, SymInt classes, str where) -> Tensor(a)")
for _key in ("CompositeImplicitAutograd", "FuncTorchBatched"):
    _LIBRARY.impl("in_range", _in_range, _key)
