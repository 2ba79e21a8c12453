"""Drawing with an adapter, merged and live, beside the base alone; and changing a merged scale.

Whole pictures are drawn with the embedded base through `generate` (text encoder, UNet with
guidance, VAE), and single passes are made of a UNet of Stable Diffusion 1.5's shapes at 256 px,
batch 1, without gradient. The adapter has rank 16 and random weights, in the layers of the preset
attention-conv. Sides take turns, and a turn's preparation (merging, attaching) is not timed.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_sd import inject
from lora_sd.adapter import Adapter
from lora_sd.base_loading import load_base_model
from lora_sd.generate import PictureSettings, generate
from lora_sd.layer_choice import planned_adapter
from lora_sd.layers import LayerOptions
from lora_sd.memory.heap import keep_freed_memory
from lora_sd.merge import MergedWeights
from tools.bench.cases import EMBEDDED, Case, build_unet, make_inputs
from tools.bench.errors import BenchError
from tools.bench.rounds import Spread, now, ratios, take_turns
from tools.bench.sides import plans_of
from tools.bench.table import Row, Target

PROMPTS = ("fox, ink drawing, yellow background", "owl, ink drawing, orange background")
MERGED = Target(at_least=0.98, at_most=1.02)
LIVE = Target(at_most=1.10)
SCALE_CHANGES = 2


def random_adapter(unet: torch.nn.Module, case: Case) -> Adapter:
    """An adapter of the case's layers and rank, as if trained."""
    torch.manual_seed(2)
    layers = planned_adapter(plans_of(unet, case), LayerOptions()).layers

    def drawn(shape: torch.Size) -> Tensor:
        return 0.02 * torch.randn(shape)

    return Adapter(
        {
            name: replace(one, down=drawn(one.down.shape), up=drawn(one.up.shape))
            for name, one in layers.items()
        }
    )


def measure_pictures(rounds: int, steps: int = 8) -> list[Row]:
    """Rows on pictures of the embedded base."""
    base = load_base_model(EMBEDDED, torch.device("cpu"), torch.float32)
    case = Case("", EMBEDDED, "attention-conv", 1, 16)
    settings = [PictureSettings(prompt, steps=steps) for prompt in PROMPTS]
    what = f"{len(PROMPTS)} pictures, embedded base, {steps} steps"

    def draw() -> Tensor:
        pictures = generate(base, settings)
        return torch.cat(
            [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures]
        )

    return _compare(what, base.components, random_adapter(base.unet, case), draw, rounds)


def measure_passes(rounds: int, case: Case | None = None) -> list[Row]:
    """Rows on single passes of a UNet, that of Stable Diffusion 1.5 at 256 px unless told."""
    case = case or Case("SD1.5 256 px batch 1", "sd15", "attention-conv", 1, 32)
    unet = build_unet(case).eval()
    inputs = make_inputs(case, unet.config)

    def draw() -> Tensor:
        with torch.no_grad():
            return unet(inputs.latents, inputs.timesteps, inputs.captions, return_dict=False)[0]

    adapter = random_adapter(unet, case)
    return _compare(f"UNet pass, {case.name}", {"unet": unet}, adapter, draw, rounds)


def _compare(
    what: str, parts: dict[str, Any], adapter: Adapter, draw: Callable[[], Tensor], rounds: int
) -> list[Row]:
    """Base, merged and live in turn, and the scale of the merged one."""
    keep_freed_memory()  # or how much of it the system clears would be most of the spread
    merged = MergedWeights(parts)
    drawn: dict[str, Tensor] = {}

    def timed(side: str) -> float:
        began = now("cpu")
        drawn[side] = draw()
        return now("cpu") - began

    def with_merged() -> tuple[float, float]:
        merged.set([(adapter, 1.0)])
        seconds = timed("merged")
        began = now("cpu")
        for number in range(SCALE_CHANGES):
            merged.set([(adapter, 0.5 + number / SCALE_CHANGES)])
        changes = (now("cpu") - began) / SCALE_CHANGES
        merged.set([])
        return seconds, changes

    def with_live() -> tuple[float, float]:
        inject.attach_adapter(parts, adapter)
        seconds = timed("live")
        inject.detach(parts)
        return seconds, 0.0

    turns = take_turns(
        {"base": lambda: (timed("base"), 0.0), "merged": with_merged, "live": with_live}, rounds
    )
    merged.clear()
    _check_drawn(what, drawn)
    seconds = {side: [one for one, _ in values] for side, values in turns.items()}
    changes = [one for _, one in turns["merged"]]
    return [
        Row("generation", f"{what}: base", Spread.of(seconds["base"]), "s"),
        Row("generation", f"{what}: merged / base", ratios(seconds["merged"], seconds["base"]),
            target=MERGED),
        Row("generation", f"{what}: live / base", ratios(seconds["live"], seconds["base"]),
            target=LIVE),
        Row("generation", f"{what}: new scale of {len(adapter.layers)} merged layers",
            Spread.of([1000 * one for one in changes]), "ms"),
    ]  # fmt: skip


def _check_drawn(what: str, drawn: dict[str, Tensor]) -> None:
    """An adapter that changes nothing has not been measured, nor one that is not the same live."""
    base, merged, live = (drawn[side].float() for side in ("base", "merged", "live"))
    moved, apart = float((merged - base).norm()), float((merged - live).norm())
    if not moved > 0:
        raise BenchError(f"{what}: the merged adapter changes nothing")
    if not apart <= 0.2 * moved:
        raise BenchError(f"{what}: merged and live differ by {apart / moved:.2f} of their effect")
