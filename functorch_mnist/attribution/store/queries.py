"""Queries of a store: inner products of its examples' gradients with those of test examples, block by block.

With φ_i the features of a stored and q_j those of a test example, at checkpoints c of weight w_c:

    dot        Σ_c w_c ⟨φ_i, q_j⟩: gradient dot, and with learning rates as weights TracIn
    cosine     the same over both norms
    inverse    Σ_c w_c ⟨φ_i, (M + λ)⁻¹ q_j⟩, with M = (1 / N) Σ_i φ_i φ_iᵀ: an influence function

Above zero, training on the stored example lowers the test example's loss.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ...distributed import digest
from ...per_sample import factored
from ...tree import Tree
from ..influence import group_sums
from ..projections import Projection
from ..solve import rounding, solve
from . import manifest, numbers
from .manifest import BEGUN, NAME, Block, Part, Plan, StoreError

By: TypeAlias = Literal["dot", "cosine", "inverse"]
"""The score of a stored and a test example: gradient dot, gradient cosine, or influence function."""

_ROWS, _QUERIES = 4096, 2048
"""Stored examples and test examples that are compared at a time: 32 MB of inner products."""
_WIDEST = 16384
"""Features of which the second moment is inverted at most: 2 GiB in float64."""


class Queries(NamedTuple):
    """Test examples, projected as the stored ones are."""

    rows: tuple[Tensor, ...]
    """The features at each checkpoint, (M, F) float32."""


class Top(NamedTuple):
    """The top-k stored examples for each test example."""

    scores: Tensor
    """(M, k) float32, in descending order; ascending with `lowest`."""
    indices: Tensor
    """(M, k) int64: their indices in the store."""


@dataclass(frozen=True)
class Store:
    """A gradient store, open for reading, from `build`, `append` or `load`.

    Files are read when they are needed, and their digests checked at the first time.
    """

    folder: Path
    """Where it is."""
    plan: Plan
    """What it holds: checkpoints, blocks of features, examples."""
    parts: tuple[Part, ...]
    """Its files."""
    projection: Projection
    """The projection of its gradients."""
    _checked: set[str] = field(default_factory=set, repr=False)

    def __len__(self) -> int:
        return self.plan.count

    @property
    def blocks(self) -> dict[str, Block]:
        """The position of each parameter's features, by its path."""
        return {block.path: block for block in self.plan.blocks}

    @property
    def error(self) -> float:
        """A bound on the rounding error of an example's features, relative to their norm."""
        return self.plan.error

    @property
    def bytes(self) -> int:
        """The size of all features on disk, in bytes."""
        return sum(part.file.size for part in self.parts)

    def features(
        self, loss_fn: Callable[..., Tensor], checkpoints: Sequence[Tree], *examples: Tensor, chunk_size: int = 512
    ) -> Queries:
        """Test examples, projected as the stored ones are, to be compared with them.

        Args:
            loss_fn: `loss_fn(params, *example) -> ()`, pure.
            checkpoints: those of the store.
            examples: tensors (M, …).
            chunk_size: examples computed at a time, at least 1.

        Returns:
            The features at each checkpoint, (M, F).

        Raises:
            StoreError: the checkpoints are not those of the store.
        """
        self.check_checkpoints(checkpoints)
        with torch.no_grad():
            rows = [
                torch.cat(
                    [
                        numbers.features(
                            factored(loss_fn, params, *part).wide(), self.projection, self.plan.blocks
                        ).float()
                        for part in zip(*[x.split(chunk_size) for x in examples], strict=True)
                    ]
                )
                for params in checkpoints
            ]
        return Queries(tuple(rows))

    def rows(self, checkpoint: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """The stored features of some examples.

        Args:
            checkpoint: its index, from 0.
            start, stop: the range of examples; by default all.

        Returns:
            (n, F) float32.

        Raises:
            StoreError: a file is damaged.
        """
        stop = len(self) if stop is None else stop
        found = []
        for part in self.parts:
            first, last = max(start, part.first), min(stop, part.first + part.count)
            if part.checkpoint == checkpoint and first < last:
                found.append(numbers.restored(self._file(part)[first - part.first : last - part.first]))
        return torch.cat(found) if found else torch.zeros(0, self.plan.width)

    def top(
        self,
        queries: Queries,
        count: int,
        *,
        by: By = "dot",
        lowest: bool = False,
        damping: float | None = None,
        paths: Sequence[str] | None = None,
    ) -> Top:
        """The top-k stored examples for each test example, exactly.

        Args:
            queries: of M test examples, from `features`.
            count: k, from 1 to the number of stored examples.
            by: the score: "dot" (TracIn), "cosine" or "inverse" (influence function).
            lowest: the smallest scores instead, in ascending order.
            damping: λ of `by="inverse"`, above 0; by default a tenth of the moment's mean eigenvalue.
            paths: of the parameters that count; by default all.

        Returns:
            Scores and indices, (M, k) each. Above zero, training on the stored example lowers the test example's loss.

        Raises:
            StoreError: a file is damaged, or the moment would be too large.
            ValueError: an argument does not fit.

        Cost: N M F multiplications, and memory of a block.
        """
        if not isinstance(count, int) or not 1 <= count <= len(self):
            raise ValueError(f"store.top: count must be from 1 to {len(self)}. Found {count}.")
        tests = self._tests(queries, by, damping, paths)
        sign = -1.0 if lowest else 1.0
        found: list[Top | None] = [None] * len(tests)
        for start, rows in self._blocks():
            mine = _prepared(rows, tests[0], self.plan) if tests else None
            for i, test in enumerate(tests):
                assert mine is not None
                scores = _scores(mine, test, self.plan).T
                values, at = (scores if sign > 0 else scores.neg_()).topk(min(count, scores.shape[1]), 1)
                found[i] = _merged(found[i], Top(values, at + start), count)
        kept = [top for top in found if top is not None]
        if not kept:
            return Top(torch.zeros(0, count), torch.zeros(0, count, dtype=torch.int64))
        return Top(sign * torch.cat([top.scores for top in kept]), torch.cat([top.indices for top in kept]))

    def scores(
        self,
        queries: Queries,
        *,
        by: By = "dot",
        groups: Tensor | None = None,
        damping: float | None = None,
        paths: Sequence[str] | None = None,
    ) -> Tensor:
        """The scores of all stored examples, or sums over groups of them, for each test example.

        Args:
            queries, by, damping, paths: as in `top`.
            groups: (N,) int64, the group of each stored example, such as its class, user or document, to sum over.

        Returns:
            (N, M), or (K, M) for groups 0 to K - 1, float32.

        Raises:
            ValueError: groups are not int64 (N,), or are combined with cosines, which do not add up.
            StoreError: a file is damaged.
        """
        if groups is not None and (groups.shape != (len(self),) or groups.dtype != torch.int64 or by == "cosine"):
            raise ValueError(
                f"store.scores: groups must be int64 ({len(self)},), and not by cosine, which does not add up. "
                f"Found {groups.dtype} {tuple(groups.shape)} by {by}."
            )
        tests = self._tests(queries, by, damping, paths)
        kept = []
        for start, rows in self._blocks():
            mine = _prepared(rows, tests[0], self.plan)
            part = torch.cat([_scores(mine, test, self.plan) for test in tests], 1)
            if groups is None:
                kept.append(part)
            else:
                one = group_sums(part, groups[start : start + len(part)], count=int(groups.max()) + 1)
                kept = [one if not kept else kept[0] + one]
        return torch.cat(kept)

    def moment(self, checkpoint: int = 0, *, paths: Sequence[str] | None = None) -> Tensor:
        """The second moment `(1 / N) Σ_i φ_i φ_iᵀ` of the features, with pairs multiplied out.

        Args:
            checkpoint: its index, from 0.
            paths: of the parameters that count; by default all.

        Returns:
            (F', F') float64.

        Raises:
            StoreError: F' is above 16,384, or a file is damaged.
        """
        chosen = self._chosen(paths)
        width = numbers.dense_width(chosen)
        if width > _WIDEST:
            raise StoreError(
                f"{self.folder}: the inverse needs at most {_WIDEST} features, pairs multiplied out. Found {width}. "
                f"Ask for fewer paths, or build with a smaller projection."
            )
        total = torch.zeros(width, width, dtype=torch.float64)
        for start in range(0, len(self), _ROWS):
            rows = numbers.dense(self.rows(checkpoint, start, start + _ROWS), chosen)
            total += (rows.T @ rows).double()
        return total / len(self)

    def verify(self) -> None:
        """Reads all files and checks their digests.

        Raises:
            StoreError: one is damaged.
        """
        for part in self.parts:
            self._file(part)

    def check_checkpoints(self, checkpoints: Sequence[Tree]) -> None:
        """Checks that checkpoints are those of the store.

        Args:
            checkpoints: the parameters at each.

        Raises:
            StoreError: they are not.
        """
        found = [digest(params) for params in checkpoints]
        if found != [checkpoint.params for checkpoint in self.plan.checkpoints]:
            raise StoreError(
                f"{self.folder} is of {len(self.plan.checkpoints)} checkpoints, and these are needed. "
                f"Found {len(found)}, or other parameters."
            )

    def _blocks(self) -> Iterator[tuple[int, list[Tensor]]]:
        """The number of the first of some examples, and their features at each checkpoint."""
        for start in range(0, len(self), _ROWS):
            yield start, [self.rows(c, start, start + _ROWS) for c in range(len(self.plan.checkpoints))]

    def _chosen(self, paths: Sequence[str] | None) -> list[Block]:
        unknown = [] if paths is None else [path for path in paths if path not in self.blocks]
        if unknown or (paths is not None and not paths):
            raise ValueError(f"store: paths must be of its parameters, {list(self.blocks)}. Found {paths}.")
        return [block for block in self.plan.blocks if paths is None or block.path in paths]

    def _tests(self, queries: Queries, by: By, damping: float | None, paths: Sequence[str] | None) -> list["_Test"]:
        """The test examples, ready to be compared, some at a time."""
        chosen = self._chosen(paths)
        shapes = [tuple(rows.shape[1:]) for rows in queries.rows]
        if shapes != [(self.plan.width,)] * len(self.plan.checkpoints) or by not in ("dot", "cosine", "inverse"):
            raise ValueError(
                f"store: queries must be of {len(self.plan.checkpoints)} checkpoints with {self.plan.width} numbers, "
                f"compared by dot, cosine or inverse. Found {shapes} by {by!r}. Use the store's own features?"
            )
        if damping is not None and (by != "inverse" or not damping > 0):
            raise ValueError(f"store: a damping above 0 belongs to the inverse. Found {damping} by {by}.")
        tests = list(queries.rows)
        if by == "inverse":
            tests = [
                _inverted(self.moment(c, paths=paths), numbers.dense(rows, chosen), damping)
                for c, rows in enumerate(tests)
            ]
        count = len(tests[0])
        return [_Test(by, chosen, [rows[at : at + _QUERIES] for rows in tests]) for at in range(0, count, _QUERIES)]

    def _file(self, part: Part) -> np.ndarray[Any, Any]:
        """The rows of a part, in the file's memory; its contents are checked at the first time."""
        new = part.file.name not in self._checked
        path = manifest.check(self.folder, part.file, contents=new)
        try:
            rows: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} must be a file of NumPy's. Found: {error}.") from error
        if rows.dtype != self.plan.row or rows.shape != (part.count,):
            raise StoreError(f"{path} must hold {part.count} rows of the manifest's kind. Found {rows.shape}.")
        self._checked.add(part.file.name)
        return rows


