"""Pytrees: the face over torch's, against plain Python."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functorch_mnist import tree


class Pair(NamedTuple):
    left: object
    right: object


def leaf(shape):
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape) + 1


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
trees = st.recursive(
    shapes.map(leaf),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
    ),
    max_leaves=6,
)


def same(a, b):
    return tree.paths(a) == tree.paths(b) and all(map(torch.equal, tree.leaves(a), tree.leaves(b)))


@given(trees)
def test_ravel_and_unravel_are_inverse(value):
    assert same(tree.unravel(value, tree.ravel(value)), value)


@given(trees)
def test_unflatten_of_the_leaves_is_the_tree(value):
    assert same(tree.unflatten(value, tree.leaves(value)), value)


@given(trees)
def test_there_is_one_path_per_leaf_and_no_two_are_equal(value):
    paths = tree.paths(value)
    assert len(paths) == len(set(paths)) == len(tree.leaves(value))


@given(trees)
def test_dot_and_norm_are_those_of_the_flat_vector(value):
    flat = tree.ravel(value).double()
    torch.testing.assert_close(tree.dot(value, value).double(), flat @ flat)
    torch.testing.assert_close(tree.norm(value).double(), flat.norm(), rtol=1e-6, atol=0)


@given(trees)
def test_map_with_one_tree_keeps_the_structure(value):
    doubled = tree.map(lambda x: 2 * x, value)
    assert tree.paths(doubled) == tree.paths(value)
    assert torch.equal(tree.ravel(doubled), 2 * tree.ravel(value))


def test_dicts_keep_their_insertion_order():
    assert tree.paths({"b": torch.zeros(1), "a": torch.zeros(1)}) == ["b", "a"]


def test_paths_name_keys_fields_and_positions():
    assert tree.paths({"layers": [Pair(torch.zeros(1), torch.zeros(1))]}) == ["layers/0/left", "layers/0/right"]


def test_zeros_like_keeps_dtype_and_memory_format():
    x = torch.ones(2, 3, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    zeros = tree.zeros_like({"x": x})["x"]
    assert zeros.dtype == torch.bfloat16
    assert zeros.stride() == x.stride()
    assert not zeros.any()


def test_dot_and_norm_of_low_precision_are_taken_in_float32():
    x = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    assert tree.dot(x, x).dtype == torch.float32
    assert tree.dot(x, x).item() == 4096
    assert tree.norm(x).item() == 64


def test_the_gradient_of_the_norm_at_zero_is_zero():
    grads = torch.func.grad(tree.norm)({"w": torch.zeros(3), "b": torch.zeros(2)})
    assert torch.equal(tree.ravel(grads), torch.zeros(5))


@pytest.mark.parametrize("other", [{"b": torch.zeros(1)}, [torch.zeros(1)], {"a": torch.zeros(1), "b": torch.zeros(1)}])
def test_trees_of_different_structure_are_refused(other):
    with pytest.raises(ValueError, match="one structure"):
        tree.map(torch.add, {"a": torch.zeros(1)}, other)


@pytest.mark.parametrize("vector", [torch.zeros(3), torch.zeros(1, 2)])
def test_a_vector_of_another_length_is_refused(vector):
    with pytest.raises(ValueError, match="holds 2 numbers"):
        tree.unravel({"w": torch.zeros(2)}, vector)


def test_too_few_values_are_refused():
    with pytest.raises(ValueError, match="2 leaves"):
        tree.unflatten([torch.zeros(1), torch.zeros(1)], [torch.zeros(1)])
