"""What a training step really takes on this machine: memory and time of a few real steps."""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_sd import inject, memory
from lora_sd.base_model import BaseModel
from lora_sd.data.training_data import Batch
from lora_sd.objective import Objective
from lora_sd.optimizers import make_optimizer
from lora_sd.plan.setting import Setting
from lora_sd.text_encoding import TextEmbedding
from lora_sd.train_step import TrainStep

TIMED_STEPS = 3
LONG_STEP_S = 20.0


@dataclass(frozen=True)
class Measured:
    """Of a training step, once the optimizer has its states.

    Attributes:
        device: 'cuda', 'cpu', ...
        highest: bytes of all tensors at the highest moment, weights included; of PyTorch's
            allocator, so that what kernels take from it counts.
        loaded: of these, what is there between the steps.
        pass_s: seconds of a pass, the median of a few.
    """

    device: str
    highest: int
    loaded: int
    pass_s: float


def measure(
    base: BaseModel,
    accelerator: Accelerator,
    setting: Setting,
    *,
    options: Sequence[str] = (),
    memory_options: dict[str, Any] | None = None,
    timed_steps: int = TIMED_STEPS,
) -> Measured:
    """Train for a few steps on noise of the pictures' size, and forget what was learnt.

    Args:
        base: freshly loaded; adapters are attached to it, and stay.
        options: of the optimizer.
        memory_options: as `memory.apply` takes them.
        timed_steps: how many steps more are timed, unless they are long; 0: that whose memory is
            measured.

    Raises:
        OutOfMemoryError, RuntimeError: there is not enough memory.
    """
    device, passes = accelerator.device, 2 if setting.adds_up else 1
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    own = sum(_sizes(_tensors_of(base), device))
    layers = inject.attach(base.components, setting.plans, setting.options)
    memory.apply(base, layers, **(memory_options or {}))
    if setting.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    learning = [one for layer in layers.values() for one in layer.parameters() if one.requires_grad]
    rate = 1.0 if setting.optimizer == "prodigy" else 1e-9
    group = {"params": learning, "lr": rate, "weight_decay": 0.0}
    plain = make_optimizer(setting.optimizer, [group], options, device)
    optimizer = accelerator.prepare_optimizer(plain)
    encoders = [name for name in base.components if name != "unet"]
    noise: Any = _Noise(base, setting, passes)
    base.release("vae", *(encoders if setting.text == "cached" else []))
    worker = TrainStep(
        base=base,
        objective=Objective(base.noise_schedule()),
        data=noise,
        accelerator=accelerator,
        unet=base.unet,
        encoders=base.text_encoders,
        batch_size=setting.batch_size,
        max_tokens=setting.max_tokens,
        seed=0,
        trains_text=setting.text == "trained",
    )

    def step() -> None:
        worker.gradients(0)
        accelerator.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()  # makes the optimizer's states
    states = [one for state in plain.state.values() for one in state.values()]
    loaded = sum(_sizes([*_tensors_of(base), *_flat(states)], device))
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        highest = torch.cuda.max_memory_allocated() - before + own
    else:
        highest = loaded + peak_on_cpu(step)
    times = [time.perf_counter() - started]
    if timed_steps and times[0] < LONG_STEP_S:
        times = [_seconds(step) for _ in range(timed_steps)]
    return Measured(device.type, highest, loaded, statistics.median(times) / passes)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_on_cpu(work: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator had given out at a time while `work` ran, beyond
    those before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces itself otherwise
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events: Any = profile.profiler.kineto_results.events()
    changes = sorted(
        ((one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]"),
        key=lambda change: change[0],
    )
    live = peak = 0
    for _, size in changes:
        live += size
        peak = max(peak, live)
    return peak


class _Noise:
    """Batches of noise, of the pictures' size, as `TrainingData` gives them."""

    def __init__(self, base: BaseModel, setting: Setting, passes: int) -> None:
        self._base, self._setting, self._passes = base, setting, passes
        texts = ["a"] * setting.batch_size
        with torch.no_grad():
            self._text = base.encode_text(texts, setting.max_tokens)

    def batches(self, step: int, batch_size: int, world: int = 1, rank: int = 0) -> list[Batch]:
        return [self._batch() for _ in range(self._passes)]

    def _batch(self) -> Batch:
        setting, n = self._setting, self._setting.batch_size
        width, height = (side // self._base.vae_factor for side in setting.size_px)
        noise = torch.randn(n, self._base.unet.config.in_channels, height, width)
        pooled = None if self._text.pooled is None else self._text.pooled.float().cpu()
        text = TextEmbedding(self._text.hidden.float().cpu(), pooled)
        sides = [setting.size_px[1], setting.size_px[0]]
        return Batch(
            latents=noise.clone(),
            noise=noise,
            added_noise=noise,
            timesteps=torch.full((n,), 500),
            names=["noise"] * n,
            captions=["a"] * n,
            text=text if setting.text == "cached" else None,
            time_ids=torch.tensor([[*sides, 0, 0, *sides]] * n),
            mask=None,
            weights=torch.full((n,), 1 / n),
        )


def _tensors_of(base: BaseModel) -> Iterable[Tensor]:
    modules: list[nn.Module] = [*base.components.values(), base.vae]
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def _flat(values: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors of an optimizer's states; of those in few bits, what they are made of."""
    for value in values:
        if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
            yield from (getattr(value, name) for name in value.__tensor_flatten__()[0])
        elif isinstance(value, Tensor):
            yield value


def _sizes(tensors: Iterable[Tensor], device: torch.device) -> list[int]:
    """Bytes of the storages on a device, each once."""
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in tensors
        if one.device.type == device.type
    }
    return list(storages.values())
