"""Stateless random numbers: every draw is a pure function of a key.

A key names a stream of 64-bit blocks; the block at counter c is Threefry-2x32 of (key, c). Nothing is consumed and
nothing is stored, so a draw depends on its key and its position alone: not on what was drawn before, on the number of
processes or on how a batch was cut. Keys and numbers are those of `jax.random` (partitionable threefry), in plain int32
tensor operations that work under `torch.func` and `torch.compile`.

All words have 32 bits and all sums are modulo 2**32. With a key (k0, k1), k2 = k0 ^ k1 ^ 0x1BD11BDA, the rotations r of
Threefry-2x32-20 and a counter c = (hi, lo):

    x0, x1 = k0 + hi, k1 + lo
    for n = 0, ..., 19:
        x0 = x0 + x1
        x1 = rotate_left(x1, r[n mod 8]) ^ x0
        after every fourth, with i = 1, ..., 5:
            x0, x1 = x0 + k[i mod 3], x1 + k[(i + 1) mod 3] + i

    split(key)[c] = fold_in(key, c) = (x0, x1)
    bits(key)[c] = x0 ^ x1

So use a key for one thing: split it, or fold numbers into it, or draw from it once.

A key of shape (*lead, 2) is a batch of keys, and every function then returns the stack of the single results.

Reference: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
https://doi.org/10.1145/2063384.2063405.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .compiler import stored

__all__ = [
    "bernoulli",
    "bits",
    "box_muller",
    "box_muller_sum",
    "fold_in",
    "key",
    "normal",
    "permutation",
    "randint",
    "split",
    "uniform",
]


def __dir__() -> list[str]:
    return __all__


_PARITY = 0x1BD11BDA
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_SIGN = -(2**31)
_FLOAT32_MAX = torch.finfo(torch.float32).max

# Least squares at Chebyshev points of [-pi/4, pi/4], in powers of x², highest first: to 3e-8 of cos x and of sin x / x.
_COS = (-0.00135858439, 0.0416550209, -0.499998566, 0.999999972)
_SIN = (-0.000195039631, 0.00833203633, -0.166666507, 0.999999997)
# Giles, single precision: in powers of w - 2.5 for w < 5, of sqrt(w) - 3 beyond, highest first.
_CENTRAL = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
_TAIL = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)


def key(seed: int, *, device: torch.device | str | None = None) -> Tensor:
    """The key of a seed: int32 (2,), the high and the low word of the seed in two's complement.

    Args:
        seed: from -2**63 to 2**64 - 1; a negative seed is the same as the seed plus 2**64.
        device: where the key, and every draw from it, lives; torch's default device if not given.

    Raises:
        TypeError: the seed is not an int.
        ValueError: the seed does not fit in 64 bits.

    Guarantees: equal to `jax.random.key(seed)` for 0 <= seed < 2**32, and with `jax_enable_x64` for every seed.

    Example:
        >>> key(42)
        tensor([ 0, 42], dtype=torch.int32)
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"random.key: a seed is an int. Found {type(seed).__name__}. Convert it with int(seed).")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"random.key: a seed is from -2**63 to 2**64 - 1. Found {seed}. Hash it to 64 bits?")
    return torch.tensor([_signed(seed >> 32), _signed(seed)], dtype=torch.int32, device=device)


