"""Checkpoints: what comes back, what is refused, and what a crash can leave behind."""

import ast
import errno
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from functorch_mnist import checkpoint
from functorch_mnist.checkpoint import CheckpointError, latest, load, read_manifest, save, steps

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
]
CONFIG: dict[str, Any] = {"lr": 0.1, "name": "Käse\ud800", "nested": {"list": [1, None, True, -0.0]}, "big": 10**40}


class Momentum(NamedTuple):
    buffer: Any
    updates: Tensor


def bits(leaf: Tensor) -> bytes:
    return leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_equal(found: Any, expected: Any) -> None:
    """One structure, and every leaf equal in type, shape, dtype and every bit."""
    found_leaves, found_structure = torch.utils._pytree.tree_flatten(found)
    expected_leaves, expected_structure = torch.utils._pytree.tree_flatten(expected)
    assert found_structure == expected_structure
    for a, b in zip(found_leaves, expected_leaves, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert bits(a) == bits(b)


def blank(state: Any) -> Any:
    return torch.utils._pytree.tree_map(torch.zeros_like, state)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def forge(path: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Rewrites a manifest and its checksum, as someone would who knows the format."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    manifest = {key: value for key, value in manifest.items() if key not in drop}
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    if "checksum" in manifest and "checksum" not in changes:
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
        manifest["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


def forge_data(path: Path, data: bytes) -> None:
    """Replaces the state's file and makes the manifest agree with it."""
    (path / "state.safetensors").write_bytes(data)
    forge(path, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


STATE = {"w": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(7)}


def put(folder: Path, step: int, state: Any = STATE, *, keep: int = 3) -> Path:
    return save(folder, state, step=step, config={}, keep=keep)


def w(value: int) -> dict[str, Tensor]:
    return {"w": torch.full((10,), value)}


def back_from_disk(folder: Path, state: Any) -> Any:
    return load(put(folder, 1, state), blank(state)).state


def refused(path: Path, match: str, template: Any = STATE) -> CheckpointError:
    """The error of a checkpoint that does not load."""
    with pytest.raises(CheckpointError, match=match) as caught:
        load(path, template)
    return caught.value


each_file = pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return save(tmp_path, STATE, step=5, config=CONFIG)


# ---- what comes back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    state = [random_bits(shape, dtype, seed) for seed in range(3)]
    assert_equal(back_from_disk(tmp_path, state), state)


def test_payloads_of_nan_and_the_sign_of_zero_come_back(tmp_path: Path) -> None:
    patterns = [0x7F800001, 0x7FC12345, 0xFFFFFFFF - 2**32, 0x80000000 - 2**32, 0x00000001, 0x7F800000]
    state = {"x": torch.tensor(patterns, dtype=torch.int32).view(torch.float32)}
    back = back_from_disk(tmp_path, state)
    assert back["x"].view(torch.int32).tolist() == state["x"].view(torch.int32).tolist()


def test_a_nested_state_comes_back_with_its_structure_step_config_and_path(tmp_path: Path) -> None:
    state = {
        "params": {"conv1.weight": torch.randn(2, 1, 3, 3)},
        "momentum": Momentum([torch.ones(2), ()], torch.tensor(3)),
    }
    path = save(tmp_path, state, step=938, config=CONFIG)
    back = load(path, blank(state))
    assert_equal(back.state, state)
    assert type(back.state["momentum"]) is Momentum
    assert (back.step, back.config, back.path) == (938, CONFIG, path)
    assert path == tmp_path / "step-00000938"
    assert names(path) == ["manifest.json", "state.safetensors"]


@pytest.mark.parametrize("state", [{}, [], (), {"a": {}}, torch.tensor(1.5)], ids=repr)
def test_an_empty_tree_and_a_bare_tensor_come_back(tmp_path: Path, state: Any) -> None:
    assert_equal(back_from_disk(tmp_path, state), state)


@pytest.mark.parametrize("saved", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("wanted", [torch.contiguous_format, torch.channels_last])
def test_leaves_have_the_memory_format_of_the_template(
    tmp_path: Path, saved: torch.memory_format, wanted: torch.memory_format
) -> None:
    state = {"w": torch.randn(4, 3, 5, 5).to(memory_format=saved)}
    template = {"w": torch.zeros(4, 3, 5, 5).to(memory_format=wanted)}
    back = load(put(tmp_path, 1, state), template).state
    assert_equal(back, state)
    assert back["w"].stride() == template["w"].stride()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_leaves_are_on_the_device_of_the_template(tmp_path: Path) -> None:
    path = put(tmp_path, 1, {"w": torch.arange(3.0, device="cuda"), "v": torch.ones(2)})
    back = load(path, {"w": torch.zeros(3), "v": torch.zeros(2, device="cuda")}).state
    assert (back["w"].device.type, back["v"].device.type) == ("cpu", "cuda")
    assert back["w"].tolist() == [0.0, 1.0, 2.0]


def test_leaves_of_any_strides_come_back(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    z = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    state = [base.t(), base[1:, ::2], base[0].expand(3, 6), z.conj(), z.conj().imag, base.requires_grad_()]
    back = load(put(tmp_path, 1, state), state).state
    for found, leaf in zip(back, state, strict=True):
        assert torch.equal(found, leaf)
        assert not found.requires_grad


def test_leaves_that_share_memory_come_back_apart(tmp_path: Path) -> None:
    shared = torch.zeros(4)
    state = {"a": shared, "b": shared, "c": shared[1:], "d": shared.view(2, 2)}
    back = load(put(tmp_path, 1, state), state).state
    back["a"].add_(1)
    assert [leaf.sum().item() for leaf in back.values()] == [4.0, 0.0, 0.0, 0.0]
    assert shared.sum() == 0


def test_the_order_of_the_templates_keys_does_not_matter(tmp_path: Path) -> None:
    path = put(tmp_path, 1, {"a": torch.zeros(1), "b": torch.ones(1)})
    back = load(path, {"b": torch.zeros(1), "a": torch.zeros(1)}).state
    assert list(back) == ["b", "a"]
    assert (back["a"].item(), back["b"].item()) == (0.0, 1.0)


def test_saving_changes_neither_state_nor_config(tmp_path: Path) -> None:
    state = {"w": torch.randn(3, 4).t()}
    before = bits(state["w"])
    config: dict[str, Any] = {"a": [1]}
    save(tmp_path, state, step=0, config=config)
    assert (bits(state["w"]), state["w"].stride(), config) == (before, (1, 4), {"a": [1]})


@given(
    leaves=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4), st.integers(0, 2**31)), max_size=4
    )
)
def test_any_state_comes_back_bit_for_bit(leaves: list[tuple[torch.dtype, list[int], int]]) -> None:
    state = {f"{i}": random_bits(tuple(shape), dtype, seed) for i, (dtype, shape, seed) in enumerate(leaves)}
    with TemporaryDirectory() as folder:
        assert_equal(back_from_disk(Path(folder), state), state)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=10,
)


@given(config=st.dictionaries(st.text(), JSON_VALUES, max_size=3))
def test_any_config_comes_back_as_it_was(config: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        back = read_manifest(save(folder, {}, step=0, config=config))["config"]
    assert repr(back) == repr(config)


def test_the_manifest_describes_the_state_and_its_file(one: Path) -> None:
    manifest = read_manifest(one)
    data = (one / "state.safetensors").read_bytes()
    assert manifest["schema"] == 1
    assert manifest["torch"] == torch.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", manifest["package"])
    assert (manifest["step"], manifest["config"]) == (5, CONFIG)
    assert manifest["file"] == "state.safetensors"
    assert (manifest["size"], manifest["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest["leaves"] == [
        {"name": "w", "shape": [2, 3], "dtype": "float32"},
        {"name": "count", "shape": [], "dtype": "int64"},
    ]


def test_the_state_is_a_plain_safetensors_file(one: Path) -> None:
    found = safetensors.torch.load_file(one / "state.safetensors")
    assert_equal({name: found[name] for name in STATE}, STATE)
    assert found.keys() == STATE.keys()


def test_a_checkpoint_loads_under_another_name_but_not_under_another_step(one: Path) -> None:
    shutil.copytree(one, one.parent / "best")
    assert load(one.parent / "best", STATE).step == 5
    shutil.copytree(one, one.parent / "step-00000006")
    refused(one.parent / "step-00000006", "named after step 6")


@pytest.mark.parametrize("step", [0, 99_999_999, 100_000_000, 2**63 - 1])
def test_steps_of_any_length_are_listed_by_number(tmp_path: Path, step: int) -> None:
    path = put(tmp_path, step, {})
    put(tmp_path, 20_000_000, {})
    assert path in steps(tmp_path)
    assert latest(tmp_path, {})[0].step == max(step, 20_000_000)


def test_steps_lists_only_folders_with_the_exact_name(tmp_path: Path) -> None:
    path = put(tmp_path, 7)
    for name in ("step-7", "step-000000008", "step-0000000x", "xstep-00000009", "step-00000009x", "step-٠٠٠٠٠٠٠٩"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000010").write_text("a file")
    (tmp_path / "step-00000011").symlink_to(path)
    assert steps(tmp_path) == [path]
    assert steps(tmp_path / "absent") == []
    with pytest.raises(CheckpointError, match="must be a folder"):
        steps(tmp_path / "step-00000010")


# ---- wrong arguments


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "integers", {"step": 1.0}),
        (TypeError, "integers", {"step": True}),
        (ValueError, "at least 0", {"step": -1}),
        (ValueError, "at least 0", {"step": 2**63}),
        (ValueError, "keep must be at least 1", {"keep": 0}),
        (TypeError, "Found int at 'a'", {"state": {"a": 1}}),
        (TypeError, "Found NoneType at 'a/0'", {"state": {"a": [None]}}),
        (ValueError, "'a/b' is taken", {"state": {"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}}),
        (ValueError, "__metadata__", {"state": {"__metadata__": torch.ones(1)}}),
        (ValueError, "complex128", {"state": [torch.ones(1, dtype=torch.complex128)]}),
        (ValueError, "sparse", {"state": [torch.eye(2).to_sparse()]}),
        (ValueError, "meta", {"state": [torch.ones(1, device="meta")]}),
        (ValueError, "surrogates", {"state": {"\ud800": torch.ones(1)}}),
        (ValueError, "finite", {"config": {"lr": float("nan")}}),
        (ValueError, "finite", {"config": {"lr": [float("inf")]}}),
        (ValueError, "1048576 bytes", {"config": {"text": "x" * 2**20}}),
        (TypeError, "plain JSON", {"config": {1: 0, "1": 0}}),
        (ValueError, "digits", {"config": {"n": 10**5000}}),
        (TypeError, "plain JSON", {"config": {"path": Path("x")}}),
        (TypeError, "as it was", {"config": {"betas": (0.9, 0.99)}}),
        (TypeError, "as it was", {"config": {1: 2}}),
    ],
)
def test_wrong_arguments_raise_and_write_nothing(
    tmp_path: Path, error: type[Exception], match: str, change: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {"state": STATE, "step": 1, "config": {}} | change
    with pytest.raises(error, match=match):
        save(tmp_path / "runs", **arguments)
    assert names(tmp_path) == []


def test_a_config_nested_without_end_is_a_value_error(tmp_path: Path) -> None:
    config: dict[str, Any] = {}
    config["self"] = config
    with pytest.raises(ValueError, match="Circular"):
        save(tmp_path, {}, step=0, config=config)
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="too deep"):
        save(tmp_path, {}, step=0, config={"deep": deep})


def test_a_wrong_template_is_a_type_or_value_error_and_not_a_fault_of_the_file(one: Path) -> None:
    with pytest.raises(TypeError, match="Found int at 'w'"):
        load(one, {"w": 1})
    with pytest.raises(ValueError, match="meta"):
        latest(one.parent, {"w": torch.ones(1, device="meta")})


# ---- another model


def test_a_template_of_another_model_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    state = {"conv1.weight": torch.zeros(32, 1, 3, 3), "conv1.bias": torch.zeros(32)}
    path = put(tmp_path, 1, state)

    def fault(template: dict[str, Tensor]) -> str:
        return str(refused(path, "another model", template))

    assert (
        "the checkpoint has conv1.weight (32, 1, 3, 3), the template (16, 1, 3, 3). Is it of another model?"
        in fault(state | {"conv1.weight": torch.zeros(16, 1, 3, 3)})
    )
    assert "the checkpoint has conv1.bias float32, the template float64" in fault(
        state | {"conv1.bias": torch.zeros(32, dtype=torch.float64)}
    )
    assert "the checkpoint lacks fc.bias." in fault(state | {"fc.bias": torch.zeros(1)})
    assert "the template lacks conv1.bias." in fault({"conv1.weight": state["conv1.weight"]})
    assert "lacks 2; and 9 more." in fault({f"{i}": torch.zeros(1) for i in range(10)})


def test_a_shape_is_never_broadcast_nor_a_dtype_converted(tmp_path: Path) -> None:
    path = put(tmp_path, 1, [torch.ones(1), torch.ones(2)])
    for template in (
        [torch.ones(()), torch.ones(2)],
        [torch.ones(1), torch.ones(1, 2)],
        [torch.ones(1), torch.ones(2).half()],
    ):
        refused(path, "another model", template)


# ---- damage


@contextmanager
def damaged(file: Path, data: bytes) -> Iterator[None]:
    original = file.read_bytes()
    file.write_bytes(data)
    try:
        yield
    finally:
        file.write_bytes(original)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("victim"), STATE, step=5, config=CONFIG)


@each_file
@hypothesis_settings(max_examples=400)
@given(data=st.data())
def test_a_flipped_bit_is_found_or_changes_nothing(victim: Path, name: str, data: st.DataObject) -> None:
    content = bytearray((victim / name).read_bytes())
    position = data.draw(st.integers(0, 8 * len(content) - 1))
    content[position // 8] ^= 1 << position % 8
    with damaged(victim / name, bytes(content)):
        try:
            back = load(victim, STATE)
        except CheckpointError as error:
            assert name in str(error)
        else:
            assert name == "manifest.json"
            assert_equal(back.state, STATE)
            assert (back.step, repr(back.config)) == (5, repr(CONFIG))


@each_file
def test_a_file_cut_at_any_length_is_found(victim: Path, name: str) -> None:
    content = (victim / name).read_bytes()
    for length in range(len(content)):
        with damaged(victim / name, content[:length]):
            refused(victim, name)


@each_file
def test_bytes_appended_to_a_file_are_found(victim: Path, name: str) -> None:
    with damaged(victim / name, (victim / name).read_bytes() + b"\0"):
        refused(victim, name)


@each_file
def test_a_missing_file_is_named(one: Path, name: str) -> None:
    (one / name).unlink()
    assert isinstance(refused(one, f"{name}.*No such file").__cause__, FileNotFoundError)


def test_the_files_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    first, second = (put(tmp_path, step, w(step)) for step in (1, 2))
    shutil.copy(first / "state.safetensors", second / "state.safetensors")
    refused(second, "must have the SHA-256", w(0))


def test_latest_falls_back_over_damaged_checkpoints_and_says_so(tmp_path: Path) -> None:
    paths = [save(tmp_path, w(step), step=step, config={"at": step}, keep=9) for step in range(5)]
    (paths[4] / "manifest.json").unlink()
    (paths[3] / "state.safetensors").write_bytes(b"")
    (paths[1] / "manifest.json").write_text("{}")
    back, faults = latest(tmp_path, w(0))
    assert_equal(back.state, w(2))
    assert (back.step, back.config) == (2, {"at": 2})
    assert [str(paths[4]) in str(faults[0]), str(paths[3]) in str(faults[1]), len(faults)] == [True, True, 2]


def test_latest_without_a_fault_says_nothing(one: Path) -> None:
    assert latest(one.parent, STATE)[1] == []


def test_latest_with_no_good_checkpoint_lists_every_fault(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        latest(tmp_path / "absent", {})
    paths = [put(tmp_path, step, w(step)) for step in range(2)]
    with pytest.raises(CheckpointError) as caught:
        latest(tmp_path, {"v": torch.tensor(0)})
    assert all(str(path) in str(caught.value) for path in paths)


# ---- hostile files


def leaf(**changes: Any) -> dict[str, Any]:
    return {"name": "w", "shape": [2, 3], "dtype": "float32"} | changes


HOSTILE_FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("reads schema 1. Found 2", {"schema": 2}),
    ("reads schema 1. Found True", {"schema": True}),
    ("reads schema 1. Found 1.0", {"schema": 1.0}),
    ("reads schema 1. Found None", {"schema": None}),
    ("Missing or extra: more", {"more": 1}),
    ("checksum", {"checksum": "0" * 64}),
    ("checksum", {"checksum": None}),
    ("checksum", {"checksum": ["a"]}),
    ("package must be", {"package": 1}),
    ("torch must be", {"torch": None}),
    ("step must be", {"step": -1}),
    ("step must be", {"step": 5.0}),
    ("step must be", {"step": True}),
    ("step must be", {"step": 10**400}),
    ("named after step 5", {"step": 6}),
    ("config must be", {"config": []}),
    ("config must be", {"config": None}),
    ("file must be", {"file": "../step-00000005/state.safetensors"}),
    ("file must be", {"file": "/etc/passwd"}),
    ("file must be", {"file": ["state.safetensors"]}),
    ("sha256 must be", {"sha256": "A" * 64}),
    ("sha256 must be", {"sha256": 1}),
    ("must have the SHA-256 0000", {"sha256": "0" * 64}),
    ("size must be", {"size": "1"}),
    ("size must be", {"size": -1}),
    ("size must be that of the leaves", {"size": 0}),
    ("size must be that of the leaves", {"size": 2**62}),
    ("must have 1000 bytes", {"size": 1000}),
    ("at most 40 bytes", {"size": 40}),
    ("leaves must be", {"leaves": {}}),
    ("leaves must be", {"leaves": [1]}),
    ("leaves must be", {"leaves": [leaf(), leaf()]}),
    ("leaves must be", {"leaves": [leaf(more=1)]}),
    ("leaves must be", {"leaves": [leaf(name=1)]}),
    ("leaves must be", {"leaves": [leaf(name=["w"])]}),
    ("leaves must be", {"leaves": [leaf(shape=3)]}),
    ("leaves must be", {"leaves": [leaf(shape=[2.0, 3])]}),
    ("leaves must be", {"leaves": [leaf(shape=[True])]}),
    ("leaves must be", {"leaves": [leaf(shape=[-1])]}),
    ("leaves must be", {"leaves": [leaf(shape=[2**64])]}),
    ("leaves must be", {"leaves": [leaf(dtype=None)]}),
    ("lacks w", {"leaves": []}),
    ("the checkpoint has w float99, the template float32", {"leaves": [leaf(dtype="float99")]}),
    ("the template lacks '.x1b\\[2J.ud800'", {"leaves": [leaf(), leaf(name="count"), leaf(name="\x1b[2J\ud800")]}),
]


@pytest.mark.parametrize(("match", "changes"), HOSTILE_FIELDS)
def test_a_forged_field_is_refused(one: Path, match: str, changes: dict[str, Any]) -> None:
    forge(one, **changes)
    message = str(refused(one, match))
    assert str(one) in message
    assert message.isprintable()


@pytest.mark.parametrize("key", sorted(checkpoint.Manifest.__required_keys__))
def test_a_missing_field_is_refused(one: Path, key: str) -> None:
    forge(one, drop=(key,))
    with pytest.raises(CheckpointError, match=key):
        read_manifest(one)


@pytest.mark.parametrize("changes", [{"name": "n" * 500_000}, {"shape": [1] * 1000}, {"dtype": "d" * 500_000}])
def test_a_message_about_a_long_name_shape_or_dtype_is_short(one: Path, changes: dict[str, Any]) -> None:
    forge(one, leaves=[leaf(**changes)])
    assert len(str(refused(one, "another model"))) < 2000


@pytest.mark.parametrize(
    ("match", "content"),
    [
        ("strict JSON", b""),
        ("strict JSON", b"\xff\xfe{}"),
        ("strict JSON", '{"schema": 1}'.encode("utf-16")),
        ("strict JSON", '{"schema": 1}'.encode("utf-8-sig")),
        ("strict JSON", b"{'schema': 1}"),
        ("strict JSON", b'{"schema": 1} {}'),
        ("twice", b'{"schema": 1, "schema": 1}'),
        ("NaN is not finite", b'{"schema": NaN}'),
        ("-Infinity is not finite", b'{"schema": 1, "config": {"lr": -Infinity}}'),
        ("1e999 is not finite", b'{"schema": 1, "config": {"lr": 1e999}}'),
        ("digits", b'{"schema": ' + b"9" * 5000 + b"}"),
        ("recursion", b"[" * 500_000),
        ("recursion", b'{"a":' * 150_000),
        ("a JSON object. Found list", b"[]"),
        ("a JSON object. Found int", b"1"),
        ("a JSON object. Found NoneType", b"null"),
        ("schema 1. Found None", b"{}"),
        ("at most 1048576 bytes", b" " * (2**20 + 1)),
        ("strict JSON", pickle.dumps({"schema": 1})),
    ],
)
def test_a_manifest_that_is_no_strict_json_object_is_refused(one: Path, match: str, content: bytes) -> None:
    (one / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        read_manifest(one)


@given(content=st.binary(max_size=60) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_a_manifest_are_a_checkpoint_error(victim: Path, content: bytes) -> None:
    with damaged(victim / "manifest.json", content):
        refused(victim, "manifest.json")


HEADER = (
    b'{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
    b'"count":{"dtype":"I64","shape":[],"data_offsets":[24,32]}}'
)


def tensor_file(header: bytes, data: bytes = bytes(32)) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def changed(old: bytes, new: bytes) -> bytes:
    """A state's file with another header."""
    assert old in HEADER
    return tensor_file(HEADER.replace(old, new))


@pytest.mark.parametrize(
    "content",
    [
        bytes(100),
        b"\xff" * 100,
        tensor_file(HEADER, bytes(30)),
        tensor_file(HEADER, bytes(34)),
        tensor_file(b"[" * 1000),
        tensor_file(b"{}"),
        changed(b"[0,24]", b"[8,32]"),
        changed(b"[24,32]", b"[24,99]"),
        changed(b"[2,3]", b"[3,2]"),
        changed(b"[2,3]", b"[-2,-3]"),
        changed(b"[2,3]", b"[18446744073709551615,3]"),
        changed(b'[2,3],"data_offsets":[0,24]', b'[0,9223372036854775807,9],"data_offsets":[0,0]'),
        changed(b"F32", b"I32"),
        changed(b"F32", b"F99"),
        changed(b'"F32","shape":[2,3]', b'"F8_E8M0","shape":[24]'),
        changed(b'"w"', b'"v"'),
        changed(b'"count"', b'"w"'),
    ],
    ids=range(17),
)
def test_a_forged_state_is_refused(one: Path, content: bytes) -> None:
    forge_data(one, tensor_file(HEADER))
    assert_equal(load(one, STATE).state, blank(STATE))
    forge_data(one, content)
    refused(one, "step-00000005")


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (f"{os.environ['PAYLOAD']}/executed",))


def test_a_pickle_as_state_is_refused_and_not_executed(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAYLOAD", str(one))
    torch.save({"w": Payload()}, one / "zip")
    for content in (pickle.dumps(Payload()), (one / "zip").read_bytes()):
        forge_data(one, content + bytes(max(0, 40 - len(content))))
        assert refused(one, "must be a safetensors file").__cause__ is not None
    assert "executed" not in names(one)


def test_the_package_cannot_unpickle() -> None:
    files = Path(checkpoint.__file__).parent.glob("**/*.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {"json", "torch", "safetensors.torch"} <= set(modules)
    assert not {"pickle", "dill", "cloudpickle", "joblib", "numpy", "shelve", "marshal", "torch.serialization"} & set(
        modules
    )
    called = [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]
    assert not {"torch.load", "torch.save", "eval", "exec", "__import__"} & set(called)


@each_file
def test_a_link_a_pipe_a_socket_and_a_folder_are_refused_without_waiting(
    one: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, elsewhere = one / name, one.parent / "elsewhere"
    monkeypatch.chdir(one)  # a socket's path must be short
    file.rename(elsewhere)
    with socket.socket(socket.AF_UNIX) as listener:
        for make in (lambda: file.symlink_to(elsewhere), lambda: os.mkfifo(file), lambda: listener.bind(name)):
            make()
            refused(one, f"{name}: must be a regular file")
            file.unlink()
    file.mkdir()
    refused(one, f"{name}: must be a regular file")
    file.rmdir()
    elsewhere.rename(file)
    assert load(one, STATE).step == 5


def test_each_file_is_read_once(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = os.open

    def spy(path: Any, *rest: Any, **more: Any) -> int:
        opened.append(Path(path).name)
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", spy)
    load(one, STATE)
    assert opened == ["manifest.json", "state.safetensors"]


# ---- keeping, replacing, cleaning


def test_the_newest_keep_remain(tmp_path: Path) -> None:
    for step in range(1, 7):
        put(tmp_path, step, keep=2)
        assert names(tmp_path) == [f"step-{s:08d}" for s in range(max(1, step - 1), step + 1)]
    put(tmp_path, 7, keep=1)
    assert names(tmp_path) == ["step-00000007"]


def test_the_one_just_written_is_never_removed(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        put(tmp_path, step)
    put(tmp_path, 5, keep=2)
    assert [path.name for path in steps(tmp_path)] == ["step-00000005", "step-00000020", "step-00000030"]


def test_files_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    others = [".tmp-", ".tmp-other", ".tmp-step-00000001-xyz", ".old-other", "step-1", "best"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-step-00000001-0123abcd").symlink_to(tmp_path / "best")
    (tmp_path / "log.txt").write_text("hello")
    put(tmp_path, 1)
    assert names(tmp_path) == sorted([*others, ".tmp-step-00000001-0123abcd", "log.txt", "step-00000001"])


def test_what_a_dead_writer_left_is_removed_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-00000001-0123abcd").mkdir()
    (tmp_path / ".tmp-step-00000001-0123abcd" / "state.safetensors").write_bytes(b"half")
    put(tmp_path, 2)
    assert names(tmp_path) == ["step-00000002"]


def test_a_checkpoint_is_out_of_sight_before_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed before the first file is gone
        put(tmp_path, 2, keep=1)
    assert [path.name for path in steps(tmp_path)] == ["step-00000002"]
    assert len(names(tmp_path)) == 2
    put(tmp_path, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.tensor(1)}, step=3, config={"try": 1})
    save(tmp_path, {"w": torch.tensor(2), "v": torch.ones(1)}, step=3, config={"try": 2})
    back = load(tmp_path / "step-00000003", {"w": torch.tensor(0), "v": torch.ones(1)})
    assert (back.state["w"].item(), back.config) == (2, {"try": 2})
    assert names(tmp_path) == ["step-00000003"]


def test_a_checkpoint_set_aside_by_a_dead_writer_is_found_and_gets_its_name_back(tmp_path: Path) -> None:
    path = put(tmp_path, 3, w(1))
    path.rename(tmp_path / ".old-step-00000003")
    assert latest(tmp_path, w(0))[0].step == 3
    put(tmp_path, 4)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    (tmp_path / ".old-step-00000003").mkdir()
    assert steps(tmp_path) == [path, tmp_path / "step-00000004"]
    put(tmp_path, 4)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    assert_equal(load(path, w(0)).state, w(1))


def test_a_step_that_a_dead_writer_left_under_both_names_is_replaced(tmp_path: Path) -> None:
    path = put(tmp_path, 3, w(2))
    shutil.copytree(path, tmp_path / ".old-step-00000003")
    put(tmp_path, 3, w(3))
    assert names(tmp_path) == ["step-00000003"]
    assert_equal(load(path, w(0)).state, w(3))


def test_folders_are_made_where_missing_and_with_the_users_permissions(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = put(tmp_path / "a" / "b", 1)
    finally:
        os.umask(before)
    assert [oct(p.stat().st_mode & 0o777) for p in (path, path / "manifest.json")] == ["0o755", "0o644"]


def test_writers_into_one_folder_take_turns(tmp_path: Path) -> None:
    def write(writer: int) -> None:
        for step in range(8):
            save(tmp_path, w(step), step=step, config={"writer": writer}, keep=4)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names(tmp_path)) in (4, 5)
    for path in steps(tmp_path):
        back = load(path, w(0))
        assert_equal(back.state, w(back.step))


# ---- failures while writing


class Fault:
    """Raises `error` once: at the `at`-th call of the functions `names` of `os`, before or after its effect."""

    def __init__(self, patch: pytest.MonkeyPatch, error: BaseException, at: int, after: bool, *names: str) -> None:
        self.error, self.at, self.after, self.calls = error, at, after, 0
        for name in names:
            patch.setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls != self.at:
                return real(*args, **kwargs)
            if self.after:
                result = real(*args, **kwargs)
                if isinstance(result, int):
                    os.close(result)
                elif result is not None:
                    result.close()
            raise self.error

        return call


def disk_full() -> BaseException:
    return OSError(errno.ENOSPC, "No space left on device")


each_error = pytest.mark.parametrize("make_error", [disk_full, KeyboardInterrupt])


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@each_error
def test_a_failure_at_any_system_call_loses_nothing(
    tmp_path: Path, make_error: Callable[[], BaseException], after: bool
) -> None:
    for at in range(1, 100):
        folder = tmp_path / f"{at}"
        for step in (1, 2, 3):
            put(folder, step, w(step))
        with pytest.MonkeyPatch.context() as patch:
            error, raised = make_error(), True
            fault = Fault(patch, error, at, after, "fsync", "rename", "mkdir", "open", "scandir")
            try:
                put(folder, 3, w(30), keep=2)  # replaces one and removes one
            except CheckpointError as caught:
                assert str(folder) in str(caught)
                assert "No space left on device" in str(caught)
                assert caught.__cause__ is error
            except KeyboardInterrupt as caught:
                assert caught is error
            else:
                raised = False
        found = [load(path, w(0)) for path in steps(folder)]
        assert [back.step for back in found] in ([1, 2, 3], [2, 3])
        assert [back.state["w"][0].item() for back in found[:-1]] == [back.step for back in found[:-1]]
        assert found[-1].state["w"][0] in ((3, 30) if raised else (30,))
        put(folder, 4, w(4))
        assert names(folder) == ["step-00000002", "step-00000003", "step-00000004"]
        if fault.calls < at:
            break
    assert 15 < at < 99


@each_error
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_no_temporary_folder_is_left_when_writing_fails(
    one: Path, monkeypatch: pytest.MonkeyPatch, make_error: Callable[[], BaseException], at: int
) -> None:
    error = make_error()
    Fault(monkeypatch, error, at, False, "fsync")
    with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
        put(one.parent, 6)
    if isinstance(error, OSError):
        assert caught.type is CheckpointError
        assert "No space left on device" in str(caught.value)
    # The fourth is the parent's, when the new one already has its name.
    assert names(one.parent) == ["step-00000005"] + ["step-00000006"] * (at == 4)
    assert latest(one.parent, STATE)[1] == []


def test_a_limit_of_the_file_size_is_a_checkpoint_error_and_loses_nothing(one: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            put(one.parent, 6, {"w": torch.zeros(2**19)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(one.parent) == ["step-00000005"]
    assert load(one, STATE).step == 5


def test_a_file_where_the_folder_should_be_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    for folder in (tmp_path / "runs", tmp_path / "runs" / "below"):
        with pytest.raises(CheckpointError, match="cannot be saved"):
            put(folder, 1)
    (tmp_path / "step-00000001").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be saved"):
        put(tmp_path, 1)
    assert names(tmp_path) == ["runs", "step-00000001"]
    assert (tmp_path / "step-00000001").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_a_checkpoint_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            put(tmp_path, 1)
    finally:
        tmp_path.chmod(0o700)


# Run as a script: torch is imported once, and each writer is a fork that is killed.
KILL = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from functorch_mnist.checkpoint import latest, save, steps

folder, keep, rng = Path(sys.argv[1]), 2, random.Random(0)

def state(step, attempt):
    return {"a": torch.full((1000,), step), "b": torch.full((30, 30), 10.0 * step + attempt)}

def write(out, step):
    while True:
        step += 1
        for attempt in (1, 2):  # the second replaces the first
            save(folder, state(step, attempt), step=step, config={"attempt": attempt}, keep=keep)
            os.write(out, step.to_bytes(8, "big"))

save(folder, state(0, 1), step=0, config={"attempt": 1}, keep=keep)
last, kills, leftovers = 0, 0, 0
end = time.monotonic() + 5
while time.monotonic() < end:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        write(writer, last)
    os.close(writer)
    time.sleep(rng.uniform(0.002, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(reader, "rb") as pipe:
        acknowledged = pipe.read()[-8:]
    found, faults = latest(folder, state(0, 0))
    attempt = found.config["attempt"]
    assert not faults, faults
    for name, leaf in state(found.step, attempt).items():
        assert torch.equal(found.state[name], leaf), (found, name)
    assert found.step >= (int.from_bytes(acknowledged, "big") if acknowledged else last)
    assert len(steps(folder)) <= keep + 1, os.listdir(folder)
    leftovers += len(os.listdir(folder)) != len(steps(folder))
    last, kills = found.step, kills + 1
    if kills % 2:
        save(folder, found.state, step=last, config=found.config, keep=keep)
        assert sorted(os.listdir(folder)) == [path.name for path in steps(folder)], os.listdir(folder)
        assert len(steps(folder)) <= keep
print(kills, last, leftovers)
"""


def test_a_writer_killed_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILL, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    kills, last, leftovers = map(int, done.stdout.split())
    assert kills > 10
    assert last > kills
    assert leftovers > 0  # some were killed while they wrote
