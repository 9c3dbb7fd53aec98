"""The questions: one script each."""

from importlib import import_module

from .measure import Question

NAMES = (
    "step", "epoch", "per_sample", "scaling", "models", "modules", "start_up", "memory", "strategies", "normals",
    "watch", "gram", "store", "scores", "private", "noise", "groups", "sweep", "hypergradient", "machines", "processes",
)  # fmt: skip


def load(name: str) -> Question:
    """A question, by the name of its script."""
    question: Question = import_module(f"benchmarks.{name}").QUESTION
    return question
