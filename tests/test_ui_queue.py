"""Runs that wait for their turn."""

import json
import threading
from collections.abc import Iterator

import pytest
from ui_fake_trainer import config, fake_trainer, trainers_of, wait_for  # noqa: F401

from lora_sd.errors import RunError
from lora_sd.run_folder import RunFolder
from lora_sd.ui import queue as queue_module
from lora_sd.ui.launch import Trainer
from lora_sd.ui.queue import QueueState, RunQueue, Submitted


@pytest.fixture
def queue(trainer: Trainer) -> RunQueue:
    """A queue that is looked after by the test alone."""
    return RunQueue(trainer)


@pytest.fixture
def looked_after(queue: RunQueue, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunQueue]:
    monkeypatch.setattr(queue_module, "LOOK_EVERY_S", 0.05)
    queue.start()
    yield queue
    queue.close()


def submit(queue: RunQueue, *names: str, **train: int) -> list[Submitted]:
    outputs = queue._trainer.outputs
    return [queue.submit(config(outputs, name, **train)) for name in names]


def waiting(queue: RunQueue) -> list[str]:
    return [one.run for one in queue.state().entries]


def ends(trainer: Trainer, run: str, state: str) -> bool:
    status = RunFolder(trainer.outputs / run).read_status()
    return status is not None and status.state == state and trainer.current() != run


def stopped(trainer: Trainer, run: str) -> None:
    """Stop a run, and wait for its end."""
    wait_for(lambda: RunFolder(trainer.outputs / run).metrics_file.exists())
    trainer.stop(run)
    wait_for(lambda: ends(trainer, run, "stopped") and not trainer.is_stopping(run))


def test_a_start_while_a_run_is_at_work_waits_and_says_so(queue: RunQueue) -> None:
    assert submit(queue, "a", "b", "c") == [
        Submitted("a"), Submitted("b", 1, behind="a"), Submitted("c", 2, behind="a"),
    ]  # fmt: skip
    assert waiting(queue) == ["b", "c"] and waiting(RunQueue(queue._trainer)) == ["b", "c"]
    queue.look()
    assert waiting(queue) == ["b", "c"]  # as long as it is at work


def test_one_after_the_other_is_trained_though_one_fails(
    trainer: Trainer, looked_after: RunQueue
) -> None:
    submit(looked_after, "a", steps=2)
    submit(looked_after, "fails", rank=77)
    submit(looked_after, "b", "c", steps=2)
    for run in ("a", "b", "c"):
        wait_for(lambda run=run: ends(trainer, run, "finished"))
    assert waiting(looked_after) == [] and trainer.ending("fails").code == 1
    started = [(trainer.outputs / ".app" / f"{run}.yaml").stat().st_mtime for run in "abc"]
    assert started == sorted(started)


def test_a_stop_holds_the_queue_until_it_is_told_to_go_on(
    trainer: Trainer, queue: RunQueue
) -> None:
    submit(queue, "a", "b", "c")
    stopped(trainer, "a")
    again = RunQueue(Trainer(trainer.outputs, trainer._command))  # also after the app's restart
    again.look()
    assert trainer.current() is None and queue.state().held_by == "a"
    again.look()
    assert trainer.current() is None
    again.go_on()
    again.look()
    assert trainer.current() == "b" and waiting(queue) == ["c"] and not queue.state().is_held


def test_a_stop_of_the_last_run_holds_nothing(trainer: Trainer, queue: RunQueue) -> None:
    submit(queue, "a")
    stopped(trainer, "a")
    queue.look()
    assert not queue.state().is_held and submit(queue, "b") == [Submitted("b")]


def test_going_on_with_the_stopped_run_lets_the_queue_go_on_after_it(
    trainer: Trainer, queue: RunQueue
) -> None:
    submit(queue, "a", "b")
    stopped(trainer, "a")
    queue.look()
    assert queue.resume("a") == Submitted("a") and not queue.state().is_held
    with pytest.raises(RunError, match="'a' is being trained"):
        queue.resume("a")


