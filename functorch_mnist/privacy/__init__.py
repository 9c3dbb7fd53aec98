"""Differential privacy: clipping rules, sampling, noise, and an account of what was spent.

    mechanism = privacy.Poisson(rate=256 / 60_000, noise_multiplier=1.1)

The files, in the order of reading: `clipping`, `mechanism`, `sampling`, `users`, `release`, `secret`; then the account
and its ledger.
"""

from .account import MAX_STEPS as MAX_STEPS
from .account import Accountant as Accountant
from .account import calibrated as calibrated
from .account import composed as composed
from .account import epsilon as epsilon
from .account import epsilon_curve as epsilon_curve
from .account import max_steps as max_steps
from .account import user_epsilon as user_epsilon
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
from .ledger import Entry as Entry
from .ledger import Ledger as Ledger
from .mechanism import BandMF as BandMF
from .mechanism import Event as Event
from .mechanism import FixedOrder as FixedOrder
from .mechanism import Mechanism as Mechanism
from .mechanism import Poisson as Poisson
from .mechanism import Shuffled as Shuffled
from .mechanism import Unit as Unit
from .one_run import LowerBound as LowerBound
from .one_run import lower_bound as lower_bound
from .release import Sums as Sums
from .release import clipped_sums as clipped_sums
from .release import noisy_mean as noisy_mean
from .release import zero_sums as zero_sums
from .sampling import Draw as Draw
from .sampling import chunk_sizes as chunk_sizes
from .sampling import chunks as chunks
from .sampling import draw as draw
from .sampling import poisson_mask as poisson_mask
from .secret import Secret as Secret
from .step_audit import Audit as Audit
from .step_audit import Release as Release
from .step_audit import audit as audit
from .step_audit import pipeline as pipeline
from .strategies import banded as banded
from .strategies import banded_toeplitz as banded_toeplitz
from .strategies import bisr as bisr
from .strategies import lambda_cgd as lambda_cgd
from .users import Users as Users
