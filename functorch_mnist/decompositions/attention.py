"""Attention of several heads: four linear maps, and between them ops without parameters.

    q, k, v = x_q W_qᵀ + b_q, x_k W_kᵀ + b_k, x_v W_vᵀ + b_v
    a_h = softmax(q_h k_hᵀ / √d + mask) v_h    of each head h, of d numbers
    y = (a_1 … a_heads) W_oᵀ + b_o

Shapes: L queries, S keys, N sequences, E numbers each.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_NAME = "multi_head_attention_forward"


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward`.

    Args:
        query: (L, N, E), or (L, E) of one sequence; so are
        key, value: (S, N, …), of any sizes with separate weights.
        embed_dim_to_check: E.
        num_heads: divides E.
        in_proj_weight: (3 E, E), the rows of q, k and v; `F.linear` gets it whole where query, key and value are one
            tensor, else its slices.
        in_proj_bias: (3 E,), or none.
        bias_k, bias_v: (1, 1, E), one more key and value; or none.
        add_zero_attn: one more key and value of zeros.
        dropout_p: the rate of attention weights, in [0, 1): by `F.dropout` of (N · heads, L, S) with `need_weights`,
            else by `F.scaled_dot_product_attention`; nothing without `training`.
        out_proj_weight, out_proj_bias: (E, E), and (E,) or none.
        training: see `dropout_p`.
        key_padding_mask: (N, S), or (S,) of one sequence: true where a key is left out, or what is added to its logits.
        need_weights: also return the attention weights.
        attn_mask: (L, S) or (N · heads, L, S), as `key_padding_mask`.
        use_separate_proj_weight: the following three are used in place of `in_proj_weight`.
        q_proj_weight, k_proj_weight, v_proj_weight: (E, E), (E, key's), (E, value's).
        static_k, static_v: (N · heads, S, E / heads), used in place of the products with key and value.
        average_attn_weights: return their mean over the heads.
        is_causal: `attn_mask` is the causal one.

    Returns:
        y, shaped as the query, and none or the attention weights: (N, L, S), or (N, heads, L, S) that are not averaged,
        without N for one sequence.

    Raises:
        ValueError: shapes disagree, or a parameter is missing.

    Cost: that of the op. Without `need_weights`, `vmap` has no rule for torch's kernel of attention on a CPU; it has
        one for `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    """
    batched = query.dim() == 3
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
        raise _wrong("query, key and value must all have 3 axes, or 2", _shapes(query, key, value))
    _must_be("the query's last axis", query.shape[-1:], (embed_dim_to_check,))
    _must_be("key's axes but the last", key.shape[:-1], value.shape[:-1])
    if embed_dim_to_check % num_heads:
        raise _wrong("heads must divide the embedding", f"{num_heads} and {embed_dim_to_check}")
    if is_causal and attn_mask is None:
        raise _wrong("is_causal needs the causal attn_mask", "None")

    if use_separate_proj_weight:
        weights = [_given(w) for w in (q_proj_weight, k_proj_weight, v_proj_weight)]
        q, k, v = _project_by_three(query, key, value, weights, in_proj_bias)
    else:
        q, k, v = _project_by_one(query, key, value, _given(in_proj_weight), in_proj_bias)
    if not batched:
        q, k, v = q[:, None], k[:, None], v[:, None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    length, n, size = q.shape
    _must_be("the batch of keys", k.shape[1:2], (n,))
    keys = len(k) if static_k is None else static_k.shape[1]

    mask = None
    if key_padding_mask is not None:
        _must_be("key_padding_mask", key_padding_mask.shape, (n, keys))
        rows = _additive(key_padding_mask, query.dtype)[:, None, None]  # (N, 1, 1, S)
        mask = rows.expand(-1, num_heads, -1, -1).flatten(0, 1)
    if attn_mask is not None:
        leading = () if attn_mask.dim() == 2 else (n * num_heads,)
        _must_be("attn_mask", attn_mask.shape, (*leading, length, keys))
        if need_weights or mask is not None or not is_causal:
            additive = _additive(attn_mask, query.dtype)
            additive = additive[None] if attn_mask.dim() == 2 else additive
            mask = additive if mask is None else additive + mask

    if (bias_k is None) != (bias_v is None):
        raise _wrong("bias_k and bias_v must be given together", "one of them")
    if bias_k is not None and bias_v is not None:
        if static_k is not None or static_v is not None:
            raise _wrong("a static key or value must have no bias", "both")
        k = torch.cat([k, bias_k.expand(1, n, size)])
        v = torch.cat([v, bias_v.expand(1, n, size)])
        mask = None if mask is None else F.pad(mask, (0, 1))
    q = _heads(q, num_heads)
    k = _heads(k, num_heads) if static_k is None else static_k
    v = _heads(v, num_heads) if static_v is None else static_v
    _must_be("keys", k.shape, (n * num_heads, k.shape[1], size // num_heads))
    _must_be("values", v.shape, k.shape)
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = None if mask is None else F.pad(mask, (0, 1))

    rate = dropout_p if training else 0.0
    attention = None
    if need_weights:
        q = q * math.sqrt(1 / q.shape[-1])
        logits = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
        attention = logits.softmax(-1)
        if rate > 0:
            attention = F.dropout(attention, rate)
        mixed = torch.bmm(attention, v).unflatten(0, (n, num_heads))
        attention = attention.unflatten(0, (n, num_heads))
        attention = attention.mean(1) if average_attn_weights else attention
    else:
        if mask is not None:  # (1, 1, L, S) or (N, heads, L or 1, S)
            mask = mask[None] if len(mask) == 1 else mask.unflatten(0, (n, num_heads))
        q, k, v = (x.unflatten(0, (n, num_heads)) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, mask, rate, is_causal and mask is None)
    y = F.linear(mixed.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)  # (L, N, E)
    if batched:
        return y, attention
    return y.squeeze(1), None if attention is None else attention.squeeze(0)


def _project_by_one(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v by the packed parameters: one product for all inputs that are one tensor."""
    size = query.shape[-1]
    _must_be("in_proj_weight", weight.shape, (3 * size, size))
    if key is not value:
        return _project_by_three(query, key, value, [weight[:size], weight[size : 2 * size], weight[2 * size :]], bias)
    if query is key:
        q, k, v = F.linear(query, weight, bias).chunk(3, -1)
        return q, k, v
    b_q, b_kv = (None, None) if bias is None else (bias[:size], bias[size:])
    k, v = F.linear(key, weight[size:], b_kv).chunk(2, -1)
    return F.linear(query, weight[:size], b_q), k, v


def _project_by_three(
    query: Tensor, key: Tensor, value: Tensor, weights: list[Tensor], bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v by parameters of each."""
    size = query.shape[-1]
    biases = (None, None, None) if bias is None else (bias[:size], bias[size : 2 * size], bias[2 * size :])
    for x, w in zip((query, key, value), weights, strict=True):
        _must_be("a projection's weight", w.shape, (size, x.shape[-1]))
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    return q, k, v


def _heads(x: Tensor, heads: int) -> Tensor:
    """(S, N, E) as (N · heads, S, E / heads)."""
    rows: Tensor = x.unflatten(-1, (heads, -1))
    return rows.flatten(1, 2).transpose(0, 1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the logits."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise _wrong("masks must be of bools or floats", str(mask.dtype))
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _given(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise _wrong("projections must have their weights", "None")
    return weight


def _must_be(what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != tuple(expected):
        raise _wrong(f"{what} must be {tuple(expected)}", str(tuple(found)))


def _shapes(*tensors: Tensor) -> str:
    return ", ".join([str(tuple(x.shape)) for x in tensors])


def _wrong(rule: str, found: str) -> ValueError:
    return ValueError(f"{_NAME}: {rule}. Found {found}.")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, by its weights.

    Args:
        query: (…, heads, L, E), or without heads; so are
        key, value: (…, heads or fewer with `enable_gqa`, S, …).
        attn_mask: True where a query sees a key, or floats to add; or none.
        dropout_p: the rate of the weights, by `F.dropout`.
        is_causal: a query sees the keys up to its own position.
        scale: of the products, by default 1 / √E.
        enable_gqa: several heads of queries share one of keys.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.softmax(scores, -1)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p, True)
    return weights @ value
