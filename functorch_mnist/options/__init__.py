"""The command line's options: one dataclass per command. Read before torch is imported, so nothing here imports it."""

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
from .analysis import check_analysis as check_analysis
from .saved import check_resumed as check_resumed
from .saved import differences as differences
from .saved import from_json as from_json
from .saved import to_json as to_json
from .train import CHANGEABLE as CHANGEABLE
from .train import PRIVATE as PRIVATE
from .train import RECIPES as RECIPES
from .train import WATCHES as WATCHES
from .train import Train as Train
from .train import check as check
from .train import chosen_of as chosen_of
from .words import INTERRUPTED as INTERRUPTED
from .words import UsageError as UsageError
from .words import listed as listed