def test_a_run_goes_on_from_the_queue(trainer: Trainer, queue: RunQueue) -> None:
    submit(queue, "a")
    stopped(trainer, "a")
    submit(queue, "b", steps=2)
    assert queue.resume("a") == Submitted("a", 1, behind="b")
    with pytest.raises(RunError, match="'a' waits in the queue already"):
        queue.resume("a")
    with pytest.raises(RunError, match="There is no run 'z'"):
        queue.resume("z")
    wait_for(lambda: ends(trainer, "b", "finished"))
    queue.look()
    assert trainer.current() == "a" and waiting(queue) == []


def test_entries_are_moved_and_removed(queue: RunQueue) -> None:
    submit(queue, "a", "b", "c", "d")
    ids = {one.run: one.id for one in queue.state().entries}
    queue.move(ids["d"], -1)
    assert waiting(queue) == ["b", "d", "c"]
    queue.move(ids["b"], -1)  # the first stays the first
    queue.move(ids["c"], 1)
    assert waiting(queue) == ["b", "d", "c"]
    queue.move(ids["b"], 1)
    assert waiting(queue) == ["d", "b", "c"]
    queue.remove(ids["b"])
    queue.remove(ids["b"])  # by another page, a moment ago
    queue.move(ids["b"], 1)
    assert waiting(queue) == ["d", "c"]


def test_a_queue_that_a_person_holds_starts_nothing(trainer: Trainer, queue: RunQueue) -> None:
    submit(queue, "a", steps=2)
    queue.hold()
    submit(queue, "b")
    wait_for(lambda: ends(trainer, "a", "finished"))
    queue.look()
    assert trainer.current() is None and queue.state().held_by == ""
    assert submit(queue, "now", steps=2) == [Submitted("now")]  # a start by hand is a start
    wait_for(lambda: ends(trainer, "now", "finished"))
    queue.look()
    assert trainer.current() is None and waiting(queue) == ["b"]


def test_what_cannot_be_started_says_why_and_holds_nobody(
    trainer: Trainer, queue: RunQueue
) -> None:
    submit(queue, "a", "taken", "b", steps=2)
    (trainer.outputs / "taken").mkdir()  # meanwhile
    wait_for(lambda: ends(trainer, "a", "finished"))
    queue.look()
    assert trainer.current() == "b" and waiting(queue) == ["taken"]
    assert queue.state().entries[0].problem.startswith("There is a run 'taken' already.")


def test_names_are_those_of_runs_and_of_what_waits(queue: RunQueue) -> None:
    submit(queue, "a", "b")
    for taken, why in (("a", "There is a run 'a' already"), ("b", "'b' waits in the queue")):
        with pytest.raises(RunError, match=why):
            submit(queue, taken)
    assert [queue.free_name(wish) for wish in ("a", "b", "c")] == ["a-2", "b-2", "c"]


def test_the_queue_has_an_end(queue: RunQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "MOST_QUEUED", 2)
    submit(queue, "a", "b", "c")
    with pytest.raises(RunError, match="2 runs wait already"):
        submit(queue, "d")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"entries": [{"id": 3}], "held_by": null, "watched": ""}',
     '{"entries": [{"id": "1", "run": 3}], "held_by": null, "watched": ""}'],
)  # fmt: skip
def test_a_damaged_queue_is_empty(trainer: Trainer, queue: RunQueue, text: str) -> None:
    queue.hold()
    file = trainer.outputs / ".app" / "queue" / "queue.json"
    assert json.loads(file.read_text())["held_by"] == ""
    file.write_text(text)
    assert queue.state() == QueueState()


def test_twenty_starts_at_once_one_trains_and_the_others_wait_g13(
    trainer: Trainer, queue: RunQueue
) -> None:
    """From two apps, which both look after the queue."""
    queues = [queue, RunQueue(Trainer(trainer.outputs, trainer._command))]
    done: list[Submitted] = []

    def start(number: int) -> None:
        done.extend(submit(queues[number % 2], f"run-{number}"))
        queues[number % 2].look()

    threads = [threading.Thread(target=start, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.place for one in done) == list(range(20))
    assert len(waiting(queue)) == 19 and trainer.current() not in waiting(queue)


def test_memory_is_freed_before_each_start(trainer: Trainer, queue: RunQueue) -> None:
    freed: list[str | None] = []
    trainer.before_launch(lambda: freed.append(trainer.current()))
    submit(queue, "a", "b", steps=2)
    assert freed == [None]
    wait_for(lambda: ends(trainer, "a", "finished"))
    queue.look()
    assert freed == [None, None] and trainer.current() == "b"
