"""What may change when a run goes on, and what was allowed to.

A run that goes on is the same run. A change is an error that names it, unless it is allowed by
name, cannot change what is learned (FREE), or cannot be taken over at all (`_fixed`). What was
allowed stays so: it is kept in the run's changes.json, with what it was before.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lora_sd import durable
from lora_sd.errors import RunError, shown_list
from lora_sd.run_folder import RunFolder

Settings = Mapping[str, Mapping[str, Any]]

FREE = (
    "base.model", "data.folder",  # by what is in them, and not by where they lie
    "data.bad_pictures", "data.cache", "data.cache_folder",
    "train.keep_best",
    "memory.gradient_checkpointing", "memory.idle_parts", "memory.on_out_of_memory",
    "sample.",
    "output.save_every_steps", "output.on_full_disk", "output.keep_checkpoints",
    "output.tensorboard", "output.wandb", "output.dtype", "output.format",
)  # fmt: skip
"""Settings that do not change what is learned, and groups of them: they may change freely."""
DROPOUTS = ("adapter.dropout", "adapter.rank_dropout", "adapter.module_dropout")
MOST_SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Change:
    """Of one setting, or of 'data', 'base' or 'processes'; `said` is a clause on it."""

    name: str
    was: Any
    now: Any
    said: str

    @property
    def is_free(self) -> bool:
        """Whether it cannot change what is learned."""
        return any(
            self.name.startswith(free) if free.endswith(".") else self.name == free for free in FREE
        )


def of_settings(was: Settings, now: Settings) -> list[Change]:
    """What differs of the settings that were there; one that has come since had no effect."""
    changes = []
    for group, settings in was.items():
        for setting, value in settings.items():
            after = now.get(group, {}).get(setting)
            if _plain(after) != _plain(value):
                name = f"{group}.{setting}"
                said = f"'{name}' was {_shown(value)} and is now {_shown(after)}"
                changes.append(Change(name, value, after, said))
    return changes


def of_pictures(was: Mapping[str, str], now: Mapping[str, str]) -> list[Change]:
    """What differs of the pictures, given their fingerprints by name, in order."""
    if list(was.items()) == list(now.items()):
        return []
    found = {
        "added": [name for name in now if name not in was],
        "removed": [name for name in was if name not in now],
        "changed, or their captions, masks or repeats have": [
            name for name in now if name in was and now[name] != was[name]
        ],
    }
    said = [f"{shown_list(names, 3)} were {what}" for what, names in found.items() if names]
    if not said:
        said = ["they come in another order"]
    text = f"the pictures or captions have changed ({'; '.join(said)})"
    return [Change("data", digest(was), digest(now), text)]


def of_base(was: str, now: str) -> list[Change]:
    """What differs of the base model's fingerprint."""
    return [] if was == now else [Change("base", was, now, "the base model has changed")]


def of_processes(was: int, now: int) -> list[Change]:
    """What differs of how many processes share a step."""
    said = f"{was} processes shared a step and now {now} do"
    return [] if was == now else [Change("processes", was, now, said)]


def check(run: RunFolder, changes: Iterable[Change], allowed: Collection[str]) -> list[Change]:
    """Judge what has changed; the changes that count and are allowed.

    Args:
        allowed: names of changes.

    Raises:
        RunError: naming every change that is not allowed, or cannot be.
    """
    changes = [change for change in changes if not change.is_free]
    fixed = [change for change in changes if _fixed(change)]
    before = {(one.get("name"), _key(one.get("was")), _key(one.get("now"))) for one in read(run)}
    refused = [
        change
        for change in changes
        if change not in fixed
        and change.name not in allowed
        and (change.name, _key(change.was), _key(change.now)) not in before
    ]
    problems = [
        f"'{run.path}' cannot go on: {change.said}. {_fixed(change)} Put it back, or start a new "
        f"run."
        for change in fixed
    ]
    if refused:
        names = ",".join(dict.fromkeys(change.name for change in refused))
        problems.append(
            f"'{run.path}' is not the same run any more: "
            f"{'; '.join(change.said for change in refused)}. Put that back, or go on all the same "
            f"with --allow-change {names}."
        )
    if problems:
        raise RunError(problems)
    return changes


def keep(run: RunFolder, step: int, changes: Iterable[Change]) -> None:
    """Note changes that were allowed at a step. Only under the run's lock.

    Raises:
        UserError: the note cannot be written.
    """
    known = read(run)
    new = [{"at_step": step, **asdict(change)} for change in changes]
    new = [one for one in new if not any(_same(one, other) for other in known)]
    if new:
        durable.write_text(run.changes_file, json.dumps([*known, *new], indent=1))


def read(run: RunFolder) -> list[dict[str, Any]]:
    """The changes that were allowed so far; none where the note cannot be understood."""
    try:
        found = json.loads(run.changes_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def digest(fingerprints: Mapping[str, str]) -> str:
    """One fingerprint of many, in order."""
    return durable.sha256_bytes(json.dumps(list(fingerprints.items())).encode())


def _fixed(change: Change) -> str:
    """Why it cannot be allowed; '' where it can."""
    name = change.name
    if name.startswith("adapter.") and name not in DROPOUTS:
        return "What was saved are the weights of the adapter as it was."
    if name == "memory.adapter_dtype":
        return "What was saved are the optimizer's states of that precision."
    if name == "optimizer.name":
        return "What was saved are the states of the optimizer as it was."
    if name == "optimizer.block_learning_rates" or (
        (name == "optimizer.conv_learning_rate" and None in (change.was, change.now))
        or (name == "optimizer.lora_plus_ratio" and 1 in (change.was, change.now))
    ):
        return "It decides which weights learn together, and the optimizer's states are by that."
    if name == "train.ema_decay" and not (change.was and change.now):
        return "An average of the adapter is made from the first step on, or not at all."
    if name in ("output.name", "output.folder"):
        return "A run that goes on stays in its folder."
    return ""


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    return json.loads(json.dumps(value))


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(_key(one.get(name)) == _key(other.get(name)) for name in ("name", "was", "now"))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
