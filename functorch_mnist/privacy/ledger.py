"""The privacy ledger: all that ran on some data, runs, searches and resumed runs, composed into one ε."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from .account import Accountant, composed
from .mechanism import BandMF, Event, FixedOrder, Mechanism, Poisson, Shuffled

_KINDS: dict[str, Callable[..., Mechanism]] = {kind.__name__: kind for kind in (Poisson, Shuffled, BandMF, FixedOrder)}


@dataclass(frozen=True)
class Entry:
    """One run of one mechanism in a ledger."""

    mechanism: Mechanism
    """How it samples and how much noise it adds."""
    clipping: str
    """The clipping rule's `repr`."""
    data: str
    """A name of the data set. Entries of different names are composed as well, for they may share examples."""
    steps: int
    """The number of steps made so far, at least 0."""
    start: int = 0
    """The first step of the present secret."""
    before: tuple[tuple[int, int], ...] = ()
    """Spans of steps, the first and the one after the last, that earlier secrets have made: those that a resume from an
    older checkpoint has made again were seen, too."""

    def events(self) -> list[Event]:
        """The releases of all spans of the run, for an accountant."""
        spans = [*self.before, (self.start, self.steps)]
        return [event for start, end in spans if end > start for event in self.mechanism.events(end, start=start)]

    def resumed(self, kept: int, *, seen: int) -> "Entry":
        """The entry of the run when it is resumed with a new secret.

        Args:
            kept: the step of the checkpoint it resumes from.
            seen: the steps that had been made before, those after the checkpoint included: they were released, too.
        """
        return replace(self, steps=kept, before=(*self.before, (self.start, max(kept, seen))), start=kept)


@dataclass(frozen=True)
class Ledger:
    """The record of all runs on some data, kept with a run's parameters, and their ε in total.

    Composition is adaptive: what a later run does may depend on all that earlier ones released, as in a hyperparameter
    search.
    """

    entries: tuple[Entry, ...] = ()
    """The runs, in any order."""

    def __post_init__(self) -> None:
        """Refuses what is no tuple of entries.

        Raises:
            TypeError: it is none.
        """
        rule = "Ledger: entries must be a tuple of privacy.Entry."
        if isinstance(self.entries, Entry):
            raise TypeError(f"{rule} Found one Entry. Pass (entry,)?")
        kinds = [type(entry).__name__ for entry in _members(self.entries) if not isinstance(entry, Entry)]
        if kinds:
            raise TypeError(f"{rule} Found {kinds[0]}. Pass (Entry(mechanism, repr(clipping), data, steps=…),)?")

    def epsilon(self, *, delta: float, accountant: Accountant = "pld") -> float:
        """ε of the composition of all entries, at δ.

        Args:
            delta: δ in (0, 1).
            accountant: as in `privacy.epsilon`.

        Returns:
            ε, at least 0; 0 for no entry.

        Raises:
            ValueError: a number is out of its range, or some entries protect examples and others users.

        Example:
            >>> one = Entry(Shuffled(10, 2.0), "Flat(max_norm=1.0)", "mnist", steps=10)
            >>> round(Ledger((one, one)).epsilon(delta=1e-5, accountant="gaussian"), 3)
            2.943
        """
        units = {entry.mechanism.unit for entry in self.entries}
        if len(units) > 1:
            raise ValueError(
                "Ledger.epsilon: all entries must protect one kind of neighbour. Found examples and users: "
                "report their ε separately."
            )
        events = [event for entry in self.entries for event in entry.events()]
        return composed(events, delta=delta, accountant=accountant)

    @property
    def relation(self) -> str:
        """Which data sets are neighbours, in words: the weakest of the entries."""
        relations = {entry.mechanism.relation for entry in self.entries}
        return relations.pop() if len(relations) == 1 else "one example replaced by one without gradient"

    def __add__(self, other: "Ledger") -> "Ledger":
        """The entries of both. A run that is in both, such as a resumed one and its beginning, is counted twice."""
        return Ledger(self.entries + other.entries)

    def to_json(self) -> list[dict[str, Any]]:
        """The ledger as JSON values; `from_json` restores it, bit for bit."""
        return [
            {
                **asdict(entry),
                "mechanism": {"kind": type(entry.mechanism).__name__, **asdict(entry.mechanism)},
                "before": [list(span) for span in entry.before],
            }
            for entry in self.entries
        ]

    @staticmethod
    def from_json(values: Any) -> "Ledger":
        """The ledger that `to_json` wrote.

        Args:
            values: as `to_json` gives them, or one entry of them.

        Raises:
            ValueError: it is no ledger.
        """
        try:
            return Ledger(tuple([_entry(value) for value in ([values] if isinstance(values, dict) else list(values))]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Ledger: JSON must be what to_json makes. Found: {error!r:.200}.") from error


def _members(entries: object) -> Iterable[object]:
    """The entries; what is no tuple or list is its own member."""
    return entries if isinstance(entries, (tuple, list)) else (entries,)


def _entry(values: dict[str, Any]) -> Entry:
    fields = dict(values)
    given = dict(fields.pop("mechanism"))
    before = tuple([(first, end) for first, end in fields.pop("before", [])])
    entry = Entry(_KINDS[given.pop("kind")](**given), before=before, **fields)
    counts = (entry.steps, entry.start, *[step for span in before for step in span])
    if [type(entry.clipping), type(entry.data)] != [str, str] or not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError(f"found {values}")
    return entry
