"""The account of all that ran on some data: runs, searches and resumed runs, composed into one ε."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from .account import Accountant, composed
from .mechanism import BandMF, Event, FixedOrder, Mechanism, Poisson, Shuffled

_KINDS: dict[str, Callable[..., Mechanism]] = {kind.__name__: kind for kind in (Poisson, Shuffled, BandMF, FixedOrder)}


@dataclass(frozen=True)
class Entry:
    """One run of one mechanism."""

    mechanism: Mechanism
    clipping: str
    """The rule, as it shows itself."""
    data: str
    """A name of the data set: what has another name counts as well, for it may hold the same examples."""
    steps: int
    """Up to which it has come."""
    start: int = 0
    """From where the present secret makes them."""
    before: tuple[tuple[int, int], ...] = ()
    """Spans of steps, the first and the one after the last, that earlier secrets have made: those that a resume from an
    older checkpoint has made again were seen, too."""

    def events(self) -> list[Event]:
        """What an accountant composes."""
        spans = [*self.before, (self.start, self.steps)]
        return [event for start, end in spans if end > start for event in self.mechanism.events(end, start=start)]

    def resumed(self, kept: int, *, seen: int) -> "Entry":
        """The run as it goes on from step `kept` with a new secret, where steps up to `seen` had been made."""
        return replace(self, steps=kept, before=(*self.before, (self.start, max(kept, seen))), start=kept)


@dataclass(frozen=True)
class Ledger:
    """What has really run, as it is kept with a run's parameters.

    Composition is adaptive: what a later run does may depend on all that earlier ones released, as in a search.
    """

    entries: tuple[Entry, ...] = ()

    def epsilon(self, *, delta: float, accountant: Accountant = "pld") -> float:
        """ε of all entries together, at δ; 0 for none.

        Raises:
            ValueError: a number is out of its range, or entries protect examples and users.
            ImportError: `dp-accounting` is not installed.

        Example:
            >>> one = Entry(Shuffled(10, 2.0), "Flat(max_norm=1.0)", "mnist", steps=10)
            >>> round(Ledger((one, one)).epsilon(delta=1e-5, accountant="gaussian"), 3)
            2.943
        """
        units = {entry.mechanism.unit for entry in self.entries}
        if len(units) > 1:
            raise ValueError(
                "Ledger.epsilon: all entries must protect one kind of neighbour. Found examples and users: tell "
                "their ε one by one."
            )
        events = [event for entry in self.entries for event in entry.events()]
        return composed(events, delta=delta, accountant=accountant)

    @property
    def relation(self) -> str:
        """Which data sets are neighbours, in words: the weakest of the entries."""
        found = {entry.mechanism.relation for entry in self.entries}
        return found.pop() if len(found) == 1 else "one example replaced by one without gradient"

    def __add__(self, other: "Ledger") -> "Ledger":
        """Both. A run that is in both, as a resumed one with its beginning, is counted once for each."""
        return Ledger(self.entries + other.entries)

    def to_json(self) -> list[dict[str, Any]]:
        """The ledger as JSON values; `from_json` is the way back, bit for bit."""
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

        Raises:
            ValueError: it is none.
        """
        try:
            return Ledger(tuple([_entry(value) for value in ([values] if isinstance(values, dict) else list(values))]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Ledger: JSON must be what to_json makes. Found: {error!r:.200}.") from error


def _entry(values: dict[str, Any]) -> Entry:
    fields = dict(values)
    given = dict(fields.pop("mechanism"))
    before = tuple([(first, end) for first, end in fields.pop("before", [])])
    entry = Entry(_KINDS[given.pop("kind")](**given), before=before, **fields)
    counts = (entry.steps, entry.start, *[step for span in before for step in span])
    if [type(entry.clipping), type(entry.data)] != [str, str] or not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError(f"found {values}")
    return entry
