"""What a world of processes finds, for `test_distributed.py`: `python worlds.py OUT SHARDS CASE …` is one of them.

The environment says which. Each writes what it has found into a file of its own.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import torch
from forks import Forked

from functorch_mnist import (
    attribution,
    distributed,
    layers,
    models,
    optim,
    per_sample,
    privacy,
    random,
    statistics,
    sweep,
    train,
    tree,
)

EXAMPLES, CLASSES, BATCH = 23, 3, 7
KEY = random.key(0)
X = random.normal(random.key(1), (EXAMPLES, 5))
Y = torch.arange(EXAMPLES) % CLASSES
CLIPPING = privacy.Flat(0.5)


def model():
    return models.mlp((5, 6, CLASSES))


def outputs(params, x, key=None):
    x = x if key is None else layers.dropout(x, key, rate=0.5)
    return model().apply(params, x)


def loss_fn(params, x, y, key=None):
    return torch.nn.functional.cross_entropy(outputs(params, x, key)[None], y[None])


def fitted(world, estimator, optimizer, *, compile=False):
    made = optimizer if isinstance(optimizer, optim.Optimizer) else optimizer(world)
    step = train.make_step(estimator, made, world)
    state = train.init_state(model().init(KEY), made, KEY, estimator)
    seen = []
    state = train.fit(
        train.compiled(step) if compile else step, state, (X, Y), epochs=2, batch_size=BATCH, pad=compile, world=world,
        callbacks=(lambda progress: seen.append({**unpadded(progress.aux), "total": progress.loss}),),
    )  # fmt: skip
    return (made.whole(state) if isinstance(made, distributed.Sharded) else state), seen


def unpadded(aux):
    """Without the rows of the padding, of which each number of processes has its own."""
    if "keep" not in aux:
        return aux
    rows = {name: value[aux["keep"]] for name, value in aux.items() if value.dim()}
    return {**aux, **rows, "keep": aux["keep"].sum()}


def clipped(params, *batch, mask):
    found = per_sample.clipped_sum(loss_fn, params, *batch, max_norm=0.5, mask=mask)
    keep = torch.ones_like(found.norms) if mask is None else mask
    return found.grads, {"loss": (found.losses * keep).sum()}


def training(world):
    """Plain, with dropout, a momentum, and a last batch that is short."""
    return fitted(world, train.gradient(loss_fn), optim.sgd(0.1, momentum=0.9))


def clipped_training(world):
    return fitted(world, train.Estimator(clipped), optim.adam(0.05))


def watched_training(world):
    return fitted(world, train.gradient_with_noise(loss_fn), optim.sgd(0.1))


def valued_training(world):
    """By drawn validation examples, whose smoothed gradient is a part of the state."""
    return fitted(
        world,
        train.gradient_with_data_values(loss_fn, (X[:5], Y[:5]), validation_batch=2, ema_decay=0.5),
        optim.sgd(0.1),
    )


def compiled_training(world):
    return fitted(world, train.gradient(loss_fn), optim.sgd(0.1, momentum=0.9), compile=True)[0]


def private_training(world):
    optimizer = optim.exponential_moving_average(optim.sgd(0.5), decay=0.9)
    mechanism = privacy.Poisson(0.4, 1.0)
    step = train.make_private_step(
        loss_fn, optimizer, clipping=CLIPPING, mechanism=mechanism, examples=EXAMPLES, chunk_sizes=(4, 8), world=world
    )
    state = train.init_private_state(model().init(KEY), optimizer, KEY, CLIPPING)
    secret = privacy.Secret(5 if world.rank == 0 else 6 + world.rank)  # the first process's is that of all
    seen = []
    state = train.fit_private(
        step, state, (X, Y), secret=secret, steps=5,
        callbacks=(lambda progress: seen.append(progress.aux),),
    )  # fmt: skip
    return state, seen


def evaluation(world):
    return tuple(train.evaluate(outputs, cross_entropies, model().init(KEY), X, Y, batch_size=4, world=world))


def cross_entropies(outputs, labels):
    return torch.nn.functional.cross_entropy(outputs, labels, reduction="none")


def folds(world):
    def of(gradients):
        kinds = (statistics.Norms, statistics.Moments, statistics.KroneckerFactors)
        return tuple(kind.of(gradients) for kind in kinds)

    mask = torch.arange(EXAMPLES) != 4
    fold = partial(statistics.fold, loss_fn, model().init(KEY), of=of, world=world)
    return fold(X, Y, mask=mask), fold(X, Y, chunk_size=3), fold(X[:2], Y[:2], chunk_size=1)


def rows(world):
    """What hangs on each example alone."""
    params = model().init(KEY)
    projection = attribution.projection(params, key=KEY, size=4)
    mask = torch.arange(EXAMPLES) != 4
    return (
        attribution.scores(outputs, params, X, labels=Y, loss_fn=lambda o, y: cross_entropies(o[None], y[None])[0],
                           mask=mask, chunk_size=5, world=world),
        attribution.features(loss_fn, params, X, Y, projection=projection, chunk_size=5, world=world),
        per_sample.gram(loss_fn, params, (X, Y), (X[:3], Y[:3]), mask=mask, chunk_size=5, world=world),
        per_sample.gram(loss_fn, params, (X, Y), chunk_size=5, world=world),
        attribution.gradient_cosine(loss_fn, params, (X, Y), (X[:3], Y[:3]), chunk_size=5, world=world),
        attribution.tangent_kernel(outputs, params, (X,), (X[:2],), chunk_size=5, world=world),
        attribution.features(loss_fn, params, X[:1], Y[:1], projection=projection, world=world),
    )  # fmt: skip


def swept(world):
    runs = sweep.grid(lr=[0.1, 0.5, 1e30], seeds=[0, 1])

    def init(hyper, key):
        return train.init_state(model().init(key), optim.sgd(hyper["lr"]), key)

    def step(hyper, state, *rows, mask, divisor):
        return train.make_step(loss_fn, optim.sgd(hyper["lr"]))(state, *rows, mask=mask, divisor=divisor)

    def judge(hyper, state):
        return {"accuracy": (outputs(state.params, X).argmax(-1) == Y).double().mean()}

    program = sweep.Program(init, step, judge)
    vmapped = sweep.VmappedStep(program, (X, Y), batch_size=BATCH, compile=False)
    begun = sweep.init_sweep(program, runs, epochs=3)
    return tuple(sweep.fit(vmapped, runs, begun, width=2, halving=sweep.Halving(2, 0.5), world=world))


def shards(world):
    """Optimizers whose state, and in the second whose parameters as well, live in shards."""
    like = model().init(KEY)
    averaged = optim.exponential_moving_average(optim.adamw(0.05), decay=0.9)
    return (
        fitted(world, train.gradient_with_noise(loss_fn), lambda world: distributed.sharded(averaged, world, like)),
        fitted(world, train.gradient(loss_fn),
               lambda world: distributed.sharded(optim.sgd(0.1, momentum=0.9), world, like, keep_params=False)),
    )  # fmt: skip


def sums(world):
    """Of a tree of all kinds of leaves; numbers that add up exactly, in any order."""
    rank = world.rank
    return distributed.all_reduce(
        world,
        {"a": torch.full((3,), 0.5 + rank), "b": torch.full((2, 1), 2**40 + rank), "c": torch.tensor(rank / 4).double(),
         "d": torch.tensor([1.5 * rank], dtype=torch.bfloat16), "e": torch.zeros(0)},
    )  # fmt: skip


def gathers(world):
    """Rows of types that lie at odd places, one row of all and one of each."""
    one = {"a": torch.tensor([1.5]), "b": torch.tensor([2**40]), "c": torch.tensor([True]),
           "d": torch.tensor([[1, 2, 3]], dtype=torch.int16)}  # fmt: skip
    none = {name: value[:0] for name, value in one.items()}
    sizes = [1] + [0] * (world.size - 1)
    first = distributed.all_gather(world, one if world.rank == 0 else none, sizes) if world.size > 1 else one
    short = distributed.map_rows(world, lambda x: x, torch.arange(7, dtype=torch.int16))
    return first, short, distributed.broadcast(world, ()), distributed.all_gather(world, {})


def half_training(world):
    """Parameters in bfloat16, whose parts are added in float32."""
    params = tree.map(lambda p: p.bfloat16(), model().init(KEY))
    like = params

    def run(optimizer):
        step = train.make_step(loss_of_half, optimizer, world)
        state = train.init_state(params, optimizer, KEY)
        state = train.fit(step, state, (X, Y), epochs=2, batch_size=BATCH, world=world)
        return optimizer.whole(state) if isinstance(optimizer, distributed.Sharded) else state

    return run(optim.sgd(0.1)), run(distributed.sharded(optim.sgd(0.1), world, like))


def loss_of_half(params, x, y, key):
    return loss_fn(params, x.bfloat16(), y)


def unmasked_rows(world):
    """An estimator whose rows do not say which are padding."""

    def norms(params, *batch, mask):
        found = per_sample.clipped_sum(loss_fn, params, *batch, max_norm=0.5, mask=mask)
        return found.grads, {"loss": found.losses.sum() * 0, "norms": found.norms}

    return fitted(world, train.Estimator(norms), optim.sgd(0.1))


FUNCTIONS = (
    training, clipped_training, watched_training, valued_training, private_training, evaluation, folds, rows, swept,
    shards, unmasked_rows, gathers, half_training, compiled_training, sums,
)  # fmt: skip
CASES = {fn.__name__: fn for fn in FUNCTIONS}


def faulty(world):
    """Training in which process 1 does at step 3 what FAULT says; after each step all say where they are."""
    fault = os.environ["FAULT"] if world.rank == 1 else ""
    x, params = X, model().init(KEY)
    if fault == "data":
        x = X + 1
    if fault == "state":
        params = model().init(random.key(1))
    step = train.make_step(loss_fn, optim.sgd(0.1), world)

    def stepped(state, *batch, mask, divisor):
        state, aux = step(state, *batch, mask=mask, divisor=divisor)
        if fault == "drift" and int(state.step) == 3:
            state = state._replace(params={name: p * (1 + 1e-6) for name, p in state.params.items()})
        return state, aux

    def act(progress):
        if progress.step != 3:
            return
        if fault == "bug":
            raise RuntimeError("this process has a bug")
        if fault == "late":
            time.sleep(float(os.environ["SECONDS"]) + 2)
        if fault == "hang":
            time.sleep(1000)
        if fault in ("SIGKILL", "SIGSTOP"):
            os.kill(os.getpid(), getattr(signal, fault))

    state = train.init_state(params, optim.sgd(0.1), KEY)
    return train.fit(stepped, state, (x, Y), epochs=50, batch_size=BATCH, callbacks=(act,), world=world)


def started(arguments, size, *, ranks=None, port=None, start=Forked, **environment):
    """The processes of a world on this machine, each with one thread: `python …` with an environment as torchrun's.

    `arguments` are those of all, or a function of the rank; with `ranks` the others are missing.
    """
    base = dict(os.environ) | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    base |= {"MASTER_PORT": str(port or free_port())} | environment
    of = arguments if callable(arguments) else lambda rank: arguments
    return [start(of(rank), base | {"RANK": str(rank)}) for rank in ranks or range(size)]


def program(arguments, environment):
    """A process that is no fork."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def main(out, shards, *cases):
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with distributed.joined(shards=int(shards) or None, timeout=float(os.environ.get("SECONDS", 100))) as world:
            found = {case: (CASES | {"faulty": faulty})[case](world) for case in cases}
    except (distributed.JoinError, distributed.LostError, distributed.DisagreementError, ValueError) as error:
        end(1, f"{type(error).__name__}: {error}")
    except (distributed.EndedError, KeyboardInterrupt):
        end(1)
    torch.save(tree.leaves(found), f"{out}/{world.rank}.pt")
    end(0)


def end(status, message=""):
    """Ends the process as the commands do: threads of torch's sums may abort where Python ends."""
    if message:
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
