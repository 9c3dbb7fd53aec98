"""The commands: each takes its options and returns an exit status."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from .. import options
from ..attribution.store import StoreError
from ..checkpoint import CheckpointError
from ..data import DataError
from ..distributed import DisagreementError, EndedError, JoinError, LaunchError, LostError
from .account import account
from .compare import compare
from .evaluate import evaluate
from .faults import DivergedError
from .influence import influence
from .mislabelled import mislabelled
from .noise_scale import noise_scale
from .plan import plan
from .predict import predict
from .processes import launched as launched
from .scores import scores
from .store import store
from .sweep import sweep
from .train import train

COMMANDS: Mapping[type, Callable[[Any], int]] = MappingProxyType(
    {
        options.Train: train,
        options.Evaluate: evaluate,
        options.Predict: predict,
        options.Plan: plan,
        options.Scores: scores,
        options.Mislabelled: mislabelled,
        options.Store: store,
        options.Influence: influence,
        options.NoiseScale: noise_scale,
        options.Account: account,
        options.Sweep: sweep,
        options.Compare: compare,
    }
)
"""By the type of their options."""

FAULTS = (
    CheckpointError, DataError, DivergedError, DisagreementError, JoinError, LaunchError, LostError, StoreError,
)  # fmt: skip
"""What a command raises for a fault that one line can report, besides `UsageError`."""

TOLD = EndedError
"""Another process has reported it."""