def load(folder: Path) -> Store:
    """Opens a store.

    Args:
        folder: of the store.

    Returns:
        The store, for queries.

    Raises:
        StoreError: there is none, it is not finished, or it is damaged: a file is missing or has another size. What
            the files of features hold is checked when they are read.
    """
    if not (folder / NAME).exists() and (folder / BEGUN).exists():
        raise StoreError(f"{folder} holds a store that is not finished. Resume its build.")
    plan, parts = manifest.decode(folder / NAME)
    for part in parts:
        manifest.check(folder, part.file, contents=False)
    covered = {c: sum(part.count for part in parts if part.checkpoint == c) for c in range(len(plan.checkpoints))}
    if set(covered.values()) != {plan.count}:
        raise StoreError(f"{folder / NAME} must name parts of all {plan.count} examples. Found {covered}.")
    return Store(folder, plan, parts, read_maps(folder, plan))


def read_maps(folder: Path, plan: Plan) -> Projection:
    """The projection of a store.

    Raises:
        StoreError: a file is damaged.
    """
    arrays = []
    for file in plan.maps:
        try:
            arrays.append(torch.from_numpy(np.load(manifest.check(folder, file, contents=True), allow_pickle=False)))
        except ValueError as error:
            raise StoreError(f"{folder / file.name} must be a file of NumPy's. Found: {error}.") from error
    return Projection(list(zip(arrays[::2], arrays[1::2], strict=True)))


