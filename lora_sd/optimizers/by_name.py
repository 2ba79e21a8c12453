"""The optimizers: what each name stands for, where it comes from, and how it starts.

adamw               torch (Loshchilov and Hutter 2019)
adamw_8bit          bitsandbytes where it is installed, otherwise torchao (Dettmers et al. 2021)
lion                pytorch_optimizer (Chen et al. 2023)
adafactor           transformers (Shazeer and Stern 2018)
prodigy             pytorch_optimizer (Mishchenko and Defazio 2023)
came                pytorch_optimizer (Luo et al. 2023)
adamw_schedulefree  pytorch_optimizer (Defazio et al. 2024)
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_sd.errors import ConfigError

ABOUT_ADAFACTOR = "it would find the learning rate itself, which learning_rate and schedule set"


@dataclass(frozen=True)
class Kind:
    """How an optimizer is made.

    Attributes:
        load: imports its class.
        always: arguments that are not the class's own defaults.
        elsewhere: arguments that are no options here, with the reason.
        source: the package, where the states of one package mean nothing to another.
    """

    load: Callable[[], type[torch.optim.Optimizer]]
    always: Mapping[str, Any] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    source: str = ""


def kind_of(name: str, device: torch.device) -> Kind:
    """What a name stands for on a device.

    Raises:
        ConfigError: there is no such optimizer.
    """
    if name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes"):
        return Kind(_bitsandbytes, source="bitsandbytes")
    if name not in KINDS:
        raise ConfigError(f"'{name}' is no optimizer. There are {', '.join(KINDS)}.")
    kind = KINDS[name]
    if name == "adamw":
        return Kind(kind.load, {"fused": device.type in ("cpu", "cuda")})
    return kind


def _adamw() -> type[torch.optim.Optimizer]:
    return torch.optim.AdamW


def _torchao() -> type[torch.optim.Optimizer]:
    from lora_sd.optimizers.adamw_8bit import TorchaoAdamW8bit

    return TorchaoAdamW8bit


def _bitsandbytes() -> type[torch.optim.Optimizer]:
    from lora_sd.optimizers.adamw_8bit_bitsandbytes import BitsandbytesAdamW8bit

    return BitsandbytesAdamW8bit


def _lion() -> type[torch.optim.Optimizer]:
    from pytorch_optimizer import Lion

    return Lion


def _adafactor() -> type[torch.optim.Optimizer]:
    from transformers.optimization import Adafactor

    return Adafactor


def _prodigy() -> type[torch.optim.Optimizer]:
    from lora_sd.optimizers.prodigy import RatedProdigy

    return RatedProdigy


def _came() -> type[torch.optim.Optimizer]:
    from pytorch_optimizer import CAME

    return CAME


def _adamw_schedulefree() -> type[torch.optim.Optimizer]:
    from pytorch_optimizer import ScheduleFreeAdamW

    return ScheduleFreeAdamW


KINDS = {
    "adamw": Kind(_adamw),
    "adamw_8bit": Kind(_torchao, source="torchao"),
    "lion": Kind(_lion),
    # By its own defaults a step is in proportion to the parameter, and lora_up starts at zero.
    "adafactor": Kind(
        _adafactor,
        {"scale_parameter": False, "relative_step": False},
        {"relative_step": ABOUT_ADAFACTOR, "warmup_init": ABOUT_ADAFACTOR},
    ),
    "prodigy": Kind(_prodigy),
    "came": Kind(_came),
    "adamw_schedulefree": Kind(
        _adamw_schedulefree, elsewhere={"warmup_steps": "set 'optimizer.warmup_steps' instead"}
    ),
}
