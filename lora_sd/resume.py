"""Put a run back where its newest whole checkpoint stands."""

import logging
from collections.abc import Collection, Iterable, Mapping

import torch

from lora_sd import changes, checkpoint, durable, inject
from lora_sd.changes import Change
from lora_sd.checkpoint import Checkpoint, Identity
from lora_sd.data.findings import counted
from lora_sd.errors import RunError, UserError, shown_list
from lora_sd.layers import LoRALayer
from lora_sd.learner import Stateful
from lora_sd.run_folder import RunFolder

log = logging.getLogger("lora_sd")
NEEDED = ("optimizer", "schedule")


def restore(
    run: RunFolder,
    identity: Identity,
    layers: Mapping[str, LoRALayer],
    stateful: Mapping[str, Stateful],
    device: torch.device,
    is_main: bool,
    *,
    allowed: Collection[str] = (),
    config_yaml: str = "",
) -> int:
    """Put the newest whole checkpoint of a run into place; the step it stands at.

    Only the main process changes anything in the folder, under the run's lock, and only when
    nothing stands against going on.

    Args:
        stateful: what has a state, by its name in the checkpoint; in the order in which they are
            loaded. What settings say of them is the present ones', not the saved ones'.
        allowed: names of what may have changed (`changes.check`).
        config_yaml: text of config.yaml, written where the settings have changed.

    Raises:
        RunError: no checkpoint can be used, or the run is no longer the same.
    """
    found, rejected = checkpoint.find_newest(run)
    step, counting = 0, []
    if found is None:
        _check_nothing_lost(run, identity)
    else:
        step, was = found.step, found.identity()
        differing = _changes(was, identity)
        counting = changes.check(run, differing, allowed)
        steps = identity.config["train"]["steps"]
        if step > steps:
            raise RunError(
                f"'{run.path}' stands at step {step} already, beyond the {steps} of 'train.steps'."
            )
        _load(found, layers, stateful, device, differing)
    if is_main:
        _tidy(run, rejected)
        # A run that is killed while it removes the oldest after its last save has no other chance.
        checkpoint.prune(run, identity.config["output"]["keep_checkpoints"])
        if found is None:
            log.info("Nothing was saved before the run stopped: it begins again.")
        else:
            _tell(found, differing, counting)
            changes.keep(run, step, counting)
        if config_yaml and run.config_file.read_text(encoding="utf-8") != config_yaml:
            durable.write_text(run.config_file, config_yaml)
        run.cut_metrics(step)
    return step


def is_finished(run: RunFolder, step: int, steps: int) -> bool:
    """Whether a run that stands at `step` of `steps` has told that its result is written."""
    status = run.read_status()
    return (
        step >= steps
        and status is not None
        and (status.state, status.step) == ("finished", step)
        and run.adapter_file.is_file()
    )


def _check_nothing_lost(run: RunFolder, identity: Identity) -> None:
    """Raises RunError where a run without checkpoints had some: it would be a new run."""
    if run.adapter_file.exists():
        raise RunError(
            f"'{run.path}' has its result but no checkpoints to go on from. It is left as it is; "
            f"start a new run."
        )
    last = max((record.get("step", 0) for record in run.read_metrics()), default=0)
    if last > identity.config["output"]["save_every_steps"]:
        raise RunError(
            f"'{run.path}' was at step {last}, and its checkpoints have gone from "
            f"'{run.checkpoints}'. Put them back, or start a new run."
        )


def _changes(was: Identity, now: Identity) -> list[Change]:
    """All that differs."""
    found = changes.of_settings(was.config, now.config)
    found += changes.of_pictures(was.pictures, now.pictures)
    found += changes.of_base(was.base, now.base)
    if was.step_pictures != now.step_pictures:
        found += changes.of_processes(_processes(was), _processes(now))
    return found


def _processes(identity: Identity) -> int:
    train = identity.config["train"]
    return int(identity.step_pictures // (train["batch_size"] * train["gradient_accumulation"]))


def _load(
    found: Checkpoint,
    layers: Mapping[str, LoRALayer],
    stateful: Mapping[str, Stateful],
    device: torch.device,
    differing: Iterable[Change],
) -> None:
    """Put weights and states into place.

    Raises:
        RunError: the checkpoint holds other states than are wanted, or they do not fit.
    """
    where = f"The checkpoint '{found.folder}'"
    told = "It is damaged, or of another version of lora_sd."
    try:
        state = found.state(device)
        missing, extra = stateful.keys() - state.keys(), state.keys() - stateful.keys()
        if (missing | extra) and (not list(differing) or (missing | extra) & set(NEEDED)):
            lacks = f"lacks the state of {shown_list(sorted(missing))}" if missing else ""
            holds = f"holds a state of {shown_list(sorted(extra))}, unknown here" if extra else ""
            raise RunError(f"{where} {' and '.join(filter(None, (lacks, holds)))}. {told}")
        shapes = {name: layer.weight.shape for name, layer in layers.items()}
        inject.load(layers, found.adapter(shapes))
        for name, one in stateful.items():
            if name in state:
                one.load_state_dict(state[name])
            else:
                log.info("The state of '%s' begins anew.", name)
    except UserError as error:
        if isinstance(error, RunError):
            raise
        raise RunError([f"{where} does not fit. {told}", *error.problems]) from None
    except Exception as error:  # whatever is made of a state that is not as expected
        raise RunError(f"{where} does not fit ({type(error).__name__}: {error}). {told}") from error


def _tidy(run: RunFolder, rejected: Iterable[checkpoint.Rejected]) -> None:
    """Remove what was left half written, and put damaged checkpoints aside."""
    if leftovers := checkpoint.clean(run):
        log.info("Removed %s of a killed process.", counted(leftovers, "unfinished file"))
    for one in rejected:
        log.warning("Note: %s", one)
        if place := checkpoint.set_aside(one):
            log.warning("Note: it is kept as '%s'; delete it when you like.", place.name)


def _tell(found: Checkpoint, differing: Iterable[Change], counting: Iterable[Change]) -> None:
    log.info("Going on from step %d.", found.step)
    for change in differing:
        how = "which is allowed" if change in counting else "which changes nothing that is learned"
        log.info("Changed: %s, %s.", change.said, how)
    was, now = found.manifest["versions"], checkpoint.versions()
    other = [
        f"{name} {was.get(name)} then and {version} now"
        for name, version in now.items()
        if was.get(name) != version
    ]
    if other:
        log.warning(
            "Note: it was saved by other versions (%s): the numbers may differ in their last "
            "digits from those of an uninterrupted run.",
            "; ".join(other),
        )
