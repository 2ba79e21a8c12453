"""Prodigy (Mishchenko and Defazio 2023) where not all parameters learn at the same rate."""

from collections.abc import Callable
from typing import Any

import torch
from pytorch_optimizer import Prodigy


class RatedProdigy(Prodigy):
    """Prodigy whose groups may have rates of their own.

    Prodigy estimates one distance d for all parameters together and moves each by d * lr, with
    the first group's lr: pytorch_optimizer does not look at the others', and the authors' own
    package refuses to start. Here a group whose lr is a share of the highest one goes that share of
    the step, its weight decay included. The estimate is the paper's still, made from the gradients
    and from where the parameters are; it knows nothing of the shares.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        highest = max(rates)
        slower = [group for group in self.param_groups if group["lr"] != highest]
        before = [[one.clone() for one in group["params"]] for group in slower]
        try:
            for group in self.param_groups:
                group["lr"] = highest
            loss = super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
        for group, old in zip(slower, before, strict=True):
            for parameter, was in zip(group["params"], old, strict=True):
                parameter.copy_(was.lerp_(parameter, group["lr"] / highest))
        return loss
