"""A function of tensors as a program: the ops that it ran, to run again at the cost of no more than they.

In eager mode the transforms of `torch.func`, and following parameters through a loss, take microseconds of Python for
each op: most of a step of a small network. Which ops come of it depends on shapes alone. They are recorded while the
function runs, and what only the recording needed is left out.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from .. import native
from ..ops import nested, tensors

_ATEN = torch.ops.aten
_ITSELF = (
    _ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.expand.default, _ATEN.alias.default, _ATEN.detach.default,
)  # fmt: skip
_TURNS = (_ATEN.t.default, _ATEN.transpose.int)
"""Done twice, nothing."""
_ADDS = (_ATEN.add.Tensor, _ATEN.add_.Tensor)
_SHAPED = (
    _ATEN.zeros_like.default, _ATEN.ones_like.default, _ATEN.full_like.default, _ATEN.empty_like.default,
    _ATEN.new_zeros.default, _ATEN.new_ones.default, _ATEN.new_full.default, _ATEN.new_empty.default,
)  # fmt: skip
"""Ops that look only at the shape of what they get."""
_SMALL = 2**12
"""Bytes of numbers that are kept, not recomputed."""
_ZEROS = (_ATEN.zeros.default, _ATEN.new_zeros.default)


_CALL = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)\(")
"""An op, as `torch.fx` writes that it is called."""


class Program:
    """The ops of a function, as a graph and as what runs it."""

    def __init__(self, graph: Graph, held: torch.nn.Module) -> None:
        self.graph, self.held = graph, held
        code = graph.python_code("self")
        names = dict(code.globals)

        def bound(call: re.Match[str]) -> str:
            op = getattr(getattr(getattr(torch.ops, call[1]), call[2]), call[3])
            names["_".join(call.groups())] = getattr(op, "_op", op)  # without the layer of Python around each
            return "_".join(call.groups()) + "("

        exec(_CALL.sub(bound, code.src), names)
        self._forward = names["forward"]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        with torch.no_grad(), torch._C._DisableAutocast():
            out: list[Tensor] = self._forward(self.held, *inputs)
        return out

    @property
    def constants(self) -> list[Tensor]:
        """The tensors that the function held besides its inputs."""
        return list(self.held.buffers())

    def __len__(self) -> int:
        """How many ops."""
        return len([node for node in self.graph.nodes if node.op == "call_function"])


class NotRecorded(Exception):
    """What a function does depends on more than the shapes of its inputs."""


class _Recorder(TorchDispatchMode):
    """Writes down each op that runs."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph, self.constants = Graph(), torch.nn.Module()
        self.nodes: Any = WeakIdKeyDictionary()  # of tensors, which are let go as ever
        self.variable: set[Node] = set()
        """What depends on the inputs."""
        for i, x in enumerate(inputs):
            self.nodes[x] = self.noted(self.graph.placeholder(f"input_{i}"), x)
            self.variable.add(self.nodes[x])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = nested(self.node, args), nested(self.node, kwargs)
        used: list[Node] = []
        nested(lambda x: used.append(x) if isinstance(x, Node) else None, given)
        written = any([self.nodes[x].meta["version"] != x._version for x in tensors(args, kwargs)])
        varies = func not in _SHAPED and (written or any([node in self.variable for node in used]))
        if varies and _asks(func, args):
            raise NotRecorded(f"{func}: what comes next depends on the numbers of the inputs")
        out = func(*args, **kwargs)
        node = self.graph.call_function(func, *given)
        about = {
            "written": written,
            "late": written or func._schema.is_mutable,
            "backward": native.in_backward(),
        }
        node.meta.update(about)
        if isinstance(out, Tensor):
            self.note(out, node, varies)
        elif isinstance(out, (list, tuple)):
            for i, part in enumerate(out):
                if isinstance(part, Tensor):
                    item = self.graph.call_function(operator.getitem, (node, i))
                    item.meta.update(about)
                    self.note(part, item, varies)
        return out

    def note(self, x: Tensor, node: Node, varies: bool) -> None:
        self.nodes[x] = self.noted(node, x)
        if varies:
            self.variable.add(node)
        elif x.untyped_storage().nbytes() <= _SMALL:
            node.meta["number"] = x

    def node(self, x: Any) -> Any:
        """The node of a tensor; one that was not made here is a constant."""
        if not isinstance(x, Tensor):
            return x
        if x not in self.nodes:
            name = f"constant_{len(list(self.constants.buffers()))}"
            self.constants.register_buffer(name, x)
            self.nodes[x] = self.noted(self.graph.get_attr(name), x)
        return self.nodes[x]

    @staticmethod
    def noted(node: Node, x: Tensor) -> Node:
        node.meta["like"], node.meta["version"] = (x.shape, x.stride(), x.dtype), x._version
        node.meta["whole"] = x.is_contiguous()
        return node