def split(key: Tensor, num: int = 2) -> Tensor:
    """New, independent keys.

    Args:
        key: (*lead, 2) int32.
        num: how many, 0 or more.

    Returns:
        (*lead, num, 2) int32.

    Raises:
        TypeError, ValueError: `key` is not a key; `num` is negative.

    Guarantees:
        - equal to `jax.random.split` bit for bit;
        - key i does not depend on `num`, and is `fold_in(key, i)`.

    Example:
        >>> step_key, dropout_key = split(key(0)).unbind(-2)
        >>> dropout_key
        tensor([ 928981903, -841280227], dtype=torch.int32)
    """
    check_key("random.split", key)
    _check_shape("random.split", (num,))
    return torch.stack(_blocks(key, num), dim=-1)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """The key for an event that a number names: a step, the index of an example, the position of a layer.

    Args:
        key: (*lead, 2) int32.
        data: an int from 0 to 2**32 - 1, or an integer tensor that broadcasts with lead, taken modulo 2**32.

    Returns:
        (*batch, 2) int32, where batch is lead broadcast with the shape of `data`.

    Raises:
        TypeError: `key` is not int32; `data` is not an int or an integer tensor.
        ValueError: `key` has the wrong shape; `data` is an int outside the range.

    Guarantees:
        - equal to `jax.random.fold_in` bit for bit;
        - a tensor of indices gives the stack of the keys of the single indices.

    Example:
        >>> fold_in(key(0), torch.arange(3)).shape
        torch.Size([3, 2])
    """
    check_key("random.fold_in", key)
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
            raise TypeError(
                f"random.fold_in: data is an integer tensor. Found {_name(data)}. Fold in an index instead."
            )
        lo = data.to(torch.int32)
    elif not isinstance(data, int) or isinstance(data, bool):
        raise TypeError(f"random.fold_in: data is an int or an integer tensor. Found {type(data).__name__}.")
    elif not 0 <= data < 2**32:
        raise ValueError(f"random.fold_in: data is from 0 to 2**32 - 1. Found {data}. Fold in twice, word by word?")
    else:
        lo = torch.full((), _signed(data), dtype=torch.int32, device=key.device)
    return torch.stack(_threefry(key[..., 0], key[..., 1], torch.zeros_like(lo), lo), dim=-1)


