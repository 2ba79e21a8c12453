"""Optimizers by name: each lowers a loss, honours its groups, and resumes to the bit."""

import io
import sys
from typing import Any

import pytest
import torch
from conftest import choose
from torch import nn

from lora_sd import inject
from lora_sd.errors import ConfigError, RunError
from lora_sd.optimizers import (
    Resumable,
    averages_itself,
    by_name,
    learning_rates,
    make_optimizer,
    make_schedule,
    parameter_groups,
)
from lora_sd.optimizers.by_name import KINDS

CPU = torch.device("cpu")
NAMES = list(KINDS)
RATES = {name: 1e-2 for name in NAMES} | {"prodigy": 1.0, "lion": 3e-3, "came": 1e-3}
SHAPES = ((32, 256), (8, 3), (5,), (64, 16, 3, 3), (6, 4, 1, 1))
"""The first and the fourth are large enough for states of 8 bits."""


def make_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def make(name: str, parameters: list[nn.Parameter], *options: str) -> Resumable:
    """An optimizer of two groups, the second at half the rate and without weight decay."""
    rate = RATES[name]
    groups = [
        {"name": "fast", "params": parameters[:2], "lr": rate, "weight_decay": 0.01},
        {"name": "slow", "params": parameters[2:], "lr": rate / 2, "weight_decay": 0.0},
    ]
    return make_optimizer(name, groups, options, CPU)


def learn(
    optimizer: Resumable, schedule: Any, parameters: list[nn.Parameter], steps: range
) -> None:
    """Pull the parameters to zero, with noise that only depends on the step."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for one in parameters:
            noise = 0.1 * torch.randn(one.shape, generator=generator)
            one.grad = (one.detach().float() + noise).to(one.dtype)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def saved(state: Any) -> Any:
    """A state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_the_steps_saved_and_resumed_are_all_the_steps(name, dtype):
    def start(parameters):
        optimizer = make(name, parameters)
        return optimizer, make_schedule(optimizer, 20, name="cosine", warmup_steps=3)

    straight = make_parameters(dtype)
    learn(*start(straight), straight, range(12))
    half = make_parameters(dtype)
    optimizer, schedule = start(half)
    learn(optimizer, schedule, half, range(6))
    state = saved([optimizer.state_dict(), schedule.state_dict(), [p.detach() for p in half]])

    resumed = [nn.Parameter(values) for values in state[2]]
    optimizer, schedule = start(resumed)
    optimizer.load_state_dict(state[0])
    schedule.load_state_dict(state[1])
    learn(optimizer, schedule, resumed, range(6, 12))
    assert all(torch.equal(*pair) for pair in zip(resumed, straight, strict=True))
    assert not torch.equal(resumed[0], half[0])


@pytest.mark.parametrize("name", NAMES)
def test_each_group_learns_at_its_own_rate_and_decay(name):
    """With the same start and gradients, half the rate goes half as far in the first steps."""

    def moved(rate: float, weight_decay: float, other: float) -> torch.Tensor:
        torch.manual_seed(0)
        one, beside = (nn.Parameter(torch.randn(16, 16)) for _ in range(2))
        start = one.detach().clone()
        groups = [
            {"params": [beside], "lr": other, "weight_decay": 0.0},
            {"params": [one], "lr": rate, "weight_decay": weight_decay},
        ]
        optimizer = make_optimizer(name, groups, [], CPU)
        for _ in range(2 if name == "prodigy" else 1):
            one.grad, beside.grad = torch.ones(16, 16), torch.ones(16, 16)
            optimizer.step()
        return one.detach() - start

    rate = RATES[name]
    whole, half = moved(rate, 0.0, rate), moved(rate / 2, 0.0, rate)
    torch.testing.assert_close(half, whole / 2, rtol=1e-2, atol=1e-7)
    assert torch.equal(moved(0.0, 0.0, rate), torch.zeros(16, 16))
    assert not torch.equal(moved(rate, 0.5, rate), whole)


