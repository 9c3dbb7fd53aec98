"""The root of a private run's randomness. Who knows it can take the noise away again."""

import secrets
from typing import NoReturn

import torch
from torch import Tensor

from .. import random

_SECRET = 0x5EC2E7
"""Sets the stream apart from those of a public key of the same seed."""


class Secret:
    """A key that is used in memory alone: it is not shown, and refuses to be written.

    Random numbers are those of `random`: Threefry from 64 bits, good statistics but no cipher, and floats, whose last
    digits are not covered by proofs about real numbers.
    """

    def __init__(self, seed: int | None = None) -> None:
        """A fresh secret from the operating system.

        Args:
            seed: makes one that anybody can make again: for tests and for a reproduction, without a claim of privacy.

        Raises:
            TypeError, ValueError: the seed is not a whole number of 64 bits.
        """
        self._seed = secrets.randbits(64) if seed is None else seed
        self.reproduction = seed is not None
        """Whether it was made from a given seed: then nothing is private."""
        self.key()

    def key(self, device: torch.device | str | None = None) -> Tensor:
        """The root key (2,), on a device."""
        return random.fold_in(random.key(self._seed, device=device), _SECRET)

    def roots(self, device: torch.device | str | None = None) -> Tensor:
        """The roots of a run's streams, (4, 2): draws, noise, examples' keys, and choices among a user's examples."""
        return random.split(self.key(device), 4)

    def __repr__(self) -> str:
        return "Secret(given)" if self.reproduction else "Secret(fresh)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("Secret: it must not be written, copied or sent. Found an attempt to pickle it.")
