"""Makes `random_jax.json` beside it: what `jax.random` draws on CPU. Run as `python tests/golden/make_random_jax.py`.

Words and floats are stored as uint32 bit patterns, in row-major order. A draw of more than 64 numbers is stored as the
SHA-256 of its numbers as little-endian int64 and its first ten numbers.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SEEDS = (0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**40 + 5, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -(2**63))
SHAPES = ((), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 3, 5), (60001,))


def stored(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    flat = array.reshape(-1)
    if flat.size <= 64:
        return {"values": flat.tolist()}
    return {"sha256": hashlib.sha256(flat.astype("<i8").tobytes()).hexdigest(), "first": flat[:10].tolist()}


def main() -> None:
    import jax
    import jax.numpy as jnp

    random: Any = jax.random
    golden: dict[str, list[dict[str, Any]]] = {name: [] for name in ("key", "split", "fold_in", "bits", "uniform")}
    golden |= {name: [] for name in ("normal", "normal_extremes", "randint", "bernoulli", "permutation")}

    with jax.enable_x64(True):
        for seed in SEEDS:
            words = random.key_data(random.key(np.uint64(seed) if seed >= 2**63 else seed))
            golden["key"].append({"seed": seed, **stored(np.asarray(words))})

    def key(seed: int) -> Any:
        return random.wrap_key_data(jnp.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], jnp.uint32))

    for seed in (0, 42, 2**32 - 1, 2**40 + 5, -1):
        for num in (0, 1, 2, 5):
            keys = np.asarray(random.key_data(random.split(key(seed), num)))
            golden["split"].append({"seed": seed, "num": num, **stored(keys)})
        for data in (0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1):
            words = np.asarray(random.key_data(random.fold_in(key(seed), np.uint32(data))))
            golden["fold_in"].append({"seed": seed, "data": data, **stored(words)})
        for shape in SHAPES:
            case = {"seed": seed, "shape": shape}
            golden["bits"].append({**case, **stored(np.asarray(random.bits(key(seed), shape)))})
            for low, high in ((0.0, 1.0), (-1.0, 1.0), (2.5, 9.1), (-0.001, 100000.0), (1.0, 1.0001)):
                floats = np.asarray(random.uniform(key(seed), shape, minval=low, maxval=high))
                golden["uniform"].append({**case, "minval": low, "maxval": high, **stored(floats.view(np.uint32))})
            for lowest, end in (
                (0, 1),
                (0, 10),
                (-3, 4),
                (0, 60000),
                (0, 65536),
                (5, 65542),
                (0, 2**31 - 1),
                (-(2**31), 2**31 - 1),
            ):
                integers = np.asarray(random.randint(key(seed), shape, lowest, end)).astype(np.int64)
                golden["randint"].append({**case, "minval": lowest, "maxval": end, **stored(integers)})
            for p in (0.0, 0.1, 0.5, 1.0):
                golden["bernoulli"].append(
                    {**case, "p": p, **stored(np.asarray(random.bernoulli(key(seed), p, shape)))}
                )
            if np.prod(shape) <= 64:
                floats = np.asarray(random.normal(key(seed), shape))
                golden["normal"].append({**case, **stored(floats.view(np.uint32))})
        for n in (0, 1, 2, 10, 1625, 1626, 60000):
            order = np.asarray(random.permutation(key(seed), n)).astype(np.int64)
            golden["permutation"].append({"seed": seed, "n": n, **stored(order)})

    for seed in (0, 1):
        draws = np.asarray(random.normal(key(seed), (200_000,)))
        ascending = np.argsort(draws)
        index = np.concatenate([ascending[:32], ascending[-32:]])
        case = {"seed": seed, "size": draws.size, "index": index.tolist()}
        golden["normal_extremes"].append({**case, **stored(draws[index].view(np.uint32))})

    lines = [f'"made_with": {json.dumps({"jax": jax.__version__, "jaxlib": version("jaxlib")})}']
    for name, cases in golden.items():
        lines.append(f'"{name}": [\n' + ",\n".join(json.dumps(case) for case in cases) + "\n]")
    Path(__file__).with_name("random_jax.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
