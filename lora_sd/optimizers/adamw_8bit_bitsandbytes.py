"""AdamW with states of 8 bits, from bitsandbytes, which is no requirement."""

from typing import Any

import bitsandbytes


class BitsandbytesAdamW8bit(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' AdamW8bit with the arguments that mean something in it."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, min_8bit_size=min_8bit_size, is_paged=is_paged
        )
