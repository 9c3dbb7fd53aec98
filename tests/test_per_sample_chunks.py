"""Compiled calls in chunks: one chunk is compiled, and the results are those of the whole batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap
from zoo import EXACT, D, difference, normals, of_model

from functorch_mnist import losses, models, per_sample, tree

SIZE = 3
QUANTITIES = {
    "norms": per_sample.norms,
    "leaf_norms": per_sample.leaf_norms,
    "weighted_sum": lambda f, p, *b, **k: per_sample.weighted_sum(f, p, *b, weights=weights(len(b[0])), **k),
    "clipped_sum": lambda f, p, *b, **k: per_sample.clipped_sum(f, p, *b, max_norm=0.7, **k),
    "clipped_sum by a rule": lambda f, p, *b, **k: per_sample.clipped_sum(f, p, *b, max_norm=of_all, **k),
    "dot": lambda f, p, *b, **k: per_sample.dot(f, p, *b, direction=p, **k),
    "second_moment": per_sample.second_moment,
    "kronecker": per_sample.kronecker,
}


def weights(count):
    return torch.linspace(-1, 2, count, dtype=D)


def of_all(norms):
    """Factors that hang on all norms."""
    return 1 / (norms + norms.sum())


def problem(rows):
    params = {"linear": [normals(3, 5, seed=1), normals(3, seed=2)], "v": normals(5, seed=3)}
    x = normals(rows, 4, 5)
    return of_model(lambda p, x: F.linear((x * p["v"]).sin(), *p["linear"]).mean(0), params, x)


class Graphs:
    """A backend that runs graphs as they are, and counts their nodes, those of inner graphs too."""

    def __init__(self):
        self.nodes = []

    def __call__(self, module, inputs):
        del inputs
        self.nodes.append(sum(len(part.graph.nodes) for part in module.modules() if hasattr(part, "graph")))
        return module.forward


def compiled(fn, backend="eager"):
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, dynamic=False, backend=backend)


OF_EACH_KIND = ("weighted_sum", "clipped_sum by a rule")
"""Sums in one pass, and rows before rows and sums in another: the others go through the same loops."""


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_a_compiled_call_in_chunks_is_the_call_without_and_its_graph_does_not_grow_with_their_number(name):
    graphs = Graphs()
    for rows in (5, 14):  # the last chunk is padded
        case, options = problem(rows), {"mask": torch.arange(rows) % 4 != 1}
        case.batch[0][1] = torch.nan

        def call(params, *batch, case=case, options=options, **chunks):
            return QUANTITIES[name](case.loss_fn, params, *batch, **options, **chunks)

        result = compiled(lambda *args, call=call: call(*args, chunk_size=SIZE), graphs)(case.params, *case.batch)
        assert difference(result, call(case.params, *case.batch)) <= EXACT
    assert len(graphs.nodes) == 2
    assert graphs.nodes[0] == graphs.nodes[1]


def test_a_compiled_call_in_chunks_adds_nothing_of_its_padding_and_counts_what_is_not_finite():
    case = problem(7)
    case.batch[0][-1] *= 100
    call = compiled(lambda *args: per_sample.clipped_sum(case.loss_fn, *args, max_norm=0.7, chunk_size=3))
    expected = per_sample.clipped_sum(case.loss_fn, case.params, *case.batch, max_norm=0.7)
    assert difference(call(case.params, *case.batch), expected) <= EXACT
    case.batch[0][1], case.batch[0][6] = torch.nan, torch.inf
    result = call(case.params, *case.batch)
    kept = [x[[0, 2, 3, 4, 5]] for x in case.batch]
    expected = per_sample.clipped_sum(case.loss_fn, case.params, *kept, max_norm=0.7)
    assert result.nonfinite == 2
    assert difference(result.grads, expected.grads) < EXACT


def test_sums_of_a_compiled_call_in_chunks_have_the_strides_of_the_parameters():
    params = {"w": normals(4, 3, 2, 2).to(memory_format=torch.channels_last), "v": normals(3, 4, 2).permute(2, 0, 1)}
    case = of_model(
        lambda p, x: torch.einsum("chw,kdc->kd", F.conv2d(x, p["w"]), p["v"]).flatten()[:3], params, normals(4, 3, 4, 4)
    )
    for quantity in (per_sample.second_moment, QUANTITIES["weighted_sum"]):
        call = compiled(lambda *args, quantity=quantity: quantity(case.loss_fn, *args, chunk_size=2))
        found = call(params, *case.batch)
        assert difference(found, quantity(case.loss_fn, params, *case.batch)) <= EXACT
        assert [x.stride() for x in tree.leaves(found)] == [w.stride() for w in tree.leaves(params)]


def test_the_gradient_of_a_compiled_weighted_sum_in_chunks_by_its_weights_is_dot():
    case = problem(7)
    direction = tree.map(torch.sin, case.params)

    def product(c):
        chunks = per_sample.weighted_sum(case.loss_fn, case.params, *case.batch, weights=c, chunk_size=SIZE)
        return tree.dot(chunks, direction)

    expected = per_sample.dot(case.loss_fn, case.params, *case.batch, direction=direction)
    c = weights(7).requires_grad_()
    found = torch.autograd.grad(compiled(product, "aot_eager")(c), c)  # through the loop
    assert difference(found[0], expected) <= EXACT


def test_compiled_norms_in_chunks_of_an_ensemble_are_the_norms_of_its_members():
    case = problem(4)
    ensemble = [tree.map(lambda w, s=s: w * s, case.params) for s in (1.0, 0.5)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *ensemble)
    found = compiled(vmap(lambda p: per_sample.norms(case.loss_fn, p, *case.batch, chunk_size=2)))(stacked)
    expected = torch.stack([per_sample.norms(case.loss_fn, p, *case.batch) for p in ensemble])
    assert difference(found, expected) <= EXACT


def test_a_module_compiles_in_chunks_and_what_a_loss_changes_outside_itself_it_changes_once():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(5, 3, dtype=D), 0

        def forward(self, x):
            self.calls += 1
            return self.linear(x)

    params, model = models.from_module(Counting(), example_ndim=1)
    x, y, seen = normals(5, 5), torch.arange(5) % 3, []

    def loss_fn(params, x, y):
        logits = model.apply(params, x)
        seen.append(logits.shape)
        return losses.cross_entropy(logits, y)

    call = compiled(lambda *args: per_sample.norms(loss_fn, *args, chunk_size=2), "aot_eager")
    found = call(params, x, y)
    assert len(seen) == 2  # by the survey, and by the step
    assert difference(found, per_sample.norms(loss_fn, params, x, y)) <= EXACT
    assert difference(model.apply(params, x), x @ params["linear.weight"].T + params["linear.bias"]) <= EXACT
