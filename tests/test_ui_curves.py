"""What metrics.jsonl tells of a run, and the curves drawn of it."""

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest

from lora_sd.run_folder import RunFolder
from lora_sd.ui import curves
from lora_sd.ui.curves import Drawn, loss_curve, rate_curve, small_curve, validation_curve
from lora_sd.ui.metrics import MOST_POINTS, Course, Validated, read_course


def line(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": loss, "lr": 1e-3, "images_per_s": 8.0, "seconds": step / 2} | more


def write(file: Path, lines: list[dict[str, Any]], mode: str = "a") -> None:
    with open(file, mode) as out:
        out.writelines(json.dumps(one) + "\n" for one in lines)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def polylines(html: str) -> list[tuple[str, str]]:
    return re.findall(r'<polyline class="([^"]*)" points="([^"]*)"', html)


def test_a_file_is_read_on(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_course(file) == Course()
    write(file, [line(1, 1.0), line(2, math.nan), {"note": "none"}])
    with open(file, "a") as out:
        out.write('no JSON\n[]\n{"step": 3, "lo')
    assert read_course(file).loss == [(1, 1.0)]
    with open(file, "a") as out:
        out.write('ss": 0.5}\n')
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    assert read_course(file).loss == [(1, 1.0), (3, 0.5)]
    assert read_course(file).step == 3 and len(parsed) == 1


def test_a_run_that_went_back_is_read_anew(file: Path) -> None:
    write(file, [line(n, 1.0) for n in range(1, 9)])
    assert read_course(file).step == 8
    write(file, [line(n, 1.0) for n in range(1, 5)], "w")
    assert read_course(file).step == 4
    # cut and written past where it had been before the next look
    write(file, [line(n, 1.0, seconds=n) for n in range(1, 20)], "w")
    course = read_course(file)
    assert course.step == 19 and len(course.loss) == 19
    file.unlink()
    assert read_course(file) == Course()


def test_the_speed_of_late_is_told_though_the_clock_began_anew(file: Path) -> None:
    write(file, [line(n, 1.0, seconds=100 + 9 * n) for n in range(1, 9)])
    write(file, [line(n, 1.0, seconds=2 * (n - 8)) for n in range(9, 12)])
    assert read_course(file).step_s == 2.0


def test_validation_and_gauge_are_the_last_measured(file: Path) -> None:
    validated = {"validation_loss": 0.2, "validation_base": 0.25, "validation_gain": 0.05}
    gauged = {"update_linear": 0.01, "update_blocks": {"mid": 0.02, "down 0": math.nan}}
    write(file, [line(1, 1.0), line(2, 1.0, **validated, **gauged), line(3, 1.0)])
    course = read_course(file)
    assert course.validated == Validated([(2, 0.2)], 0.25, 0.05, None)
    assert course.gauged and course.gauged.step == 2
    assert course.gauged.kinds == {"update_linear": 0.01} and course.gauged.blocks == {"mid": 0.02}


def test_groups_have_learning_rates_of_their_own(file: Path) -> None:
    write(file, [line(1, 1.0, rates={"linear": 1e-3, "text": 1e-4})])
    assert read_course(file).rates == {"linear": [(1, 1e-3)], "text": [(1, 1e-4)]}


def test_a_long_run_is_cheap_to_look_at(file: Path) -> None:
    losses = [2.0 + (n % 2) for n in range(20_000)]
    text = "".join(json.dumps(line(n + 1, loss)) + "\n" for n, loss in enumerate(losses))
    file.write_text(text)
    course = read_course(file)
    assert len(course.loss) <= MOST_POINTS and course.loss[-1][0] == course.step == 20_000
    assert course.steps_a_point == 64 and all(loss == 2.5 for _, loss in course.loss)
    began = time.process_time()
    for n in range(20):
        write(file, [line(20_001 + n, 1.0)])
        html = loss_curve([Drawn("run", read_course(file), 40_000)])
    assert (time.process_time() - began) / 20 < 0.02
    assert "at step 20,020" in html and len(html) < 25_000


def test_a_loss_curve_ends_at_the_last_step() -> None:
    html = loss_curve([Drawn("run", Course(3, [(1, 1.0), (3, 0.5)]), 6)])
    assert "at step 3" in html and 'class="end of-0" style="left:50.0%' in html
    assert [style for style, _ in polylines(html)] == ["raw of-0", "smooth of-0"]


def test_a_short_run_s_axis_ends_with_the_run() -> None:
    course = Course(9, [(n, 1 / n) for n in range(1, 10)])
    html = loss_curve([Drawn("run", course, 60)])
    assert html.count('class="tick-x"') == 4 and 'left:100.0%">60<' in html


def test_a_plot_without_lines_is_a_frame_of_the_same_make() -> None:
    for draw in (loss_curve, validation_curve, rate_curve):
        html = draw([Drawn("run", Course())])
        assert 'class="plot"' in html and "Nothing measured yet" in html
        assert not polylines(html)


def test_the_base_s_loss_is_a_level_line() -> None:
    validated = Validated([(10, 0.3), (20, 0.2)], base=0.4)
    html = validation_curve([Drawn("run", Course(20, validated=validated), 50)])
    (_, points), (level, base) = polylines(html)
    assert level == "level of-0" and base.startswith("0.0,") and " 100.0," in base
    heights = [float(point.partition(",")[2]) for point in f"{base} {points}".split()]
    assert heights[0] == heights[1] < heights[2] < heights[3]


def test_several_runs_are_lines_of_one_plot_with_their_names_escaped() -> None:
    runs = [Drawn(name, Course(9, [(1, 1.0), (9, 0.5)])) for name in ("<a>", "b")]
    html = loss_curve(runs)
    assert [style for style, _ in polylines(html)] == ["smooth of-0", "smooth of-1"]
    assert "&lt;a&gt;</span>" in html and "<a>" not in html


def test_rates_of_groups_are_lines_from_zero() -> None:
    rates = {"linear": [(1, 0.0), (50, 1e-3)], "text": [(1, 0.0), (50, 1e-4)]}
    html = rate_curve([Drawn("run", Course(50, rates=rates), 50)])
    lines = polylines(html)
    assert [style for style, _ in lines] == ["smooth of-0", "smooth of-1"]
    assert lines[0][1].startswith("2.0,100.0 100.0,")
    assert ">linear</span>" in html and ">0.0005<" in html


def test_a_small_curve_is_a_line_or_nothing() -> None:
    assert small_curve([]) == small_curve([(1, 0.5)]) == ""
    assert 'points="0.0,0.0 100.0,100.0"' in small_curve([(1, 1.0), (2, math.nan), (9, 0.5)])
    assert "polyline" in small_curve([(1, 1.0), (2, 1.0)])


@pytest.mark.parametrize("low, high", [(0.0, 1.08e-9), (0.1, 0.100001), (-3.0, 1e6), (5e5, 5e9)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = curves._ticks(low, high, 4)
    assert 1 < len(ticks) <= 6 and len(set(ticks)) == len(ticks)
    assert all(low <= tick <= high + 1e-12 for tick in ticks)


def test_the_trainer_s_own_lines_are_understood(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_metrics(line(1, 0.5, grad_norm=None))
    assert read_course(run.metrics_file).recent_loss == 0.5
