"""What tells a model's parts from others: hashes of their weights and configs."""

import hashlib
from typing import Any

import torch
from torch import nn

SAYS_NOTHING = ("transformers_version", "dtype", "torch_dtype", "architectures")
"""Entries of a config that do not change what a part computes."""


def weights_digest(module: nn.Module, stride: bool = False) -> str:
    """Changes with the weights: a hash over all their bytes, or over 64 numbers of each, spread
    over it, which tells models apart but not every change."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.flatten()
        # An odd stride, so that it is not the same column of a matrix each time.
        seen = flat[:: flat.numel() // 64 | 1] if stride else flat
        digest.update(seen.contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def config_text(part: Any) -> str:
    """What a part's config says of how it computes, as text."""
    config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
    said = {k: v for k, v in config.items() if not k.startswith("_") and k not in SAYS_NOTHING}
    return repr(sorted(said.items(), key=lambda item: item[0]))


def joined_digest(*facts: object) -> str:
    """Changes with any of the facts."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()
