"""What the clients do with a file, in sentences for a person; clients that agree share one."""

from collections.abc import Iterable, Mapping

from torch import Size

from lora_sd.clients.report import ClientReport
from lora_sd.errors import shown_list
from lora_sd.formats import diffusers, kohya
from lora_sd.formats.reading import known_keys


def layer_of_keys(keys: Iterable[str], shapes: Mapping[str, Size]) -> dict[str, str]:
    """{key of a file: full layer name}; of a key that is no layer's, what the file calls it.

    Args:
        shapes: weight shape of each layer of the model.
    """
    known = known_keys(shapes)
    found = {key: kohya.split(key) or diffusers.split(key) or (key, "") for key in keys}
    return {key: known.get(layer, layer) for key, (layer, _) in found.items()}


def unused_layers(report: ClientReport, layer_of: Mapping[str, str]) -> list[str]:
    """The layers of which a client leaves something out; all of them when it refuses the file."""
    used = report.used
    return list(dict.fromkeys(layer_of[key] for key in report.keys if key not in used))


def sentences(
    reports: Iterable[ClientReport], layer_of: Mapping[str, str], most: int = 5
) -> list[str]:
    """What is not used, not loaded or read otherwise than meant, and where; none if all is well.

    Args:
        layer_of: {key: full layer name} of every key of the file.
        most: how many names a sentence shows.
    """
    titles: dict[str, list[str]] = {}
    for report in reports:
        for phrase in _phrases(report, layer_of, most):
            titles.setdefault(phrase, []).append(report.title)
    return [f"In {joined(found)} {phrase}." for phrase, found in titles.items()]


def _phrases(report: ClientReport, layer_of: Mapping[str, str], most: int) -> list[str]:
    if report.keys and not report.matched:
        return ["nothing of the file is read"]
    if report.fatal:
        return [f"the whole file is refused: {_first(report.fatal)}"]
    phrases = []
    unused, total = unused_layers(report, layer_of), len(set(layer_of.values()))
    touched = {layer_of[key] for key in report.used}
    for how, names in (
        ("ignored", [name for name in unused if name not in touched]),
        ("read in part", [name for name in unused if name in touched]),
    ):
        if names:
            verb = "is" if len(names) == 1 else "are"
            lost = {key.rpartition(".")[2] for key in report.keys if key not in report.used}
            without = ", without DoRA's norms" if lost == {"dora_scale"} else ""
            phrases.append(
                f"all {total} layers are {how}{without}"
                if len(names) == total
                else f"{len(names)} of {total} layers {verb} {how}{without}: "
                f"{shown_list(names, most)}"
            )
    if report.shape_errors:
        phrases.append(f"the shape is wrong: {_first(report.shape_errors)}")
    if report.warnings:
        phrases.append(f"the file is read otherwise than meant: {_first(report.warnings)}")
    return phrases


def _first(problems: list[str]) -> str:
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def joined(words: list[str]) -> str:
    """'a, b and c'."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
