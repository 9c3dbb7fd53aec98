"""The limit of the machine: what work takes at the least, and what the machine can do in a second.

Arithmetic is counted as the products of an eager step, forward and backward. The least bytes are those of a step that
keeps nothing in cache from one pass to the next: parameters and momentum are read and written once, the batch is read
once, and what autograd saves for the backward pass is written once and read once. Rates are measured: the best of
several products and convolutions, and of copies larger than any cache.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .measure import Cost
from .problems import Problem, precision


class Rates(NamedTuple):
    """What the machine does in a second."""

    arithmetic: Mapping[str, float]
    """Operations of a matrix product or a convolution, by precision."""
    bytes: float
    """Read and written by a copy."""

    def seconds(self, cost: Cost, precision: str) -> float:
        """The least time that work takes here: no machine does it in less than its slower half needs."""
        return max(cost.arithmetic / self.arithmetic[precision], cost.bytes / self.bytes)


def of_step(problem: Problem, dtype: torch.dtype) -> Cost:
    """The cost of one training step with momentum, the forward pass in `dtype`."""
    module, x, labels = problem.loaded(), problem.x, problem.labels
    params = list(module.parameters())
    own = {tensor.untyped_storage().data_ptr() for tensor in (*params, x, labels)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    autocast = torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            loss = F.cross_entropy(module(x), labels)
        torch.autograd.grad(loss, params)
    weights = sum(p.numel() * p.element_size() for p in params)
    return Cost(counter.get_total_flops(), 4 * weights + x.numel() * x.element_size() + 2 * sum(saved.values()))


def rates(device: str) -> Rates:
    """What this machine does in a second, with as many threads as torch has; a few seconds of work."""
    found = {precision(dtype): _arithmetic(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    size = 2**28 if device == "cpu" else 2**31
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Rates(found, 2 * size / _least_seconds(lambda: target.copy_(source), device))


def _arithmetic(device: str, dtype: torch.dtype) -> float:
    """The best rate of a square product and of a convolution."""
    n, batch = (1536, 32) if device == "cpu" else (8192, 256)
    x, y = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    image = torch.ones(batch, 64, 56, 56, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    kernel = torch.ones(64, 64, 3, 3, dtype=dtype, device=device)
    with torch.no_grad():
        product = 2 * n**3 / _least_seconds(lambda: x @ y, device)
        convolution = 2 * batch * 54 * 54 * 64 * 64 * 9 / _least_seconds(lambda: F.conv2d(image, kernel), device)
    return max(product, convolution)


def _least_seconds(call: Callable[[], object], device: str, calls: int = 9) -> float:
    """The fast quarter of some calls: a limit is not what a busy machine does on average."""
    times = []
    for _ in range(calls):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.quantiles(times[1:], n=4)[0]
