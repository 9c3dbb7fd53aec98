"""Differential privacy: clipping rules, sampling, noise, and an account of what was spent.

    mechanism = privacy.Poisson(rate=256 / 60_000, noise_multiplier=1.1)

The files, in the order of reading: `clipping`, `mechanism`, `sampling`, `release`, `secret`; then the account; then
noise that is correlated over steps, `correlation` and `strategies`.
"""

from .account import MOST_STEPS as MOST_STEPS
from .account import Accountant as Accountant
from .account import Ledger as Ledger
from .account import calibrated as calibrated
from .account import curve as curve
from .account import epsilon as epsilon
from .account import most_steps as most_steps
from .audit import Audit as Audit
from .audit import Release as Release
from .audit import audit as audit
from .audit import pipeline as pipeline
from .clipping import Automatic as Automatic
from .clipping import Clipping as Clipping
from .clipping import Flat as Flat
from .clipping import Global as Global
from .clipping import PerGroup as PerGroup
from .clipping import PerLayer as PerLayer
from .clipping import Quantile as Quantile
from .correlation import BlockDiagonal as BlockDiagonal
from .correlation import Strategy as Strategy
from .correlation import Toeplitz as Toeplitz
from .correlation import noise_draws as noise_draws
from .mechanism import Mechanism as Mechanism
from .mechanism import Poisson as Poisson
from .mechanism import Shuffled as Shuffled
from .release import Sums as Sums
from .release import clipped_sums as clipped_sums
from .release import no_sums as no_sums
from .release import released as released
from .sampling import chunk_sizes as chunk_sizes
from .sampling import chunks as chunks
from .sampling import draw as draw
from .sampling import expected_examples as expected_examples
from .sampling import joins as joins
from .secret import Secret as Secret
from .strategies import banded as banded
from .strategies import banded_toeplitz as banded_toeplitz
from .strategies import bisr as bisr
from .strategies import lambda_cgd as lambda_cgd
