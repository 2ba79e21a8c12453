"""Learning rates over the steps: formulas, and the libraries that have the same."""

import io
import math

import diffusers.optimization as of_diffusers
import pytest
import torch
import transformers.optimization as of_transformers
from torch import nn

from lora_sd.optimizers import make_schedule
from lora_sd.optimizers.schedules import FALLS, factor, warmup_note

NAMES = ["constant", *FALLS]
STEPS, WARMUP = 37, 5


def make_optimizer(*rates: float) -> torch.optim.Optimizer:
    rates = rates or (3e-4,)
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=rates[0])


def rates_of(schedule, optimizer, steps: int = STEPS) -> list[float]:
    """The learning rate of each step, as a training loop comes by them."""
    found = []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def ours(name: str, steps: int = STEPS, warmup_steps: int = WARMUP, **options) -> list[float]:
    optimizer = make_optimizer()
    made = make_schedule(optimizer, steps, name=name, warmup_steps=warmup_steps, **options)
    return rates_of(made, optimizer, steps)


def theirs(make, *arguments, steps: int = STEPS, **options) -> list[float]:
    optimizer = make_optimizer()
    return rates_of(make(optimizer, *arguments, **options), optimizer, steps)


@pytest.mark.parametrize(
    ("steps", "warmup"), [(37, 5), (37, 0), (1500, 50), (1, 0), (2, 2), (6, 50)]
)
def test_constant_and_cosine_are_diffusers_to_the_bit(steps, warmup):
    constant = theirs(of_diffusers.get_constant_schedule_with_warmup, warmup, steps=steps)
    assert ours("constant", steps, warmup) == constant
    cosine = theirs(of_diffusers.get_cosine_schedule_with_warmup, warmup, steps, steps=steps)
    assert ours("cosine", steps, warmup) == cosine


@pytest.mark.parametrize("cycles", [1, 2, 5])
def test_restarts_are_diffusers_to_the_bit(cycles):
    theirs_ = theirs(
        of_diffusers.get_cosine_with_hard_restarts_schedule_with_warmup, WARMUP, STEPS, cycles
    )
    assert ours("cosine_with_restarts", cycles=cycles) == theirs_


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_linear_is_diffusers(floor):
    theirs_ = theirs(
        of_diffusers.get_linear_schedule_with_warmup, WARMUP, STEPS, f_min=floor, f_max=1.0
    )
    assert ours("linear", floor=floor) == pytest.approx(theirs_, rel=1e-12)


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_polynomial_is_diffusers(power):
    theirs_ = theirs(
        of_diffusers.get_polynomial_decay_schedule_with_warmup,
        WARMUP, STEPS, lr_end=3e-5, power=power,
    )  # fmt: skip
    assert ours("polynomial", power=power, floor=0.1) == pytest.approx(theirs_, rel=1e-12)


def test_a_cosine_with_a_floor_is_transformers():
    theirs_ = theirs(
        of_transformers.get_cosine_with_min_lr_schedule_with_warmup,
        WARMUP, STEPS, min_lr_rate=0.1,
    )  # fmt: skip
    assert ours("cosine", floor=0.1) == pytest.approx(theirs_, rel=1e-12)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_warmup_stable_decay_is_transformers_after_the_warmup(floor):
    theirs_ = theirs(
        of_transformers.get_wsd_schedule, WARMUP, 10, STEPS,
        decay_type="1-sqrt", min_lr_ratio=floor,
    )  # fmt: skip
    found = ours("warmup_stable_decay", decay_share=10 / STEPS, floor=floor)
    assert found[WARMUP:] == pytest.approx(theirs_[WARMUP:], rel=1e-12)


def test_rex_is_its_paper_s_formula():
    for step in range(STEPS + 1):
        z = 1 - step / STEPS
        expected = z / (1 / 2 + 1 / 2 * z)
        assert factor(step, STEPS, name="rex") == pytest.approx(expected, abs=1e-12)
    assert factor(50, 100, name="rex") == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", NAMES)
