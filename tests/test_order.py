"""The order of pictures: every showing that was promised, steps of one bucket, no memory."""

from collections import Counter
from fractions import Fraction
from math import ceil, floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_sd.data.order import Order

EPOCHS = 5


@st.composite
def orders(draw):
    """(arguments of an order, but for the seed)"""
    items = draw(st.integers(1, 20))
    each = {"min_size": items, "max_size": items}
    buckets = draw(st.lists(st.sampled_from("abcd"), **each))
    repeats = draw(st.lists(st.sampled_from([0.1, 0.3, 0.5, 1, 1.5, 2, 5]), **each))
    is_prior = [False, *draw(st.lists(st.booleans(), **each))[1:]]
    return buckets, repeats, is_prior, draw(st.integers(1, 9))


def showings(order, epochs):
    """Everything that some first epochs show."""
    steps = ceil(order.epoch_start(epochs) / order.step_pictures)
    seen = [one for step in range(steps) for one in order.step(step)]
    return [one for one in seen if one.epoch < epochs]


@given(orders())
def test_every_showing_that_was_promised_happens(arguments):
    buckets, repeats, is_prior, _ = arguments
    order = Order(*arguments, seed=3)
    seen = showings(order, EPOCHS)
    assert len(seen) == order.epoch_start(EPOCHS)
    times = Counter((one.item, one.epoch) for one in seen)
    trained = sum(Fraction(str(r)) for r, prior in zip(repeats, is_prior, strict=True) if not prior)
    priors = sum(Fraction(str(r)) for r, prior in zip(repeats, is_prior, strict=True) if prior)
    for item, (repeat, prior) in enumerate(zip(repeats, is_prior, strict=True)):
        each = Fraction(str(repeat)) * (trained / priors if prior else 1)
        shown = 0
        for epoch in range(EPOCHS):
            assert floor(each) <= times[item, epoch] <= ceil(each)
            shown += times[item, epoch]
            assert floor((epoch + 1) * each) <= shown <= ceil((epoch + 1) * each)


@given(orders())
def test_prior_pictures_are_shown_as_often_as_all_others_together(arguments):
    is_prior, kinds = arguments[2], len(set(arguments[1]))
    seen = Counter(is_prior[one.item] for one in showings(Order(*arguments, seed=3), EPOCHS))
    if any(is_prior):
        assert abs(seen[True] - seen[False]) <= 2 * kinds  # each kind of repeats is rounded


def test_equal_repeats_give_equal_epochs():
    order = Order("aab" * 5, [1 / 3] * 15, [False] * 15, 2, seed=0)
    assert [order.epoch_size(epoch) for epoch in range(6)] == [5] * 6
    with_prior = Order("a" * 13, [1] * 13, [False] * 10 + [True] * 3, 4, seed=0)
    assert [with_prior.epoch_size(epoch) for epoch in range(6)] == [20] * 6


@given(orders())
def test_steps_are_full_and_epochs_follow_each_other(arguments):
    order = Order(*arguments, seed=3)
    epochs = []
    for step in range(12):
        seen = order.step(step)
        assert len(seen) == arguments[3]
        epochs += [one.epoch for one in seen]
    assert epochs == sorted(epochs)
    for epoch in range(epochs[-1]):
        assert epochs.count(epoch) == order.epoch_size(epoch)


@given(orders(), st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_a_step_needs_no_earlier_one(arguments, steps):
    in_turn = Order(*arguments, seed=3)
    all_steps = [in_turn.step(step) for step in range(31)]
    again = Order(*arguments, seed=3)
    assert [again.step(step) for step in steps] == [all_steps[step] for step in steps]


@given(orders())
def test_a_count_says_how_often_the_item_was_seen_before(arguments):
    counts = Counter()
    for one in showings(Order(*arguments, seed=3), EPOCHS):
        assert one.count == counts[one.item]
        counts[one.item] += 1


@given(orders())
def test_few_steps_are_mixed(arguments):
    buckets, step_pictures = arguments[0], arguments[3]
    order = Order(*arguments, seed=3)
    mixed = Counter()
    for step in range(order.epoch_start(EPOCHS) // step_pictures):
        seen = order.step(step)
        if len({buckets[one.item] for one in seen}) > 1:
            mixed.update({one.epoch for one in seen})
    assert all(count <= len(set(buckets)) + 2 for count in mixed.values())


def test_epochs_and_seeds_differ_in_order_alone():
    items = 200
    one, other = (Order("ab" * 100, [1] * items, [False] * items, 4, seed) for seed in (1, 2))
    first = [seen.item for seen in showings(one, 1)]
    second = [seen.item for seen in showings(one, 2)[items:]]
    elsewhere = [seen.item for seen in showings(other, 1)]
    assert sorted(first) == sorted(second) == sorted(elsewhere) == list(range(items))
    assert first != second and first != elsewhere


def test_names_of_buckets_do_not_matter():
    sizes = [(512, 512), (448, 576)] * 10
    named = Order(sizes, [1] * 20, [False] * 20, 3, seed=5)
    lettered = Order("xy" * 10, [1] * 20, [False] * 20, 3, seed=5)
    assert [named.step(k) for k in range(20)] == [lettered.step(k) for k in range(20)]


def test_neighbours_do_not_take_turns_together():
    items = 100
    order = Order("a" * items, [0.5] * items, [False] * items, 1, seed=0)
    first = {seen.item for seen in showings(order, 1)}
    assert len(first) == 50 and 10 < len(first & set(range(50))) < 40


def test_pictures_meet_others_in_each_epoch():
    order = Order("a" * 40, [1] * 40, [False] * 40, 4, seed=0)
    met = {one.item for step in range(200) for one in order.step(step) if holds(order, step, 0)}
    assert len(met) > 30


def holds(order, step, item):
    return any(one.item == item for one in order.step(step))


def test_mixed_steps_lie_anywhere_in_an_epoch():
    order = Order("aaaaaabbbbbb", [1] * 12, [False] * 12, 4, seed=0)
    mixed = {step % 3 for step in range(60) if len({one.item < 6 for one in order.step(step)}) == 2}
    assert mixed == {0, 1, 2}


def test_any_bucket_may_begin_an_epoch_that_begins_within_a_step():
    order = Order("aaaaabbbbb", [1] * 10, [False] * 10, 4, seed=0)
    begins = [order.step(5 * k + 2)[2] for k in range(30)]
    assert all(one.epoch % 2 == 1 for one in begins)
    assert {one.item < 5 for one in begins} == {True, False}


def test_one_picture_fills_any_step():
    order = Order(["a"], [1], [False], 8, seed=0)
    assert [(one.item, one.epoch, one.count) for one in order.step(1)] == [
        (0, epoch, epoch) for epoch in range(8, 16)
    ]


def test_rare_pictures_are_found_over_empty_epochs():
    order = Order(["a"], [0.001], [False], 2, seed=0)
    assert [one.epoch for one in order.step(0)] == [999, 1999]


@pytest.mark.parametrize("is_prior", [[], [True, True]])
def test_nothing_to_learn_is_refused(is_prior):
    with pytest.raises(ValueError, match="nothing to learn"):
        Order(["a"] * len(is_prior), [1] * len(is_prior), is_prior, 2, seed=0)


@settings(deadline=1000)
@given(st.integers(0, 10**7))
def test_any_step_of_a_long_run_is_quick(step):
    assert len(LONG.step(step)) == 8


LONG = Order([item % 9 for item in range(10_000)], [1.1] * 10_000, [False] * 10_000, 8, seed=0)
