"""The root of a private run's randomness. Whoever knows it can subtract the noise."""

import secrets
from typing import NoReturn

import torch
from torch import Tensor

from .. import random

_SECRET = 0x5EC2E7
"""Sets the stream apart from those of a public key of the same seed."""


class Secret:
    """A secret key that exists in memory only: its `repr` does not show it, and it cannot be pickled or copied.

    Random numbers are those of `random`: Threefry from 64 bits, of good statistical quality but no cipher, and floats,
    which proofs about real numbers do not cover in their last digits.

    Example:
        >>> Secret()
        Secret(fresh)
    """

    def __init__(self, seed: int | None = None) -> None:
        """A fresh secret from the operating system.

        Args:
            seed: makes a secret that anybody can make again: for tests and reproductions, without a claim of privacy.

        Raises:
            TypeError, ValueError: the seed is not a whole number of 64 bits.
        """
        self._seed = secrets.randbits(64) if seed is None else seed
        self.reproduction = seed is not None
        """Whether it was made from a given seed: then no privacy can be claimed."""
        self.key()

    def key(self, device: torch.device | str | None = None) -> Tensor:
        """The root key.

        Args:
            device: of the result; by default the CPU.

        Returns:
            (2,).
        """
        return random.fold_in(random.key(self._seed, device=device), _SECRET)

    def roots(self, device: torch.device | str | None = None) -> Tensor:
        """The roots of a run's random streams.

        Args:
            device: of the result; by default the CPU.

        Returns:
            (4, 2): the roots of draws, of noise, of examples' keys, and of choices among a user's examples.
        """
        return random.split(self.key(device), 4)

    def __repr__(self) -> str:
        return "Secret(given)" if self.reproduction else "Secret(fresh)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("Secret: it must not be written, copied or sent. Found an attempt to pickle it.")