def test_it_rises_to_1_falls_to_the_floor_and_stays_there(name):
    def at(step):
        return factor(step, 100, name=name, warmup_steps=10, floor=0.25)

    assert at(0) == 0 and at(5) == 0.5 and at(10) == 1
    assert all(at(a) > at(a - 1) for a in range(1, 11))
    assert all(at(step) <= 1 for step in range(200))
    if name == "constant":
        assert all(at(step) == 1 for step in range(10, 200))
    else:
        assert all(at(a) <= at(a - 1) for a in range(11, 200))
        assert at(99) > 0.25 and at(100) == at(101) == at(10**6) == 0.25


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "warmup"), [(5, 5), (5, 6), (1, 1), (1, 0), (30, 50)])
def test_a_warmup_as_long_as_the_run_only_rises(name, steps, warmup):
    found = [factor(step, steps, name=name, warmup_steps=warmup) for step in range(steps)]
    assert all(math.isfinite(one) and 0 <= one <= 1 for one in found)
    if warmup:
        assert found == [step / warmup for step in range(steps)]
        assert f"only rises, to {found[-1]:.0%} of" in warmup_note(steps, warmup)
    else:
        assert found == [1.0] and warmup_note(steps, warmup) == ""


def test_a_decay_share_of_all_or_nothing_works():
    none = [factor(s, 20, name="warmup_stable_decay", decay_share=0.0) for s in range(21)]
    assert none[:20] == [1.0] * 20
    all_ = [factor(s, 20, name="warmup_stable_decay", decay_share=1.0) for s in range(21)]
    assert all_ == pytest.approx([1 - math.sqrt(s / 20) for s in range(21)])
    late = factor(15, 20, name="warmup_stable_decay", decay_share=1.0, warmup_steps=15)
    assert late == 1.0


def test_every_group_moves_by_the_same_factor():
    optimizer = make_optimizer(1e-4, 3e-4)
    schedule = make_schedule(optimizer, 10, name="linear", warmup_steps=0)
    for step in range(10):
        assert schedule.get_last_lr() == [1e-4 * schedule.at(step), 3e-4 * schedule.at(step)]
        schedule.step()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [1, 4, 5, 20, STEPS])
def test_a_resumed_run_has_the_same_rates(name, stop):
    optimizer = make_optimizer()
    schedule = make_schedule(optimizer, STEPS, name=name, warmup_steps=WARMUP)
    first = rates_of(schedule, optimizer, stop - 1)
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    optimizer = make_optimizer()
    schedule = make_schedule(optimizer, STEPS, name=name, warmup_steps=WARMUP)
    schedule.load_state_dict(torch.load(file, weights_only=True))
    assert first + rates_of(schedule, optimizer, STEPS - stop) == ours(name)


@pytest.mark.parametrize("name", NAMES)
def test_with_more_steps_a_finished_run_goes_on_where_a_longer_one_would_be(name):
    optimizer = make_optimizer()
    schedule = make_schedule(optimizer, 20, name=name, warmup_steps=2)
    rates_of(schedule, optimizer, 19)
    state = schedule.state_dict()
    optimizer = make_optimizer()
    longer = make_schedule(optimizer, 40, name=name, warmup_steps=2)
    longer.load_state_dict(state)
    assert longer.get_last_lr() == [ours(name, 40, 2)[20]] and longer.get_last_lr()[0] > 0


def test_a_changed_rate_counts_after_a_resume():
    schedule = make_schedule(make_optimizer(), 20, name="linear", warmup_steps=0)
    for _ in range(10):
        schedule.step()
    changed = make_schedule(make_optimizer(1.0), 20, name="linear", warmup_steps=0)
    changed.load_state_dict(schedule.state_dict())
    assert changed.get_last_lr() == [0.5]


def test_halved_rates_stay_halved_and_are_saved():
    optimizer = make_optimizer()
    schedule = make_schedule(optimizer, STEPS, name="cosine", warmup_steps=WARMUP)
    for _ in range(7):
        schedule.step()
    schedule.halve()
    assert schedule.get_last_lr() == [ours("cosine")[7] / 2]
    schedule.halve()
    again = make_optimizer()
    resumed = make_schedule(again, STEPS, name="cosine", warmup_steps=WARMUP)
    resumed.load_state_dict(schedule.state_dict())
    for step in range(7, STEPS):
        assert resumed.get_last_lr() == [ours("cosine")[step] / 4] and resumed.at(step) <= 0.25
        resumed.step()
