"""The command line's options: one dataclass per command. Read before torch is imported, so nothing here imports it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from .account import Account as Account
from .account import check_account as check_account
from .analysis import SCORES as SCORES
from .analysis import Analysis as Analysis
from .analysis import Evaluate as Evaluate
from .analysis import Influence as Influence
from .analysis import Mislabelled as Mislabelled
from .analysis import NoiseScale as NoiseScale
from .analysis import Plan as Plan
from .analysis import Predict as Predict
from .analysis import Scores as Scores
from .analysis import Store as Store
from .analysis import check_analysis as check_analysis
from .analysis import check_evaluate as check_evaluate
from .analysis import check_plan as check_plan
from .analysis import check_predict as check_predict
from .reading import TOPICS as TOPICS
from .reading import read as read
from .saved import Search as Search
from .saved import check_resumed as check_resumed
from .saved import command_of as command_of
from .saved import differences as differences
from .saved import from_json as from_json
from .saved import search_differences as search_differences
from .saved import search_from_json as search_from_json
from .saved import to_json as to_json
from .sweep import COMPARED as COMPARED
from .sweep import LOGARITHMIC as LOGARITHMIC
from .sweep import OPTIMIZERS as OPTIMIZERS
from .sweep import OVER as OVER
from .sweep import PRIVATE_OVER as PRIVATE_OVER
from .sweep import SWEPT as SWEPT
from .sweep import Axis as Axis
from .sweep import Compare as Compare
from .sweep import Sweep as Sweep
from .sweep import axes as axes
from .sweep import check_compare as check_compare
from .sweep import check_sweep as check_sweep
from .sweep import combinations as combinations
from .sweep import lrs as lrs
from .sweep import set_to as set_to
from .train import AUGMENTATIONS as AUGMENTATIONS
from .train import CHANGEABLE as CHANGEABLE
from .train import PRIVATE as PRIVATE
from .train import RECIPES as RECIPES
from .train import TUNED as TUNED
from .train import WATCHES as WATCHES
from .train import Train as Train
from .train import augmentation as augmentation
from .train import check as check
from .train import chosen_of as chosen_of
from .train import class_fractions as class_fractions
from .train import given_weights as given_weights
from .train import noise_of as noise_of
from .train import private_steps_per_epoch as private_steps_per_epoch
from .train import tuned_names as tuned_names
from .train import watched as watched
from .words import INTERRUPTED as INTERRUPTED
from .words import UsageError as UsageError
from .words import flag as flag
from .words import listed as listed
from .words import nearest as nearest
from .words import range_of as range_of

COMMANDS: Mapping[str, tuple[type, Callable[[Any], None]]] = MappingProxyType(
    {
        "train": (Train, check),
        "evaluate": (Evaluate, check_evaluate),
        "predict": (Predict, check_predict),
        "scores": (Scores, check_analysis),
        "mislabelled": (Mislabelled, check_analysis),
        "influence": (Influence, check_analysis),
        "store": (Store, check_analysis),
        "noise-scale": (NoiseScale, check_analysis),
        "account": (Account, check_account),
        "sweep": (Sweep, check_sweep),
        "compare": (Compare, check_compare),
        "plan": (Plan, check_plan),
    }
)
"""The options of each command and what refuses wrong ones, in the order of use."""
