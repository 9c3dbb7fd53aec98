"""Differential privacy (DP-SGD): clipping rules, sampling, noise, accountants (PLD, RDP, GDP), ledger and audits.

    mechanism = privacy.Poisson(rate=256 / 60_000, noise_multiplier=1.1)

The files, in the order of reading: `clipping`, `mechanism`, `sampling`, `users`, `release`, `secret`; then the account
and its ledger.
"""

from .account import MAX_STEPS, Accountant, calibrated, composed, epsilon, epsilon_curve, max_steps, user_epsilon
from .clipping import Automatic, Clipping, Flat, Global, PerGroup, PerLayer, Quantile
from .correlation import BlockDiagonal, Strategy, Toeplitz, noise_draws
from .ledger import Entry, Ledger
from .mechanism import BandMF, Event, FixedOrder, Mechanism, Poisson, Shuffled, Unit
from .one_run import LowerBound, lower_bound
from .release import Sums, clipped_sums, noisy_mean, zero_sums
from .sampling import Draw, chunk_sizes, chunks, draw, poisson_mask
from .secret import Secret
from .step_audit import Audit, Release, audit, pipeline
from .strategies import banded, banded_toeplitz, bisr, lambda_cgd
from .users import Users

__all__ = [
    "MAX_STEPS",
    "Accountant",
    "Audit",
    "Automatic",
    "BandMF",
    "BlockDiagonal",
    "Clipping",
    "Draw",
    "Entry",
    "Event",
    "FixedOrder",
    "Flat",
    "Global",
    "Ledger",
    "LowerBound",
    "Mechanism",
    "PerGroup",
    "PerLayer",
    "Poisson",
    "Quantile",
    "Release",
    "Secret",
    "Shuffled",
    "Strategy",
    "Sums",
    "Toeplitz",
    "Unit",
    "Users",
    "audit",
    "banded",
    "banded_toeplitz",
    "bisr",
    "calibrated",
    "chunk_sizes",
    "chunks",
    "clipped_sums",
    "composed",
    "draw",
    "epsilon",
    "epsilon_curve",
    "lambda_cgd",
    "lower_bound",
    "max_steps",
    "noise_draws",
    "noisy_mean",
    "pipeline",
    "poisson_mask",
    "user_epsilon",
    "zero_sums",
]


def __dir__() -> list[str]:
    return __all__
