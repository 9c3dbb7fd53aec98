"""The commands: each takes its options and returns an exit status."""

from ..checkpoint import CheckpointError
from ..data import DataError
from .evaluate import evaluate as evaluate
from .faults import DivergedError
from .plan import plan as plan
from .predict import predict as predict
from .train import train as train

FAULTS = (CheckpointError, DataError, DivergedError)
"""What a command raises for a fault that one line can tell, besides `UsageError`."""