@pytest.mark.parametrize("name", NAMES)
def test_it_lowers_the_loss_of_a_small_unet(unet, unet_inputs, name):
    layers = inject.attach(unet, choose(unet, "attention-conv"))
    groups = parameter_groups(
        layers,
        learning_rate=RATES[name],
        conv_learning_rate=None,
        text_encoder_rates={},
        block_learning_rates=[],
        lora_plus_ratio=1.0,
        weight_decay=0.01,
    )
    optimizer = make_optimizer(name, groups, [], CPU)
    schedule = make_schedule(optimizer, 25, name="constant", warmup_steps=5)
    torch.manual_seed(4)
    target = torch.randn(2, 4, 8, 8)
    losses = []
    for _ in range(25):
        loss = (unet(*unet_inputs).sample - target).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < (0.999 if name == "prodigy" else 0.97) * losses[0]


def test_prodigy_finds_a_rate_and_tells_it():
    parameters = make_parameters()
    optimizer = make("prodigy", parameters)
    first = learning_rates(optimizer)
    learn(optimizer, make_schedule(optimizer, 9, name="constant", warmup_steps=0), parameters,
          range(40))  # fmt: skip
    last = learning_rates(optimizer)
    assert first == {"fast": 1e-6, "slow": 5e-7}
    assert last["fast"] > 100 * first["fast"] and last["slow"] == last["fast"] / 2


def test_prodigy_with_one_rate_is_the_library_s():
    from pytorch_optimizer import Prodigy

    results = []
    for make_one in (
        lambda ps: Prodigy(ps, lr=1.0, weight_decay=0.01),
        lambda ps: make_optimizer(
            "prodigy", [{"params": ps, "lr": 1.0, "weight_decay": 0.01}], [], CPU
        ),
    ):
        parameters = make_parameters()
        optimizer = make_one(parameters)
        schedule = make_schedule(optimizer, 9, name="constant", warmup_steps=0)
        learn(optimizer, schedule, parameters, range(9))
        results.append(parameters)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_states_of_8_bits_are_a_quarter_of_adamw_s():
    def state_bytes(name: str) -> int:
        parameters = [nn.Parameter(torch.randn(64, 1024))]
        optimizer = make_optimizer(name, [{"params": parameters, "lr": 1e-3}], [], CPU)
        parameters[0].grad = torch.randn(64, 1024)
        optimizer.step()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        return file.tell()

    assert state_bytes("adamw_8bit") < 0.3 * state_bytes("adamw")


def test_only_the_schedule_free_one_averages_by_itself():
    assert [n for n in NAMES if averages_itself(make(n, make_parameters()))] == [
        "adamw_schedulefree"
    ]


# --- options ---


@pytest.mark.parametrize(
    ("name", "option", "key", "value"),
    [
        ("adamw", "betas=0.8,0.95", "betas", (0.8, 0.95)),
        ("adamw", " eps = 1e-6 ", "eps", 1e-6),
        ("adamw", "fused=false", "fused", False),
        ("adamw_8bit", "betas=0.8,0.95", "betas", (0.8, 0.95)),
        ("adafactor", "beta1=0.9", "beta1", 0.9),
        ("adafactor", "scale_parameter=True", "scale_parameter", True),
        ("prodigy", "d_coef=0.5", "d_coef", 0.5),
        ("prodigy", "growth_rate=2", "growth_rate", 2),
        ("prodigy", "eps=none", "eps", None),
        ("lion", "betas=0.8,0.95", "betas", (0.8, 0.95)),
        ("came", "betas=0.8,0.9,0.95", "betas", (0.8, 0.9, 0.95)),
        ("adamw_schedulefree", "r=1.0", "r", 1.0),
    ],
)
def test_an_option_reaches_the_optimizer(name, option, key, value):
    assert make(name, make_parameters(), option).param_groups[0][key] == value


