"""What leans on torch's private functions: each does what its docstring says, in the torch that is installed."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from zoo import normals

from functorch_mnist import compiler, native

X = normals(3, 2)


def test_a_batch_is_taken_out_and_handed_back():
    seen = []

    def fn(x):
        at = native.mapped()
        batch = native.taken_out(x, at)
        seen.append(batch)
        assert not native.is_of_an_example(batch)
        back = native.handed_back(batch * 2, at)
        assert native.is_of_an_example(back)
        assert back.shape == x.shape
        return back

    assert torch.equal(vmap(fn)(X), 2 * X)
    assert torch.equal(seen[0], X)
    assert torch.equal(vmap(fn, 1)(X), 2 * X.T)
    assert torch.equal(seen[1], X.T)


def test_what_all_examples_share_is_taken_out_repeated_without_a_copy():
    shared = normals(4)

    def fn(x):
        batch = native.taken_out(shared, native.mapped())
        assert batch.shape == (3, 4)
        assert batch.data_ptr() == shared.data_ptr()
        assert batch.stride(0) == 0
        return native.handed_back(batch, native.mapped()).sum() + x.sum()

    torch.testing.assert_close(vmap(fn)(X), X.sum(1) + shared.sum())


def test_gradients_flow_out_and_back():
    w = normals(2, 2, seed=1)

    def fn(w, x):
        at = native.mapped()
        return native.handed_back(native.taken_out(x @ w, at).sin(), at).sum()

    found = grad(lambda w: vmap(fn, (None, 0))(w, X).sum())(w)
    leaf = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad((X @ leaf).sin().sum(), leaf)
    torch.testing.assert_close(found, expected)


def test_the_inner_of_two_vmaps_is_taken_out():
    def fn(x):
        at = native.mapped()
        return native.handed_back(native.taken_out(x, at) - native.taken_out(x, at).mean(), at)

    rows = normals(2, 3, 4)
    expected = rows - rows.mean((1, 2), keepdim=True)
    torch.testing.assert_close(vmap(vmap(fn))(rows), expected)


def test_mapped_says_the_level_and_size_of_vmap_where_it_is_innermost_and_else_zeros():
    found = {}

    def noting(name):
        def fn(x):
            found[name] = (native.mapped(), native.level())
            return x.sum()

        return fn

    noting("none")(X)
    vmap(noting("vmap"))(X)
    grad(noting("grad"))(X)
    vmap(grad(noting("grad inside")))(X)
    grad(lambda x: vmap(noting("grad outside"))(x).sum())(X)
    vmap(vmap(noting("two")))(X)
    assert found == {
        "none": ((0, 0), 0), "vmap": ((1, 3), 1), "grad": ((0, 0), 1), "grad inside": ((0, 0), 2),
        "grad outside": ((2, 3), 2), "two": ((2, 2), 2),
    }  # fmt: skip


def test_only_what_the_innermost_vmap_maps_over_is_of_an_example():
    shared = torch.ones(2)

    def fn(x):
        assert native.is_of_an_example(x)
        assert native.is_of_an_example(x + shared)
        assert not native.is_of_an_example(shared)
        assert not native.is_of_an_example(shared * 2)
        return x.sum()

    vmap(fn)(X)
    assert not native.is_of_an_example(X)


def test_numbers_are_those_below_all_transforms():
    rows = normals(2, 3, 4)
    found = []

    def fn(x):
        found.append(native.numbers(x))
        return x.sum()

    vmap(vmap(fn))(rows)
    grad(fn)(X)
    fn(X.clone().requires_grad_())
    fn(nn.Parameter(X))
    assert torch.equal(found[0], rows)
    assert all(torch.equal(x, X) and not x.requires_grad for x in found[1:])
    assert native.numbers(torch.ones(2, device="meta")) is None


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.sin else out


class Standing(native.PerExample):
    """A mode in which one tensor stands for other numbers."""

    def __init__(self, tensor, numbers):
        super().__init__()
        self.tensor, self.numbers = tensor, numbers

    def real(self, value):
        return self.numbers if value is self.tensor else value

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_outside_there_are_no_transforms_no_modes_and_gradients_again():
    def fn(x):
        with Doubling(), torch.no_grad():
            inside = native.level(), len(_get_current_function_mode_stack())
            with native.outside():
                assert native.level() == 0
                assert native.mapped() == (0, 0)
                assert _get_current_function_mode_stack() == []
                leaf = torch.ones(2, requires_grad=True)
                (found,) = torch.autograd.grad(leaf.sin().sum(), leaf)
                assert torch.equal(found, torch.ones(2).cos())
                with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                    assert native.saves_by_hooks()
            assert (native.level(), len(_get_current_function_mode_stack())) == inside
        return x.sin().sum()

    vmap(fn)(X)
    vmap(grad(fn))(X)
    grad(fn)(X)


def test_outside_is_left_by_an_error_with_all_as_it_was():
    def fn(x):
        with Doubling():
            with pytest.raises(ArithmeticError), native.outside():
                raise ArithmeticError
            assert len(_get_current_function_mode_stack()) == 1
            assert native.mapped() == (1, 3)
            return torch.sin(x).sum()

    torch.testing.assert_close(vmap(fn)(X), 2 * X.sin().sum(1))


def test_saving_by_hooks_is_seen():
    assert not native.saves_by_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert native.saves_by_hooks()
    assert not native.saves_by_hooks()


def test_inside_tells_whether_a_mode_of_a_kind_is_on():
    assert not native.inside(Doubling)
    with Doubling(), Standing(X, X):
        assert native.inside(Doubling)
        assert native.inside(native.PerExample)
    assert not native.inside(native.PerExample)


def test_one_of_a_parameter_is_what_stands_behind_it_or_that_of_the_first_example():
    stand_in = torch.full((2,), torch.nan)
    assert native.one_of(X, (0, 0)) is X
    with Standing(stand_in, X[1]):
        assert native.one_of(stand_in, (0, 0)) is not stand_in
        assert torch.equal(native.one_of(stand_in, (0, 0)), X[1])
        assert native.one_of(X, (0, 0)) is X

    def fn(x):
        assert torch.equal(native.one_of(x, native.mapped()), X[0])
        return x.sum()

    vmap(fn)(X)


class Old(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        return g


class New(Old):
    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def test_old_functions_are_told_from_new_ones_and_found_behind_what_they_made():
    assert native.is_old(Old)
    assert not native.is_old(New)
    leaf = torch.ones(2, requires_grad=True)
    assert native.old_function_behind([leaf.sin(), F.relu(Old.apply(leaf) * 2).sum()]) is Old
    assert native.old_function_behind([leaf.sin(), New.apply(leaf).sum(), torch.ones(2)]) is None
    assert "Found Old of" in native.refusal(Old) and "setup_context" in native.refusal(Old)


def test_a_constant_to_the_compiler_is_run_while_it_traces():
    calls = []

    @compiler.constant_to_the_compiler
    def count():
        calls.append(1)
        return 3

    fused = torch.compile(lambda x: x * count(), fullgraph=True, backend="eager")
    assert fused(torch.ones(2)).tolist() == [3, 3]
    assert fused(torch.ones(2)).tolist() == [3, 3]
    assert len(calls) == 1


def test_both_ways_trace_as_one_graph():
    def fn(x):
        at = native.mapped()
        return native.handed_back(native.taken_out(x, at).sin(), at).sum()

    fused = torch.compile(lambda x: vmap(fn)(x), fullgraph=True, backend="eager")
    torch.testing.assert_close(fused(X), X.sin().sum(1))


def test_the_compiler_is_not_imported_with_it():
    code = "import sys, functorch_mnist.native; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
