"""The sides of a step: the limit, our trainer, PEFT, LyCORIS; all over the same frozen weights.

A LoRA step cannot be cheaper than the limit: the frozen UNet's forward pass and its backward pass
with respect to activations. PEFT comes in as in diffusers' example script, through the UNet's
`add_adapter`, and LyCORIS as its LoCon module is by default. All train the same layers at the same
rank, in float32, with AdamW; without weight decay, so that a weight that moves has had a gradient.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from lora_sd import inject
from lora_sd.layer_choice import LayerPlan, choose_layers
from lora_sd.layer_names import layer_shapes
from lora_sd.learner import Learner
from lora_sd.memory.compilation import compile_blocks
from tools.bench.cases import Case, Inputs

LEARNING_RATE = 1e-4


@dataclass
class Side:
    """One way to make a step.

    Attributes:
        learning: the parameters that it trains; none for the limit.
        learn: changes them by their gradients, and drops these.
        arithmetic: the context of the forward pass.
        start: copies of what it trains, as `remember` found it.
    """

    name: str
    unet: UNet2DConditionModel
    inputs: Inputs
    learning: Sequence[nn.Parameter]
    learn: Callable[[], object]
    arithmetic: Callable[[], AbstractContextManager[object]]
    start: list[Tensor] = field(default_factory=list)

    def remember(self) -> None:
        """Keep what the trained weights are now."""
        self.start = [weight.detach().clone() for weight in self.learning]

    def pull(self) -> Tensor:
        """Forward and backward pass; the loss."""
        given = self.inputs
        with self.arithmetic():
            predicted = self.unet(
                given.latents,
                given.timesteps,
                given.captions,
                added_cond_kwargs=given.further or None,
                return_dict=False,
            )[0]
            loss = F.mse_loss(predicted.float(), given.target.float())
        loss.backward()
        return loss.detach()


def limit(unet: UNet2DConditionModel, inputs: Inputs, case: Case) -> Side:
    """The frozen UNet, forward, and backward to its input; without autocast, without optimizer."""
    latents = inputs.latents.clone().requires_grad_()
    own = Inputs(**{**vars(inputs), "latents": latents})

    def forget() -> None:
        latents.grad = None

    return Side("limit", unet, own, [], forget, lambda: torch.enable_grad())


def ours(unet: UNet2DConditionModel, inputs: Inputs, case: Case) -> Side:
    """lora_sd: its layers, and its learner with the settings' defaults."""
    accelerator = Accelerator(
        cpu=case.device == "cpu", mixed_precision="no" if case.dtype == "float32" else "bf16"
    )
    layers = inject.attach({"unet": unet}, plans_of(unet, case))
    learner = Learner(
        layers,
        accelerator,
        steps=1000,
        optimizer="adamw",
        options=[],
        groups={
            "learning_rate": LEARNING_RATE,
            "conv_learning_rate": None,
            "text_encoder_rates": {},
            "block_learning_rates": [],
            "lora_plus_ratio": 1.0,
            "weight_decay": 0.0,
        },
        schedule={"name": "constant", "warmup_steps": 0},
        max_grad_norm=1.0,
        max_weight_norm=None,
        ema_decay=0.0,
    )
    return Side("ours", unet, inputs, learner.parameters, learner.step, accelerator.autocast)


def peft(unet: UNet2DConditionModel, inputs: Inputs, case: Case) -> Side:
    """PEFT through diffusers, as its example script for LoRA sets it up."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    names = [plan.name.removeprefix("unet.") for plan in plans_of(unet, case)]
    unet.add_adapter(LoraConfig(r=case.rank, lora_alpha=case.rank, target_modules=names))
    cast_training_params(unet, torch.float32)
    return _plain_trainer("PEFT", unet, inputs, case, _learning(unet))


def lycoris(unet: UNet2DConditionModel, inputs: Inputs, case: Case) -> Side:
    """LyCORIS's LoCon with its own defaults, which rebuild the weight in each pass."""
    from lycoris.modules.locon import LoConModule

    learning: list[nn.Parameter] = []
    for plan in plans_of(unet, case):
        layer = unet.get_submodule(plan.name.removeprefix("unet."))
        module = LoConModule("", layer, 1.0, plan.rank, plan.alpha).to(case.device)
        module.apply_to()
        learning += _learning(module)
    return _plain_trainer("LyCORIS", unet, inputs, case, learning)


SIDES = {"limit": limit, "ours": ours, "PEFT": peft, "LyCORIS": lycoris}
PEERS = ("PEFT", "LyCORIS")


def make_side(name: str, unet: UNet2DConditionModel, inputs: Inputs, case: Case) -> Side:
    """One of `SIDES`, over a UNet that it may change."""
    side = SIDES[name](unet, inputs, case)
    if case.compile:
        compile_blocks(side.unet, backend=case.compile)
    return side


def twin(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy with layers of its own over the very same weights."""
    shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in unet.parameters()}
    return copy.deepcopy(unet, shared)


def plans_of(unet: UNet2DConditionModel, case: Case) -> list[LayerPlan]:
    """The layers of the case's preset, linear layers and convolutions at its rank."""
    return choose_layers(
        layer_shapes({"unet": unet}),
        case.preset,
        rank=case.rank,
        alpha=None,
        conv_rank=case.rank,
        conv_alpha=None,
    )


def _learning(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _plain_trainer(
    name: str,
    unet: UNet2DConditionModel,
    inputs: Inputs,
    case: Case,
    learning: Sequence[nn.Parameter],
) -> Side:
    """PyTorch's AdamW as the example script makes it, and autocast where weights are in 16 bits."""
    optimizer = torch.optim.AdamW(learning, lr=LEARNING_RATE, weight_decay=0.0)

    def learn() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def arithmetic() -> AbstractContextManager[object]:
        return torch.autocast(case.device, torch.bfloat16, enabled=case.dtype != "float32")

    return Side(name, unet, inputs, learning, learn, arithmetic)