@pytest.mark.parametrize(
    ("name", "option", "sentence"),
    [
        ("adamw", "beta=0.9,0.99", "no argument 'beta'. Did you mean 'betas'?"),
        ("lion", "zz=1", "lion has no argument 'zz'. It has betas,"),
        ("adamw", "betas=0.9", "2 numbers are expected, such as 0.9,0.999."),
        ("adamw", "betas=0.9,x", "a number, true, false or none is expected"),
        ("adamw", "eps=nan", "a number, true, false or none is expected"),
        ("adamw", "eps=0.1,0.2", "one number is expected, such as 1e-08."),
        ("adamw", "eps=true", "one number is expected"),
        ("adamw", "amsgrad=3", "true or false is expected."),
        ("adamw", "eps", "write NAME=VALUE"),
        ("adamw", "=3", "write NAME=VALUE"),
        ("adamw", "betas=0.9,1.5", "adamw does not take betas=0.9,1.5: Invalid beta"),
        ("adamw", "eps=none", "adamw does not take eps=none"),
        ("came", "betas=2,2,2", "came does not take betas=2,2,2"),
        ("prodigy", "lr=1", "set 'optimizer.learning_rate' instead."),
        ("lion", "weight_decay=1", "set 'optimizer.weight_decay' instead."),
        ("adafactor", "relative_step=true", "it would find the learning rate itself"),
        ("adamw_schedulefree", "warmup_steps=5", "set 'optimizer.warmup_steps' instead."),
    ],
)
def test_a_wrong_option_is_told_in_a_sentence(name, option, sentence):
    with pytest.raises(ConfigError) as caught:
        make(name, make_parameters(), option)
    assert sentence in str(caught.value) and "'optimizer.options'" in str(caught.value)


def test_all_wrong_options_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        make("adamw", make_parameters(), "eps=1", "eps=2", "zz=1", "amsgrad=5")
    assert len(caught.value.problems) == 3 and "'eps' is given twice" in caught.value.problems[0]


# --- packages and changed settings ---


def test_a_package_that_is_not_there_is_told_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    monkeypatch.delitem(sys.modules, "lora_sd.optimizers.prodigy", raising=False)
    for name in ("lion", "prodigy", "came", "adamw_schedulefree"):
        with pytest.raises(ConfigError, match=f"is {name}, whose package .*pip install -r"):
            make(name, make_parameters())


def test_bitsandbytes_is_taken_where_it_is_installed(monkeypatch):
    find = by_name.importlib.util.find_spec
    for installed, source in ((True, "bitsandbytes"), (False, "torchao")):
        monkeypatch.setattr(
            by_name.importlib.util,
            "find_spec",
            lambda name, there=installed: there if name == "bitsandbytes" else find(name),
        )
        assert by_name.kind_of("adamw_8bit", CPU).source == source


def test_a_state_of_another_package_is_refused():
    optimizer = make("adamw_8bit", make_parameters())
    state = optimizer.state_dict() | {"source": "bitsandbytes"}
    with pytest.raises(RunError, match="Install bitsandbytes to go on"):
        optimizer.load_state_dict(state)


def test_a_setting_that_was_changed_counts_after_a_resume():
    parameters = make_parameters()
    before = make("adamw", parameters, "betas=0.8,0.9")
    learn(before, make_schedule(before, 9, name="cosine", warmup_steps=0), parameters, range(3))
    group = {"params": parameters, "name": "all", "lr": 0.5, "weight_decay": 0.25}
    after = make_optimizer("adamw", [group], ["betas=0.5,0.6"], CPU)
    state = before.state_dict()
    state["param_groups"] = [{**state["param_groups"][0], "params": [0, 1, 2, 3, 4]}]
    after.load_state_dict(state)
    schedule = make_schedule(after, 9, name="constant", warmup_steps=0)
    schedule.load_state_dict({"step": 3, "scale": 1.0})
    now = after.param_groups[0]
    assert (now["lr"], now["weight_decay"], now["betas"]) == (0.5, 0.25, (0.5, 0.6))
    assert torch.equal(
        after.state[parameters[3]]["exp_avg"], before.state[parameters[3]]["exp_avg"]
    )
