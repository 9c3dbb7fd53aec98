"""Ops that hide linear maps of their parameters, written in ops that show them.

    recurrent.py    torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, and the cells of each
    attention.py    F.multi_head_attention_forward, F.scaled_dot_product_attention
    normalization.py    F.batch_norm by fixed statistics, F.group_norm, torch._weight_norm
    embedding.py    F.embedding_bag

A recurrent layer is many products with the same matrices, and torch computes it in one op: whoever follows parameters
through a loss sees them enter it and no more. Each function here has the signature of its op and computes the same by
`F.linear` and `F.embedding`, called with the parameters themselves, and by elementwise ops. It is plain code without
branches on values of tensors, so it runs under `vmap`, `grad` and `torch.compile`, where several of the ops do not.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .. import products
from . import attention, embedding, normalization, recurrent

__all__ = ["decomposition"]

DECOMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: recurrent.lstm,
    torch.gru: recurrent.gru,
    torch.rnn_tanh: recurrent.rnn_tanh,
    torch.rnn_relu: recurrent.rnn_relu,
    torch.lstm_cell: recurrent.lstm_cell,
    torch.gru_cell: recurrent.gru_cell,
    torch.rnn_tanh_cell: recurrent.rnn_tanh_cell,
    torch.rnn_relu_cell: recurrent.rnn_relu_cell,
    F.multi_head_attention_forward: attention.multi_head_attention_forward,
    F.scaled_dot_product_attention: attention.scaled_dot_product_attention,
    F.batch_norm: normalization.batch_norm,
    torch._weight_norm: normalization.weight_norm,
    F.embedding_bag: embedding.embedding_bag,
}

COMPILED: dict[Callable[..., Any], Callable[..., Any]] = dict.fromkeys(
    (F.group_norm, torch.group_norm), normalization.group_norm
)
"""Of ops whose own form is fast, and slow once compiled."""


def fastest(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op, or what takes less time in its place, on this machine or where this is being compiled."""
    if op is F.linear:
        return products.linear
    return COMPILED.get(op, op) if torch.compiler.is_compiling() else op


def decomposition(op: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that computes the same as an op by plain ops and is called alike, if there is one.

    Example:
        >>> decomposition(torch.gru_cell).__name__
        'gru_cell'
        >>> decomposition(torch.relu) is None
        True
    """
    return DECOMPOSITIONS.get(op)
