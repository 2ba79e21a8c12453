"""Averages of the weights: what they are, that they can be used, and that nothing is lost."""

import io

import pytest
import torch
from torch import nn

from lora_sd.ema import averaged, make_ema
from lora_sd.optimizers import make_optimizer

CPU = torch.device("cpu")


def make(name: str = "adamw", dtype: torch.dtype = torch.float32, decay: float = 0.9):
    """(parameters, optimizer, average)."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((8, 4), (3,), (5, 2))]
    groups = [
        {"params": parameters[:1], "lr": 0.1, "weight_decay": 0.01},
        {"params": parameters[1:], "lr": 0.05, "weight_decay": 0.0},
    ]
    return parameters, make_optimizer(name, groups, [], CPU), make_ema(parameters, decay)


def learn(parameters, optimizer, ema, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for one in parameters:
            one.grad = torch.randn(one.shape, generator=generator).to(one.dtype)
        optimizer.step()
        if ema is not None:
            ema.step(parameters)


def copies(parameters) -> list[torch.Tensor]:
    return [one.detach().clone() for one in parameters]


def same(first, second) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_decay_of_0_is_no_average():
    assert make(decay=0.0)[2] is None


def test_it_is_a_moving_average_that_reaches_further_with_time():
    parameters, optimizer, ema = make()
    expected = None
    for step in range(60):
        learn(parameters, optimizer, ema, range(step, step + 1))
        share = 1 - min(0.9, 1 - (1 + step) ** -0.75) if step else 1.0
        now = copies(parameters)
        expected = now if expected is None else [
            old + share * (new - old) for old, new in zip(expected, now, strict=True)
        ]  # fmt: skip
    for one, other in zip(ema.shadow_params, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert ema.cur_decay_value == 0.9


def test_the_average_of_bfloat16_is_kept_in_float32():
    parameters, optimizer, ema = make(dtype=torch.bfloat16, decay=0.999)
    learn(parameters, optimizer, ema, range(20))
    before = copies(ema.shadow_params)
    learn(parameters, optimizer, ema, range(20, 21))
    assert all(one.dtype == torch.float32 for one in ema.shadow_params)
    assert all((a != b).all() for a, b in zip(before, ema.shadow_params, strict=True))
    with averaged(optimizer, ema):
        assert same(parameters, [one.bfloat16() for one in ema.shadow_params])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "decay"), [("adamw", 0.9), ("adamw_schedulefree", 0.0), ("adamw", 0.0)]
)
def test_averaged_weights_are_in_place_inside_and_those_that_learn_afterwards(name, decay, dtype):
    parameters, optimizer, ema = make(name, dtype, decay)
    learn(parameters, optimizer, ema, range(9))
    learning, state = copies(parameters), optimizer.state_dict()["param_groups"]
    with averaged(optimizer, ema):
        used = copies(parameters)
    assert same(parameters, learning)
    assert optimizer.state_dict()["param_groups"] == state
    assert same(used, learning) == (name == "adamw" and not decay)
    with pytest.raises(RuntimeError), averaged(optimizer, ema):
        raise RuntimeError("a sample picture that fails")
    assert same(parameters, learning)
    with averaged(optimizer, ema), averaged(optimizer, ema):
        assert same(parameters, used)
    assert same(parameters, learning)


def test_schedule_free_s_average_is_that_of_its_paper():
    """x_(t+1) = (1 - c) x_t + c z_(t+1) with c = 1 / (t + 1): the mean of all z."""
    parameters, optimizer, _ = make("adamw_schedulefree", decay=0.0)
    seen = []
    for step in range(6):
        learn(parameters, optimizer, None, range(step, step + 1))
        seen.append(optimizer.state[parameters[0]]["z"].clone())
    with averaged(optimizer):
        torch.testing.assert_close(parameters[0].detach(), torch.stack(seen).mean(0))


@pytest.mark.parametrize("name", ["adamw", "adamw_schedulefree"])
@pytest.mark.parametrize("looks", [False, True])
def test_looking_at_the_average_changes_nothing_of_the_run(name, looks):
    parameters, optimizer, ema = make(name, decay=0.9)
    straight, plain, _ = make(name)
    for step in range(9):
        learn(straight, plain, None, range(step, step + 1))
        learn(parameters, optimizer, ema, range(step, step + 1))
        if looks:
            with averaged(optimizer, ema if name == "adamw" else None):
                pass
    assert same(parameters, straight)


@pytest.mark.parametrize("name", ["adamw", "adamw_schedulefree"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_the_steps_saved_and_resumed_are_all_the_steps(name, dtype):
    parameters, optimizer, ema = straight = make(name, dtype)
    learn(*straight, range(10))
    parameters_2, optimizer_2, ema_2 = half = make(name, dtype)
    learn(*half, range(5))
    file = io.BytesIO()
    torch.save([optimizer_2.state_dict(), ema_2.state_dict(), copies(parameters_2)], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    parameters_3, optimizer_3, ema_3 = resumed = make(name, dtype)
    with torch.no_grad():
        for one, values in zip(parameters_3, states[2], strict=True):
            one.copy_(values)
    optimizer_3.load_state_dict(states[0])
    ema_3.load_state_dict(states[1])
    learn(*resumed, range(5, 10))
    assert same(parameters_3, parameters) and same(ema_3.shadow_params, ema.shadow_params)
    with averaged(optimizer, ema), averaged(optimizer_3, ema_3):
        assert same(parameters_3, parameters)


def test_a_changed_decay_counts_after_a_resume():
    state = make(decay=0.9)[2].state_dict()
    ema = make(decay=0.99)[2]
    ema.load_state_dict(state)
    assert ema.decay == 0.99


def test_accelerate_s_wrapper_is_seen_through():
    from accelerate import Accelerator

    parameters, optimizer, _ = make("adamw_schedulefree", decay=0.0)
    wrapped = Accelerator(cpu=True).prepare_optimizer(optimizer)
    learn(parameters, wrapped, None, range(4))
    learning = copies(parameters)
    with averaged(wrapped):
        assert not same(parameters, learning)
    assert same(parameters, learning)
