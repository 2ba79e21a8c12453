"""The benchmark, on miniatures: its rows are there, and a side that does nothing is noticed."""

import json
import math

import pytest
import torch

from tools.bench import __main__ as bench
from tools.bench import sides
from tools.bench.cases import cpu_cases, gpu_cases, miniature_case
from tools.bench.errors import BenchError
from tools.bench.memory import measure_peak
from tools.bench.rounds import Spread, ratios, take_turns
from tools.bench.step import measure_step
from tools.bench.table import Row, Target, table

ONE_ROUND = 1


@pytest.mark.parametrize("preset", ["attention", "attention-conv"])
def test_every_side_makes_a_step(preset):
    found = measure_step(miniature_case(preset), ONE_ROUND)
    assert not found["failed"]
    assert found["weights"] > 0
    for rounds in (found["passes"], found["whole"]):
        assert rounds.keys() == {"limit", "ours", "PEFT", "LyCORIS"}
        assert all(seconds > 0 for [seconds] in rounds.values())
    rows = bench.step_rows(miniature_case(preset), found)
    assert all(math.isfinite(row.spread.median) for row in rows)


def lazy(change):
    """A way to make our side that leaves something of the work out."""
    make = sides.ours

    def side(*arguments):
        made = make(*arguments)
        change(made)
        return made

    return side


def learns_nothing(side):
    side.learn = lambda: None


def trains_half(side):
    side.learning = side.learning[::2]


def starts_elsewhere(side):
    for weight in side.learning:
        torch.nn.init.normal_(weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [(learns_nothing, "not moved"), (trains_half, "weights"), (starts_elsewhere, "begins at")],
)
def test_a_side_that_does_not_do_the_work_is_noticed(change, said, monkeypatch):
    monkeypatch.setitem(sides.SIDES, "ours", lazy(change))
    with pytest.raises(BenchError, match=said):
        measure_step(miniature_case(), ONE_ROUND)


def test_sides_share_the_frozen_weights_and_nothing_else():
    unet = torch.nn.Sequential(torch.nn.Linear(3, 3))
    twin = sides.twin(unet)
    assert twin[0] is not unet[0] and twin[0].weight is not unet[0].weight
    assert twin[0].weight.data_ptr() == unet[0].weight.data_ptr()


def test_a_side_s_peak_memory_is_more_than_nothing():
    found = measure_peak(miniature_case(batch=32, latents_px=32), "ours")
    assert found["unet_mib"] > 0
    assert found["beyond_mib"] is None or found["beyond_mib"] > 10


def test_a_ratio_is_the_median_of_the_rounds_own_ratios():
    assert ratios([2, 30, 5], [1, 10, 5]) == Spread(2, 1, 3)
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(3, 2, 4)


def test_sides_take_turns_and_none_is_always_first():
    order = []
    take_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2, warm_up=0)
    assert order == ["a", "b", "b", "a"]


def test_a_row_says_whether_its_target_is_met():
    rows = [
        Row("step", "ours", Spread(1.04, 1, 1.1), target=Target(at_most=1.03)),
        Row("step", "theirs", Spread(1.01, 1, 1.1), target=Target(at_least=0.98, at_most=1.02)),
        Row("step", "on a GPU", None, target=Target(at_most=1.1), note="not measured"),
    ]
    assert [row.verdict for row in rows] == ["missed", "met", ""]
    assert "missed" in table(rows) and "not measured" in table(rows)


def test_every_cell_of_the_issue_has_its_target():
    assert [bench.step_target(case).at_most for case in cpu_cases()] == [1.03, 1.06, 1.10, 1.30]
    found = {(case.compile, case.preset): bench.step_target(case).at_most for case in gpu_cases()}
    assert set(found.values()) == {1.05, 1.10, 1.15}
    assert len(gpu_cases()) == len(gpu_cases(rehearse=True)) == 16


def test_its_file_can_be_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "bench.json"
    assert bench.main(["--only", "step-gpu", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert {row["part"] for row in found["rows"]} == {"step on a GPU"}
    assert "not measured: no GPU here" in capsys.readouterr().out


@pytest.mark.slow
def test_all_of_it_in_rehearsal(tmp_path):
    file = tmp_path / "bench.json"
    assert bench.main(["--rehearse", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["what"] for row in rows} >= {"ours / limit", "PEFT / limit", "LyCORIS / limit"}
    assert all(row["spread"] is None or math.isfinite(row["spread"]["median"]) for row in rows)
