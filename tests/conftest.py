"""Shared settings: the suite runs in a stricter world than the user's."""

import signal

import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("suite")

# A per-example fallback under vmap is slow and silent; here it is an error.
torch._C._functorch._set_vmap_fallback_enabled(False)

# A shell has its background jobs ignore Ctrl-C, and their children inherit that; the tests of Ctrl-C need it heard.
signal.signal(signal.SIGINT, signal.default_int_handler)