@dataclass(frozen=True)
class _Test:
    """Some test examples."""

    by: By
    blocks: list[Block]
    rows: list[Tensor]
    """Of each checkpoint; of the inverse, solved and with pairs multiplied out."""


@dataclass(frozen=True)
class _Mine:
    """Some stored examples."""

    rows: list[Tensor]
    lengths: Tensor | None
    """Of cosines, (N,)."""


def _prepared(rows: list[Tensor], test: _Test, plan: Plan) -> _Mine:
    if test.by == "inverse":
        return _Mine([numbers.dense(part, test.blocks) for part in rows], None)
    return _Mine(rows, _lengths(rows, test.blocks, plan) if test.by == "cosine" else None)


def _lengths(rows: list[Tensor], blocks: list[Block], plan: Plan) -> Tensor:
    parts = zip(plan.checkpoints, rows, strict=True)
    return torch.stack([one.weight * numbers.square_norms(part, blocks) for one, part in parts]).sum(0).sqrt()


def _scores(mine: _Mine, test: _Test, plan: Plan) -> Tensor:
    """(N, M) float32."""
    total: Tensor | None = None
    for one, rows, tests in zip(plan.checkpoints, mine.rows, test.rows, strict=True):
        part = rows @ tests.T if test.by == "inverse" else numbers.inner(rows, tests, test.blocks)
        if one.weight != 1.0:
            part = part.mul_(one.weight)
        total = part if total is None else total.add_(part)
    assert total is not None
    if mine.lengths is None:
        return total
    lengths = mine.lengths[:, None] * _lengths(test.rows, test.blocks, plan)
    return torch.where(lengths > 0, total.double() / lengths, 0.0).float()


def _inverted(moment: Tensor, tests: Tensor, damping: float | None) -> Tensor:
    """`(M + λ)⁻¹ q`, (M, F')."""
    size = max(1, len(moment))
    used = 0.1 * float(moment.trace()) / size if damping is None else damping
    if used == 0:
        return torch.zeros_like(tests)
    return solve("store", moment, tests.T, damping=used, least=rounding(tests)).T.float()


def _merged(before: Top | None, more: Top, count: int) -> Top:
    """The largest of both."""
    if before is None:
        return more
    values = torch.cat([before.scores, more.scores], 1)
    indices = torch.cat([before.indices, more.indices], 1)
    best, at = values.topk(min(count, values.shape[1]), 1)
    return Top(best, indices.gather(1, at))