def record(fn: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> Program:
    """The ops of a function of tensors, for inputs of these shapes, dtypes and devices.

    Returns:
        A program of the inputs. What follows a backward pass runs as soon as its inputs are there, so that these are
        freed during the pass.

    Raises:
        NotRecorded: the function branches on numbers of its inputs, or writes to a tensor that it holds.
    """
    inputs = [x.detach() for x in inputs]  # one tensor may be given twice
    recorder = _Recorder(inputs)
    with recorder:
        out = fn(*inputs)
        recorder.graph.output([recorder.node(x) for x in out])
    graph = recorder.graph
    _hasten(list(graph.nodes))
    for node in graph.nodes:
        if node.target == _ATEN.view.default and node.args[0].target == _ATEN.view.default:
            whole = node.args[0].args[0]
            if whole.meta["whole"]:
                node.args = (whole, node.args[1])
        source = _unchanged(node)
        if source is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    if not any([_writes(node) for node in graph.nodes]):
        _share(graph)
        _keep_numbers(graph, recorder)
    graph.eliminate_dead_code()
    for node in graph.nodes:  # zeros that are only there to be added to need not be copied
        if node.target is _ATEN.scatter_add.default:
            zeros = node.args[0]
            if zeros.target in _ZEROS and len(zeros.users) == 1:
                node.target = _ATEN.scatter_add_.default
    return Program(graph, recorder.constants)


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _given_out(graph: Graph) -> set[Node]:
    """The nodes whose memory a caller gets, who may write to it: what is returned, and what that is a view of."""
    ahead = [x for node in graph.nodes if node.op == "output" for x in node.all_input_nodes]
    found: set[Node] = set()
    while ahead:
        node = ahead.pop()
        if node in found:
            continue
        found.add(node)
        schema = getattr(node.target, "_schema", None)
        if schema is None or any([result.alias_info is not None for result in schema.returns]):
            ahead += node.all_input_nodes  # a view, or one of several results
    return found


def _share(graph: Graph) -> None:
    """Leaves out a small op that was run before on the same tensors, where nothing is written to.

    A large result would be held until it is wanted again.
    """
    seen: dict[Any, Node] = {}
    given_out = _given_out(graph)
    for node in graph.nodes:
        drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        shape, _, dtype = node.meta.get("like", ((), (), torch.float32))
        if node.op != "call_function" or drawn or node in given_out or math.prod(shape) * dtype.itemsize > _SMALL:
            continue
        key = node.target, str(node.args), str(node.kwargs)  # a node is written as its name
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _keep_numbers(graph: Graph, recorder: _Recorder) -> None:
    """Keeps the few numbers that depend on no input, such as a zero, in place of the ops that make them."""
    given_out = _given_out(graph)
    for node in list(graph.nodes):
        made = node.target in _SHAPED or all(["number" in x.meta for x in node.all_input_nodes])
        drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op != "call_function" or "number" not in node.meta or node in given_out or drawn or not made:
            node.meta.pop("number", None)  # also of what is made of a tensor that the function holds: it may change
            continue
        name = f"number_{node.name}"
        recorder.constants.register_buffer(name, node.meta["number"])
        with graph.inserting_before(node):
            kept = graph.get_attr(name)
        kept.meta.update(node.meta)
        node.replace_all_uses_with(kept)
        graph.erase_node(node)


def _hasten(nodes: list[Node]) -> None:
    """Moves each op after the backward pass to where the last of its inputs is made, if nothing is written between."""
    start = 1 + max([i for i, node in enumerate(nodes) if node.meta.get("backward")], default=len(nodes))
    places = {node: i for i, node in enumerate(nodes)}
    ends = list(nodes)  # the last node that was moved behind each
    for node in nodes[start:]:
        inputs = node.all_input_nodes
        if node.op != "call_function" or not inputs or node.meta["late"]:
            continue
        place = max([places[x] for x in inputs])
        if place < start:
            ends[place].append(node)
            places[node], ends[place] = place, node


def _asks(func: Any, args: Any) -> bool:
    """Whether an op makes a number of Python, or a shape, of the numbers of tensors."""
    if func is _ATEN.index.Tensor:  # by a mask; by integers the shape is theirs
        return any([x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _unchanged(node: Node) -> Node | None:
    """The node whose memory, shape and strides an op returns as they are; none where it does something."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, Node):
        return None
    if node.target in _TURNS and source.target == node.target and source.args[1:] == node.args[1:]:
        turned: Any = source.args[0]
        return turned if isinstance(turned, Node) else None
    if "like" not in node.meta or node.meta["like"] != source.meta.get("like"):
        return None
    if node.target in _ITSELF:
        return source
    if node.target == _ATEN.permute.default:
        order: Any = node.args[1]
        return source if order == sorted(order) else None
    adds = node.target in _ADDS and not node.kwargs and not node.meta["written"]
    return source if adds and _is_zeros(node.args[1]) else None


def _is_zeros(node: Any) -> bool:
    """Whether a tensor is zeros that were repeated: a tap, which is only there to be differentiated by."""
    while isinstance(node, Node) and node.target in _ITSELF:
        node = node.args[0]
    return isinstance(node, Node) and node.target in _ZEROS
