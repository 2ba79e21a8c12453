"""Every random number of a run, as a function of the seed and of where it is used.

Nothing draws from the global generator but dropout, which is seeded anew for every pass. So a run
which is interrupted and resumed, or spread over several processes, draws the same numbers: all its
random state is the step it is at.
"""

import hashlib

import torch


def seed_at(seed: int, *place: str | int) -> int:
    """A seed of its own for one place, such as ('noise', step, slot)."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *place: str | int) -> torch.Generator:
    """A CPU generator of its own for one place."""
    return torch.Generator("cpu").manual_seed(seed_at(seed, *place))
