"""Makes `per_sample_jax.json` beside it: what JAX finds of per-sample gradients. Run as
`python tests/golden/make_per_sample_jax.py`.

Each case holds its parameters and batch, and what `jax.vmap(jax.grad(loss))` gives of them on CPU in float64: the norms
of the gradients, all their inner products, and their clipped sum. Numbers are stored in decimal, to the last bit.
"""

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "mlp": {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (2, 4), "2.bias": (2,)},
    "cnn": {
        "conv1.weight": (2, 1, 3, 3),
        "conv1.bias": (2,),
        "conv2.weight": (2, 2, 2, 2),
        "conv2.bias": (2,),
        "fc.weight": (3, 8),
        "fc.bias": (3,),
    },
}
EXAMPLE = {"mlp": (3,), "cnn": (1, 6, 6)}
CLASSES = {"mlp": 2, "cnn": 3}
BATCH = 5


def inputs(name: str, seed: int) -> dict[str, Any]:
    """Parameters and a batch, from the stream of numbers that NumPy has promised never to change."""
    stream = np.random.RandomState(seed)
    params = {key: stream.normal(size=s) / math.sqrt(math.prod(s[1:])) for key, s in SHAPES[name].items()}
    x = stream.normal(size=(BATCH, *EXAMPLE[name]))
    return {"params": params, "x": x, "labels": stream.randint(CLASSES[name], size=BATCH)}


def case(name: str, seed: int) -> dict[str, Any]:
    """What is stored of one model and seed. The clipping norm is the median, so that it clips some and spares some."""
    import jax
    import jax.numpy as jnp

    def mlp(params: Any, x: Any) -> Any:
        hidden = jnp.tanh(params["0.weight"] @ x + params["0.bias"])
        return params["2.weight"] @ hidden + params["2.bias"]

    def conv2d(x: Any, weight: Any, bias: Any, padding: int) -> Any:
        y = jax.lax.conv_general_dilated(x[None], weight, window_strides=(1, 1), padding=[(padding, padding)] * 2)
        return y[0] + bias[:, None, None]

    def cnn(params: Any, x: Any) -> Any:
        x = jax.nn.relu(conv2d(x, params["conv1.weight"], params["conv1.bias"], padding=0))  # (2, 4, 4)
        x = conv2d(x, params["conv2.weight"], params["conv2.bias"], padding=1)  # (2, 5, 5)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2), (1, 2, 2), "VALID")  # (2, 2, 2)
        return params["fc.weight"] @ x.reshape(-1) + params["fc.bias"]

    def loss(params: Any, x: Any, label: Any) -> Any:
        return -jax.nn.log_softmax({"mlp": mlp, "cnn": cnn}[name](params, x))[label]

    given = inputs(name, seed)
    with jax.enable_x64(True):
        params = {key: jnp.asarray(value) for key, value in given["params"].items()}
        sample_grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params, given["x"], given["labels"])
        flat = jnp.concatenate([leaf.reshape(BATCH, -1) for leaf in sample_grads.values()], axis=1)
        norms = jnp.linalg.norm(flat, axis=1)
        max_norm = jnp.median(norms)
        factors = jnp.minimum(1, max_norm / norms)
        clipped = {key: jnp.tensordot(factors, leaf, 1) for key, leaf in sample_grads.items()}
        given |= {"norms": norms, "gram": flat @ flat.T, "max_norm": max_norm, "clipped_sum": clipped}
        return {"model": name, "seed": seed, **jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), given)}


def main() -> None:
    made_with = json.dumps({name: version(name) for name in ("jax", "jaxlib")})
    cases = ",\n".join(json.dumps(case(name, 0)) for name in SHAPES)
    text = f'{{\n"made_with": {made_with},\n"cases": [\n{cases}\n]\n}}\n'
    Path(__file__).with_name("per_sample_jax.json").write_text(text)


if __name__ == "__main__":
    main()
