"""Memory that runs out: recognised, let go of, stepped down from, or told with advice."""

import weakref
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import choose

from lora_sd import inject, out_of_memory
from lora_sd.config import config_from_values
from lora_sd.data.training_data import Batch
from lora_sd.errors import EXIT_OUT_OF_MEMORY, BaseModelError, OutOfMemory
from lora_sd.objective import Objective
from lora_sd.out_of_memory import SteppingDown, advice, is_out_of_memory, step_down, told
from lora_sd.train_step import TrainStep

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.8 GiB."
PICTURES, LAST = 4, 900  # how many, and the last one's timestep


class FourPictures:
    """The same four pictures in every step, in as many batches as it takes."""

    def __init__(self, base):
        draw = torch.Generator().manual_seed(0)
        self.latents = torch.randn(PICTURES, 4, 8, 8, generator=draw)
        self.noise = torch.randn(PICTURES, 4, 8, 8, generator=draw)
        with torch.no_grad():
            self.text = base.encode_text(["a", "b", "c", "d"])

    def batches(self, step, batch_size, world=1, rank=0):
        return [self.part(slice(at, at + batch_size)) for at in range(0, PICTURES, batch_size)]

    def part(self, some):
        n = len(self.latents[some])
        return Batch(
            latents=self.latents[some],
            noise=self.noise[some],
            added_noise=self.noise[some],
            timesteps=torch.tensor([3, 200, 500, LAST])[some],
            names=["a", "b", "c", "d"][some],
            captions=["a", "b", "c", "d"][some],
            text=replace(self.text, hidden=self.text.hidden[some]),
            time_ids=torch.zeros(n, 6),
            mask=None,
            weights=torch.full((n,), 1 / PICTURES),
        )


@pytest.fixture
def worker(base):
    layers = inject.attach(base.components, choose({"unet": base.unet}))
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_up.weight, std=0.1)
    return TrainStep(
        base=base,
        objective=Objective(base.noise_schedule()),
        data=FourPictures(base),
        accelerator=Accelerator(cpu=True),
        unet=base.unet,
        encoders=base.text_encoders,
        batch_size=PICTURES,
        max_tokens=75,
        seed=0,
        trains_text=False,
    )


def learning(worker):
    return [one for one in worker.base.unet.parameters() if one.requires_grad]


def guarded(worker, steps_down=True):
    saved = []
    guard = SteppingDown(
        worker,
        learning(worker),
        steps_down=steps_down,
        save=lambda: saved.append(True),
        advise=lambda: ["Take less."],
    )
    return guard, saved


def fails_above(worker, monkeypatch, batch_size, error=None):
    """Let the step run out of memory with batches above that size in which the last picture is."""
    predict = worker.base.predict

    def limited(noisy, timesteps, *arguments, **named):
        predicted = predict(noisy, timesteps, *arguments, **named)
        if len(noisy) > batch_size and LAST in timesteps:
            raise error or torch.OutOfMemoryError(CUDA)
        return predicted

    monkeypatch.setattr(worker.base, "predict", limited)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 4000000000000 bytes. Error code 12"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_recognised(error):
    assert is_out_of_memory(error)
    outer = ValueError("a step failed")
    outer.__cause__ = error
    assert is_out_of_memory(outer)


def test_the_cpus_own_error_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), OSError("disk"), KeyError(1)])
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)


def test_it_steps_down_in_the_stated_order(worker):
    assert "gradient checkpointing" in step_down(worker, worker.base)
    assert worker.base.unet.is_gradient_checkpointing
    assert "2 pictures" in step_down(worker, worker.base)
    assert "1 pictures" in step_down(worker, worker.base)
    assert step_down(worker, worker.base) is None
    assert worker.batch_size == 1


def test_a_step_done_again_with_less_is_the_same_step(worker, monkeypatch, caplog):
    expected, _ = worker.gradients(0)
    wanted = [one.grad.clone() for one in learning(worker)]
    for one in learning(worker):
        one.grad = None
    fails_above(worker, monkeypatch, 1)
    guard, saved = guarded(worker)
    loss, bad = guard.gradients(0)
    assert worker.batch_size == 1 and worker.base.unet.is_gradient_checkpointing
    assert loss == pytest.approx(expected, rel=1e-5) and not bad and not saved
    for one, gradient in zip(learning(worker), wanted, strict=True):
        torch.testing.assert_close(one.grad, gradient, rtol=1e-4, atol=1e-6)
    assert caplog.text.count("is done again") == 3


