"""Shared settings: the suite runs in a stricter world than the user's."""

import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("suite")

# A per-example fallback under vmap is slow and silent; here it is an error.
torch._C._functorch._set_vmap_fallback_enabled(False)
