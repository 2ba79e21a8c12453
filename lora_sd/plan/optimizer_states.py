"""How many bytes an optimizer keeps for each parameter, by its name: what `optimizers.by_name`
makes, looked at after two steps."""

import math
from collections.abc import Iterable

import torch
from torch import Size, Tensor

WHOLE = {"adamw": 2, "adamw_8bit": 2, "lion": 1, "prodigy": 4, "adamw_schedulefree": 2, "came": 1}
"""States of the parameter's own shape and dtype; adafactor has none for matrices."""
BLOCK_8BIT, LEAST_8BIT, LEVELS_8BIT = 256, 4096, 256
"""torchao's AdamW8bit: numbers that share a scale; smaller tensors stay as they are; the table of
what the codes mean, which each state has."""


def states_bytes(optimizer: str, parameters: Iterable[Tensor]) -> int:
    """What an optimizer keeps for some parameters, in bytes.

    Raises:
        KeyError: there is no such optimizer.
    """
    return sum(_of_one(optimizer, one.shape, one.dtype) for one in parameters)


def _of_one(optimizer: str, shape: Size, dtype: torch.dtype) -> int:
    numbers, size = math.prod(shape), dtype.itemsize
    if optimizer == "adamw_8bit" and numbers >= LEAST_8BIT and numbers % BLOCK_8BIT == 0:
        return 2 * (numbers + 4 * numbers // BLOCK_8BIT + 4 * LEVELS_8BIT)
    if optimizer == "adafactor":  # always float32
        return 4 * (_rows_and_columns(shape) if len(shape) > 1 else numbers)
    whole = WHOLE[optimizer] * numbers * size
    if optimizer == "came":
        return whole + size * (2 * _rows_and_columns(shape) if len(shape) > 1 else numbers)
    return whole


def _rows_and_columns(shape: Size) -> int:
    """Numbers of the means over a tensor's last axis, and over the one before."""
    return math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1]))
