"""When our layers and another program's agree, for the tests against PEFT and LyCORIS."""

import torch
from torch import nn

Weights = dict[str, torch.Tensor]


def assert_agree(ours: torch.Tensor, theirs: torch.Tensor, within: float, what: str) -> None:
    """The norm of the difference is within so much of the norm of theirs."""
    error = float((ours - theirs).detach().norm() / theirs.detach().norm())
    assert error <= within, f"{what} differs by {error:.1e}"


def our_weights(layer: nn.Module) -> Weights:
    """What our layer trains, by the names of `LoRAWeights`."""
    found = {"down": layer.lora_down.weight, "up": layer.lora_up.weight}
    if layer.lora_up.bias is not None:
        found["up_bias"] = layer.lora_up.bias
    if layer.magnitude is not None:
        found["magnitude"] = layer.magnitude
    return found


@torch.no_grad()
def randomise(weights: Weights) -> None:
    """Give a layer the values that training gives it, all parts far from their start."""
    for name, weight in weights.items():
        if name == "magnitude":
            weight.mul_(1 + 0.3 * torch.rand_like(weight))
        else:
            nn.init.normal_(weight, std=0.1)


def pull_both(outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Backward from two outputs, with the same random gradient arriving at both."""
    pull = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(pull)


def assert_gradients_agree(
    ours: Weights, theirs: Weights, within: float = 1e-6, where: str = ""
) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        gradient = weight.grad.reshape(ours[name].shape)
        assert_agree(ours[name].grad, gradient, within, f"{where} gradient of {name}")


def whole_gradient(layers: list[Weights]) -> torch.Tensor:
    """The gradients of all layers as one vector."""
    return torch.cat([weight.grad.flatten() for layer in layers for weight in layer.values()])


def train(unet: nn.Module, learning: list[nn.Parameter], steps: int = 50) -> None:
    """AdamW on some weights of a UNet, predicting noise from noise; the same data every time."""
    optimizer = torch.optim.AdamW(learning, lr=1e-3)
    draw = torch.Generator().manual_seed(7)
    for _ in range(steps):
        latents, target = torch.randn(2, 2, 4, 8, 8, generator=draw)
        captions = torch.randn(2, 5, 8, generator=draw)
        timesteps = torch.randint(1000, (2,), generator=draw)
        optimizer.zero_grad()
        nn.functional.mse_loss(unet(latents, timesteps, captions).sample, target).backward()
        optimizer.step()