def bits(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Uniform 32-bit words.

    Args:
        key: (*lead, 2) int32.
        shape: of one draw.

    Returns:
        (*lead, *shape) int32; the same words unsigned are `.view(torch.uint32)`.

    Raises:
        TypeError, ValueError: `key` is not a key; `shape` is not a sequence of numbers from 0.

    Guarantees:
        - equal to `jax.random.bits` bit for bit;
        - word i, in row-major order, does not depend on the shape.

    Example:
        >>> bits(key(0), (2,))
        tensor([-224768089,  -91998574], dtype=torch.int32)
    """
    return _words("random.bits", key, shape)


def uniform(key: Tensor, shape: Sequence[int] = (), minval: float = 0.0, maxval: float = 1.0) -> Tensor:
    """Uniform floats in [minval, maxval), 2**23 equally spaced values.

    Args:
        key: (*lead, 2) int32.
        shape: of one draw.
        minval: the least value, which is drawn.
        maxval: the bound, not drawn unless rounding to float32 reaches it.

    Returns:
        (*lead, *shape) float32.

    Raises:
        TypeError, ValueError: `key` is not a key; `shape` is not a sequence of numbers from 0; not minval < maxval, or
            one of minval, maxval and maxval - minval is not finite in float32.

    Guarantees: equal to `jax.random.uniform` bit for bit (on CPU, where its multiply-add rounds once).

    Example:
        >>> uniform(key(0), (2,))
        tensor([0.9477, 0.9786])
    """
    if not (minval < maxval and max(-minval, maxval, maxval - minval) <= _FLOAT32_MAX):
        raise ValueError(f"random.uniform: minval < maxval, finite in float32. Found {minval} and {maxval}. Swapped?")
    unit = _mantissas("random.uniform", key, shape) * 2.0**-23
    if (minval, maxval) == (0, 1):
        return unit
    low = torch.full((), minval, dtype=torch.float32, device=key.device)
    high = torch.full((), maxval, dtype=torch.float32, device=key.device)
    # The product is exact in float64, so this rounds once, with or without a fused multiply-add.
    return (unit.to(torch.float64) * (high - low) + low).to(torch.float32)


def normal(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Standard normal floats, `sqrt(2) * erfinv(u)` with u uniform in (-1, 1).

    Args:
        key: (*lead, 2) int32.
        shape: of one draw.

    Returns:
        (*lead, *shape) float32, between -5.42 and 5.221.

    Raises:
        TypeError, ValueError: `key` is not a key; `shape` is not a sequence of numbers from 0.

    Guarantees: within 4 units in the last place of `jax.random.normal` on CPU.

    Example:
        >>> normal(key(0), (2,))
        tensor([1.6226, 2.0253])

    Reference: Giles, "Approximating the erfinv function", GPU Computing Gems Jade Edition, 2011, chapter 10,
    https://people.maths.ox.ac.uk/gilesm/files/gems_erfinv.pdf.
    """
    # An odd multiple of 2**-24, exact in float32: never 0 and never -1 or 1.
    u = _mantissas("random.normal", key, shape) * 2.0**-22 + (2.0**-24 - 1)
    # (1 - u) * (1 + u) would be closer to erfinv in the tails, but further from JAX.
    w = -torch.log(1 - u * u)
    ratio = torch.where(w < 5, _polynomial(_CENTRAL, w - 2.5), _polynomial(_TAIL, torch.sqrt(w) - 3))
    return ratio * u * math.sqrt(2)


def box_muller(key: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Standard normal floats, two from each block of random words: another stream than `normal`, at half its cost.

    For noise, where the numbers need not be JAX's.

    Args:
        key: (*lead, 2) int32.
        shape: of one draw.

    Returns:
        (*lead, *shape) float32, between -6.67 and 6.67.

    Raises:
        TypeError, ValueError: `key` is not a key; `shape` is not a sequence of numbers from 0.

    Example:
        >>> box_muller(key(0), (2,))
        tensor([ 0.4830, -0.3504])

    Reference: Box and Muller, "A note on the generation of random normal deviates", Annals of Mathematical Statistics
        29, 1958.
    """
    check_key("random.box_muller", key)
    _check_shape("random.box_muller", shape)
    count = math.prod(shape)
    pairs = torch.cat(_pairs(key, (count + 1) // 2), dim=-1)
    return pairs[..., :count].reshape((*key.shape[:-1], *shape))


def box_muller_sum(keys: Tensor, weights: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Σ_k w_k box_muller(key_k), with no draw kept.

    Args:
        keys: (K, 2) int32, K at least 1.
        weights: (K,) float32.
        shape: of one draw.

    Returns:
        shape, float32.

    Raises:
        TypeError, ValueError: `keys` is not a batch of keys; the weights do not fit; `shape` is not a sequence of
            numbers from 0.

    Guarantees:
        - the sum of the single draws, each multiplied and added in the order of the keys;
        - of one key with weight 1 it is `box_muller`, bit for bit.

    Cost: by `train.compiled`, one loop over the numbers, with memory of the result: K times the arithmetic of one draw,
        and about 4 s more of compiling for each key.

    Example:
        >>> box_muller_sum(split(key(0)), torch.tensor([1.0, -0.5]), (2,))
        tensor([-0.2277, -1.2839])
    """
    where = "random.box_muller_sum"
    check_key(where, keys)
    _check_shape(where, shape)
    if keys.ndim != 2 or len(keys) < 1 or weights.shape != keys.shape[:1] or weights.dtype != torch.float32:
        raise ValueError(
            f"{where}: keys are (K, 2), weights float32 (K,), K at least 1. Found keys {_name(keys)}, weights "
            f"{_name(weights)}."
        )
    count = math.prod(shape)
    first, second = (weights[0] * half for half in _pairs(keys[0], (count + 1) // 2))
    for key, weight in zip(keys[1:], weights[1:], strict=True):  # a batch of keys would be stored, (K, …)
        a, b = _pairs(key, (count + 1) // 2)
        first, second = first + weight * a, second + weight * b
    return torch.cat([first, second])[:count].reshape(tuple(shape))


def randint(key: Tensor, shape: Sequence[int], minval: int, maxval: int) -> Tensor:
    """Uniform integers in [minval, maxval).

    Args:
        key: (*lead, 2) int32.
        shape: of one draw.
        minval: the least value, -2**31 or more.
        maxval: one more than the greatest value, 2**31 - 1 or less.

    Returns:
        (*lead, *shape) int64.

    Raises:
        TypeError: `key` is not int32; `shape` or a bound has the wrong type.
        ValueError: `key` or `shape` is wrong; not -2**31 <= minval < maxval < 2**31.

    Guarantees: equal to `jax.random.randint` bit for bit, with its bias. Of the n = maxval - minval values some are
        more likely than others, by a factor below 1 + 2**-47 for n <= 2**16 and of 1 + 1 / floor(2**32 / n) for
        greater n (1 + 2**-16 just above, 2 for n > 2**31), unless n divides 2**32.

    Example:
        >>> randint(key(0), (5,), 0, 10)
        tensor([9, 0, 2, 3, 1])
    """
    check_key("random.randint", key)
    _check_shape("random.randint", shape)
    for bound in (minval, maxval):
        if not isinstance(bound, int) or isinstance(bound, bool):
            raise TypeError(
                f"random.randint: a bound is an int. Found {type(bound).__name__}. Scale the result instead?"
            )
    if not -(2**31) <= minval < maxval < 2**31:
        raise ValueError(f"random.randint: -2**31 <= minval < maxval < 2**31. Found {minval} and {maxval}. Swapped?")
    span = maxval - minval
    # 2**32 mod span as JAX computes it, by squaring 2**16 mod span in 32 bits: that wraps to 0 for wider spans.
    radix = 2**32 % span if span <= 2**16 else 0
    words = (bits(split(key), shape).to(torch.int64) & 0xFFFFFFFF) % span
    high, low = words.unbind(key.ndim - 1)
    return (high * radix + low) % span + minval


def bernoulli(key: Tensor, p: float | Tensor = 0.5, shape: Sequence[int] = ()) -> Tensor:
    """True with probability p, rounded up to a multiple of 2**-23.

    Args:
        key: (*lead, 2) int32.
        p: a number in [0, 1], or a float tensor that broadcasts to (*lead, *shape), whose values are not checked.
        shape: of one draw.

    Returns:
        (*lead, *shape) bool.

    Raises:
        TypeError: `key` is not int32; `shape` is not a sequence; `p` is not a number or a float tensor.
        ValueError: `key` or `shape` is wrong; `p` is a number outside [0, 1] or does not broadcast.

    Guarantees: equal to `jax.random.bernoulli`; never true at p = 0, always true at p = 1.

    Example:
        >>> bernoulli(key(0), 0.5, (4,))
        tensor([False, False,  True,  True])
    """
    draws = _mantissas("random.bernoulli", key, shape) * 2.0**-23
    if not isinstance(p, Tensor):
        if not 0 <= p <= 1:
            raise ValueError(f"random.bernoulli: p is in [0, 1]. Found {p}. Logits need a sigmoid.")
        return draws < p
    if not p.is_floating_point():
        raise TypeError(
            f"random.bernoulli: p is a number or a float tensor. Found {_name(p)}. Convert it with p.float()."
        )
    sizes = zip(p.shape[::-1], draws.shape[::-1], strict=False)
    if p.ndim > draws.ndim or any(size not in (1, wanted) for size, wanted in sizes):
        raise ValueError(
            f"random.bernoulli: p broadcasts to the leading axes of the key and then shape, {tuple(draws.shape)}. "
            f"Found {_name(p)}. Pass shape=p.shape?"
        )
    return draws < p.to(torch.float32)


def permutation(key: Tensor, n: int) -> Tensor:
    """The numbers 0 to n - 1 in random order, by stable sorts on fresh 32-bit words.

    Args:
        key: (*lead, 2) int32.
        n: how many, 0 or more.

    Returns:
        (*lead, n) int64.

    Raises:
        TypeError, ValueError: `key` is not a key; `n` is negative.

    Guarantees: equal to `jax.random.permutation(key, n)`.

    Cost: one sort up to n = 1625, two up to 2.6 million, then three.

    Example:
        >>> permutation(key(0), 5)
        tensor([0, 1, 4, 3, 2])
    """
    check_key("random.permutation", key)
    _check_shape("random.permutation", (n,))
    order = torch.arange(n, device=key.device) + torch.zeros_like(key[..., :1], dtype=torch.int64)
    for _ in range(math.ceil(3 * math.log(max(1, n)) / math.log(2**32 - 1))):
        key, subkey = split(key).unbind(-2)
        words = bits(subkey, (n,)) ^ _SIGN  # signed order is now the unsigned order of the words
        order = order.gather(-1, torch.argsort(words, dim=-1, stable=True))
    return order


def _mantissas(where: str, key: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform whole numbers in [0, 2**23), the high bits of the words: float32 (*lead, *shape)."""
    return ((_words(where, key, shape) >> 9) & 0x7FFFFF).to(torch.float32)


def _words(where: str, key: Tensor, shape: Sequence[int]) -> Tensor:
    """`bits`, with the caller's name in the errors."""
    check_key(where, key)
    _check_shape(where, shape)
    x0, x1 = _blocks(key, math.prod(shape))
    return (x0 ^ x1).reshape((*key.shape[:-1], *shape))


def _pairs(key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Box and Muller's two normals of each of the first blocks: two float32 (*lead, count)."""
    x0, x1 = _blocks(key, count)
    u = (x0 & 0x7FFFFFFF).to(torch.float32) * 2.0**-31 + 2.0**-32  # in (0, 1], fine where the radius is large
    radius = torch.sqrt(-2 * torch.log(u))
    radius = torch.where(x0 < 0, -radius, radius)
    angle = x1.to(torch.float32) * (math.pi * 2.0**-33)  # in [-pi/4, pi/4]; a sign and a swap turn it further
    square, swapped = angle * angle, (x1 & 1).bool()
    cos, sin = _polynomial(_COS, square), _polynomial(_SIN, square) * angle
    return radius * torch.where(swapped, sin, cos), radius * torch.where(swapped, cos, sin)


def _blocks(key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The blocks at the counters 0 to count - 1: two int32 (*lead, count)."""
    if count < 2**31:
        lo = torch.arange(count, dtype=torch.int32, device=key.device)
        hi = torch.zeros_like(lo)
    else:
        hi, lo = _halves(torch.arange(count, dtype=torch.int64, device=key.device))
    return _threefry(key[..., :1], key[..., 1:], hi, lo)


def _halves(index: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low words, int32, of an int64 tensor."""
    return (index >> 32).to(torch.int32), index.to(torch.int32)


def _threefry(k0: Tensor, k1: Tensor, hi: Tensor, lo: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks at the counters (hi, lo) under the keys (k0, k1): int32, the shapes broadcast."""
    k = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = k0 + hi, k1 + lo
    for n in range(20):
        r = _ROTATIONS[n % 8]
        x0 = x0 + x1
        # rotate_left(x1, r) ^ x0, in place on what is made here: the mask makes the shift logical, alpha shifts left.
        x1 = (x1 >> (32 - r)).bitwise_and_(2**r - 1).add_(x1, alpha=2**r).bitwise_xor_(x0)
        if n % 2 == 1:  # else the compiler writes out expressions that grow threefold with every round
            x0, x1 = stored(x0), stored(x1)
        if n % 4 == 3:
            i = n // 4 + 1
            x0, x1 = x0 + k[i % 3], x1 + (k[(i + 1) % 3] + i)
    return x0, x1


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Horner's rule, highest power first."""
    value = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


def _signed(word: int) -> int:
    """The int32 with the low 32 bits of an int."""
    return (word - _SIGN) % 2**32 + _SIGN


def _name(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def check_key(where: str, key: Tensor) -> None:
    """Raises TypeError or ValueError for what is not a key or a batch of keys."""
    typed = isinstance(key, Tensor) and key.dtype == torch.int32
    if typed and key.ndim > 0 and key.shape[-1] == 2:
        return
    found = _name(key) if isinstance(key, Tensor) else type(key).__name__
    error = ValueError if typed else TypeError
    raise error(f"{where}: a key is an int32 tensor of shape (..., 2). Found {found}. Make one with random.key(seed).")


def _check_shape(where: str, shape: Sequence[int]) -> None:
    if isinstance(shape, int):
        raise TypeError(f"{where}: a shape is a sequence of ints. Found {shape}. Write ({shape},).")
    if any(size < 0 for size in shape):
        raise ValueError(f"{where}: a shape has no negative sizes. Found {tuple(shape)}.")
