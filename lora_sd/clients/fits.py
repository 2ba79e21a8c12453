"""Whether the factors of a layer fit its weight, as the clients decide it.

Each function returns None, or what is wrong. Shapes are the file's: lora_up (out, rank[, 1, 1]),
lora_down (rank, in[, k, k]), and `mid` of a Tucker decomposition (rank, rank, k, k).
"""

import math

from lora_sd.clients.outline import Shape


def flattened(shape: Shape) -> tuple[int, int]:
    """Shape of a tensor after flatten(1)."""
    return shape[0], math.prod(shape[1:])


def product_error(up: Shape, down: Shape, weight: Shape, mid: Shape | None = None) -> str | None:
    """For clients that multiply the flattened factors and reshape the product to the weight."""
    if mid is not None:
        return _tucker_error(up, down, weight, mid)
    if len(up) < 2 or len(down) < 2:
        return f"up{up} / down{down} are not matrices"
    (rows, rank), (down_rank, columns) = flattened(up), flattened(down)
    if rank != down_rank:
        return f"up{up} and down{down} do not chain (rank {rank} against {down_rank})"
    if rows * columns != math.prod(weight):
        return (
            f"up{up} @ down{down} has {rows * columns} elements, "
            f"weight {weight} has {math.prod(weight)}"
        )
    if rows != weight[0]:
        return (
            f"up{up} @ down{down} has the weight's element count but not its rows "
            f"({rows} against {weight[0]}): transposed, garbage after reshape"
        )
    return None


def exact_error(up: Shape, down: Shape, weight: Shape) -> str | None:
    """For clients that copy the factors into linear or convolution layers of the exact shape."""
    if len(weight) not in (2, 4):
        return f"no LoRA on a weight of shape {weight}"
    rank = down[0] if down else 0
    ones = (1,) * (len(weight) - 2)
    need_down, need_up = (rank, *weight[1:]), (weight[0], rank, *ones)
    if down != need_down or up != need_up:
        return f"down{down} up{up}, need down{need_down} up{need_up}"
    return None


def _tucker_error(up: Shape, down: Shape, weight: Shape, mid: Shape) -> str | None:
    if len(up) < 2 or len(down) < 2 or len(mid) != 4:
        return f"unsupported tucker shapes up{up} mid{mid} down{down}"
    if up[1] != mid[0] or mid[1] != down[0]:
        return f"tucker ranks do not chain: up{up} mid{mid} down{down}"
    rebuilt = (up[0], down[1], *mid[2:])
    return None if rebuilt == weight else f"rebuilds {rebuilt}, weight is {weight}"
