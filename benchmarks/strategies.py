"""Which way of taking inner products is faster: Gram matrices or built gradients, for a linear map at T positions.

    python -m benchmarks.strategies [--rounds 30] [--device cpu]

The squared norms of B = 32 examples, compiled, float32. The plan takes the way with less arithmetic; the table shows
how far the times follow it.
"""

import argparse
import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from functorch_mnist import allocator, train
from functorch_mnist.per_sample.layout import layout
from functorch_mnist.per_sample.rules import MatrixForm, Sizes
from functorch_mnist.per_sample.terms import Outer, Strategy

from . import measure

B = 32
SIZES = [
    (t, d, h)
    for (d, h), t in itertools.product([(64, 64), (256, 256), (512, 64), (768, 768)], [16, 32, 64, 128, 256])
    if t * (d + h) * B < 2**24
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    kept = allocator.keep_freed_memory()
    arms, arithmetic = [], {}
    for t, d, h in SIZES:
        generator = torch.Generator().manual_seed(t)
        a, g = (torch.randn(B, 1, t, n, generator=generator).to(options.device) for n in (d, h))
        costs = MatrixForm(layout((h, d)), (0, 1)).costs(Sizes(1, t, d, h))
        arithmetic[f"{t},{d},{h}"] = costs["gram"].arithmetic / costs["build"].arithmetic
        expected = torch.einsum("bgth,bgtd->bhd", g, a).square().sum((1, 2))
        ways: tuple[Strategy, Strategy] = ("build", "gram")
        for way in ways:
            term = Outer(a, g, layout((h, d)), way)
            arms.append(_arm(f"T={t} D={d} H={h} {way}", term, expected))
    settings = {"batch_size": B, "device": options.device, "keep_freed_memory": kept, "arithmetic_ratio": arithmetic}
    result = measure.compare(
        "strategies", arms, rounds=options.rounds, difference=_difference, settings=settings, warmups=3
    )
    print("\n|  T | D | H | gram / build, arithmetic | gram / build, time |\n|---:|---:|---:|---:|---:|")
    medians = {timing.name: timing.median for timing in result.timings}
    for t, d, h in SIZES:
        name = f"T={t} D={d} H={h}"
        ratio = medians[f"{name} gram"] / medians[f"{name} build"]
        print(f"| {t} | {d} | {h} | {arithmetic[f'{t},{d},{h}']:.2f} | {ratio:.2f} |")
    print(f"\nWritten to {measure.write(result)}")


def _arm(name: str, term: Outer, expected: Tensor) -> measure.Arm:
    def square_norms(a: Tensor, g: Tensor) -> Tensor:
        return replace(term, a=a, g=g).square_norms()

    run, found = train.compiled(square_norms), [term.a]

    def call() -> None:
        found[0] = run(term.a, term.g)
        if found[0].is_cuda:
            torch.cuda.synchronize()

    return measure.Arm(name, call, lambda: (found[0], expected), 1e-4)


def _difference(outputs: tuple[Tensor, Tensor], _: Any) -> float:
    found, expected = outputs
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
