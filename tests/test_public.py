"""Per-sample gradients of public architectures, as they are, against a loop of autograd."""

import functools
import importlib.util

import public
import pytest
import torch

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the libraries, of vmap's fallback
    pytest.mark.usefixtures("fallback"),
]

REFUSED = {"transformers/bloom": "GeLUFunction"}
"""Architectures that are refused, and what the message says."""

NEEDS = {"transformers": ["transformers"], "timm": ["timm"], "peft": ["peft", "transformers"]}


@pytest.fixture(scope="module")
def fallback():
    """Lets vmap run what has no batching rule one example at a time, as users have it."""
    torch._C._functorch._set_vmap_fallback_enabled(True)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(False)


def missing(name):
    return [library for library in NEEDS.get(name.split("/")[0], []) if importlib.util.find_spec(library) is None]


@functools.cache
def taken(name):
    """The share of the used parameters' numbers that is factored, and the ops that run one example at a time."""
    case = public.case(name)
    plan = public.planned(*public.pure(case))
    return public.factored_share(plan, public.loop(case)), plan.slow


@pytest.mark.parametrize("name", public.TABLE)
def test_norms_clipped_sums_and_second_moments_equal_a_loop_of_autograd(name):
    if missing(name):
        pytest.skip(f"needs {' and '.join(missing(name))}")
    case = public.case(name)
    if name in REFUSED:
        with pytest.raises((TypeError, ValueError), match=REFUSED[name]):
            public.planned(*public.pure(case))
        return
    rows = public.loop(case)
    assert all(g.isfinite().all() for g in rows.values()) and all(
        any(g[i].any() for g in rows.values()) for i in range(3)
    )
    found = public.errors(*public.pure(case), rows)
    assert {quantity for quantity, value in found.items() if not value <= public.tolerance(name)} == set(), found


def test_few_architectures_are_refused():
    assert len(REFUSED) <= 3 and REFUSED.keys() <= public.TABLE.keys()


whole = pytest.mark.skipif(any(missing(name) for name in public.TABLE), reason="needs the libraries of the extra zoo")


@whole
def test_nine_of_ten_architectures_have_99_percent_of_their_used_parameters_factored():
    shares = {name: taken(name)[0] for name in public.TABLE.keys() - REFUSED.keys()}
    short = {name: share for name, share in shares.items() if share < 0.99}
    assert len(short) <= len(public.TABLE) / 10, short


@whole
def test_nine_of_ten_architectures_have_no_op_that_runs_one_example_at_a_time():
    slow = {name: taken(name)[1] for name in public.TABLE.keys() - REFUSED.keys()}
    slow = {name: ops for name, ops in slow.items() if ops}
    assert len(slow) <= len(public.TABLE) / 10, slow