def test_a_run_that_goes_on_has_stepped_down_as_often(worker, monkeypatch):
    fails_above(worker, monkeypatch, 1)
    first, _ = guarded(worker)
    first.gradients(0)
    state, size = first.state_dict(), worker.batch_size
    assert size == 1
    worker.batch_size = 4
    worker.base.unet.disable_gradient_checkpointing()
    second, _ = guarded(worker)
    second.load_state_dict(state)
    assert worker.batch_size == 1 and worker.base.unet.is_gradient_checkpointing
    assert second.state_dict() == state


def test_nothing_left_to_step_down_to_saves_and_ends_with_its_status(worker, monkeypatch):
    fails_above(worker, monkeypatch, 0)
    guard, saved = guarded(worker)
    with pytest.raises(OutOfMemory) as caught:
        guard.gradients(6)
    assert saved == [True] and caught.value.exit_status == EXIT_OUT_OF_MEMORY
    assert caught.value.problems[0].startswith(
        "Memory ran out in step 7: CUDA out of memory. Step 6 is saved."
    )
    assert caught.value.problems[1:] == ["Take less."]


def test_it_does_not_step_down_unasked(worker, monkeypatch):
    fails_above(worker, monkeypatch, 2)
    guard, saved = guarded(worker, steps_down=False)
    with pytest.raises(OutOfMemory):
        guard.gradients(0)
    assert worker.batch_size == PICTURES and not worker.base.unet.is_gradient_checkpointing
    assert saved == [True]


def test_several_processes_neither_step_down_nor_save_alone(worker, monkeypatch):
    fails_above(worker, monkeypatch, 2)
    guard, saved = guarded(worker)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(OutOfMemory, match="What was saved before is whole"):
        guard.gradients(0)
    assert worker.batch_size == PICTURES and not saved


def test_other_errors_go_through(worker, monkeypatch):
    fails_above(worker, monkeypatch, 0, RuntimeError("shapes do not fit"))
    guard, saved = guarded(worker)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        guard.gradients(0)
    assert not saved


def test_what_a_failed_step_held_is_free_before_the_next_try(worker, monkeypatch):
    held, alive = [], []
    predict = worker.base.predict

    def limited(noisy, *arguments, **named):
        alive.append(sum(one() is not None for one in held))
        predicted = predict(noisy, *arguments, **named)
        held.append(weakref.ref(predicted))
        if len(noisy) > 2:
            raise torch.OutOfMemoryError(CUDA)
        return predicted

    monkeypatch.setattr(worker.base, "predict", limited)
    guarded(worker)[0].gradients(0)
    assert alive[:3] == [0, 0, 0]


def test_letting_go_frees_what_the_failed_functions_were_working_with():
    held = []

    def fail():
        activation = torch.ones(10)
        held.append(weakref.ref(activation))
        raise torch.OutOfMemoryError(CUDA)

    try:
        fail()
    except torch.OutOfMemoryError as error:
        out_of_memory.let_go(error)
        assert held[0]() is None


def test_out_of_memory_elsewhere_is_told_with_advice():
    with pytest.raises(OutOfMemory) as caught, told(lambda: ["Take less."]):
        raise torch.OutOfMemoryError(CUDA)
    assert caught.value.problems == [
        "Memory ran out: CUDA out of memory. What was saved before is whole.",
        "Take less.",
    ]
    with pytest.raises(BaseModelError), told(lambda: []):
        raise BaseModelError("no such base")
    with pytest.raises(RuntimeError, match="shapes"), told(lambda: []):
        raise RuntimeError("shapes do not fit")


def on_a_gpu_of(gib, monkeypatch):
    class Properties:
        total_memory = int(gib * 2**30)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)


def test_advice_names_flags_that_fit(monkeypatch, image_folder):
    data = {"folder": str(image_folder), "resolution_px": 64, "upscale": True}
    config = config_from_values({"data": data, "train": {"batch_size": 32}})
    on_a_gpu_of(0.7, monkeypatch)
    (said,) = advice(config, torch.device("cuda"))
    assert said.endswith("would do with --memory.gradient_checkpointing")
    on_a_gpu_of(0.5, monkeypatch)
    (said,) = advice(config, torch.device("cuda"))
    assert "No change of settings" in said and "data.resolution_px" in said
    on_a_gpu_of(24, monkeypatch)
    assert "another program" in advice(config, torch.device("cuda"))[0]


def test_advice_is_never_an_error(monkeypatch):
    config = config_from_values({"base": {"model": "nowhere/at-all.safetensors"}})
    assert advice(config, torch.device("cuda")) == [out_of_memory.USUAL]
    assert advice(config, torch.device("cpu")) == [out_of_memory.USUAL]
