"""The arms of the question `gram` agree on a few examples. Those of others need the `bench` extra, or are skipped."""

import sys

import pytest

from benchmarks import attribution, attribution_peers, gram
from benchmarks.problems import cnn
from benchmarks.steps import relative_difference

CASES = {
    "gram": lambda: gram.gram_case(cnn(8), 4),
    "tracin": lambda: gram.tracin_case(cnn(14), 8, 4),
    "trak": lambda: gram.trak_case(cnn(36), 24, 12),
    "kronecker": lambda: gram.kronecker_case(cnn(8), 8),
}
PEERS = {
    "gram": ("torchjd", "TorchJD, Gramian engine"),
    "tracin": ("dattri", "dattri, TracIn"),
    "trak": ("dattri", "projected, dattri, TRAK"),
    "kronecker": ("kronfluence", "kronfluence, covariance matrices"),
}

# Others' own imports and calls warn of what is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def outputs(work):
    work.call()
    return work.outputs()


def assert_agree(case, names):
    """These arms start as the first one does, and find what is expected."""
    first = case.arms[0].make()
    reference = outputs(first)
    for arm in case.arms:
        if arm.name in names:
            work = arm.make()
            expected = arm.expected() if arm.expected else reference
            assert work.start == first.start
            assert case.difference(outputs(work), expected) <= arm.tolerance, arm.name


@pytest.mark.parametrize("name", CASES)
def test_eager_arms_of_this_library_agree_with_plain_torch(name):
    case = CASES[name]()
    names = [arm.name for arm in case.arms if arm.name.endswith("eager")]
    assert names
    assert_agree(case, names)


@pytest.mark.parametrize("name", PEERS)
def test_an_arm_of_others_agrees_with_plain_torch(name):
    package, arm = PEERS[name]
    pytest.importorskip(package)
    assert_agree(CASES[name](), [arm])


def test_trak_of_the_last_layer_without_a_projection_equals_dattris():
    pytest.importorskip("dattri")
    problem, names = cnn(36), ["fc2.weight", "fc2.bias"]
    ours = attribution.factored_trak(problem, 24, size=1280, chunk_size=12, compile=False, only="fc2")
    theirs = attribution_peers.dattri_trak(problem, 24, size=None, batch_size=12, only=names)
    assert relative_difference(outputs(theirs), outputs(ours)) < 1e-4


@pytest.mark.parametrize("name", PEERS)
def test_an_arm_without_its_package_is_missing(name, monkeypatch):
    package, wanted = PEERS[name]
    monkeypatch.setitem(sys.modules, package, None)
    for loaded in [module for module in sys.modules if module.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    arm = next(arm for arm in CASES[name]().arms if arm.name == wanted)
    with pytest.raises(ImportError):
        arm.make()
