"""What a picture's caption becomes each time it is shown: wildcards, tags, trigger word."""

import re
from collections.abc import Callable, Sequence
from random import Random

from lora_sd.data.folder_options import FolderOptions

SEPARATOR = "|||"  # as kohya's --keep_tokens_separator is usually set


def draw_caption(caption: str, options: FolderOptions, random: Random) -> str:
    """The caption as it is shown once; a function of its arguments and the state of `random`.

    In this order:

    1. With wildcards: one line of several, and one of each '{a|b}', which may be nested.
    2. Tags, which commas part: the first `keep_tags` stay. In a caption with '|||', what stands
       before the first one stays in front and what stands behind a second one at the end, whatever
       `keep_tags` says; the separators vanish. The other tags are dropped and shuffled.
    3. Prefix and suffix, each with a space.
    4. The trigger word in front, with a comma; not where the caption begins with it already or has
       it as a tag, in whatever case.
    """
    return _compose(caption, options, random)


def plain_caption(caption: str, options: FolderOptions) -> str:
    """The one of `draw_caption`'s captions in which nothing was drawn: the first line, the first of
    each choice, every tag in its place."""
    return _compose(caption, options, None)


def varies(caption: str, options: FolderOptions) -> bool:
    """Whether `draw_caption` may give something else than `plain_caption`."""
    sizes: list[int] = []

    def first(choices: Sequence[str]) -> str:
        sizes.append(len(choices))
        return choices[0]

    _, free, _ = _tags(_without_wildcards(caption, options, first), options)
    shuffled = options.shuffle_tags and len(set(free)) > 1
    return any(size > 1 for size in sizes) or shuffled or bool(free and options.tag_dropout)


def _compose(caption: str, options: FolderOptions, random: Random | None) -> str:
    text = _without_wildcards(caption, options, random.choice if random else lambda some: some[0])
    if SEPARATOR in text or options.shuffle_tags or options.tag_dropout:
        front, free, end = _tags(text, options)
        if random and options.tag_dropout:
            free = [tag for tag in free if random.random() >= options.tag_dropout]
        if random and options.shuffle_tags:
            random.shuffle(free)
        text = ", ".join(front + free + end)
    whole = " ".join(f"{options.caption_prefix} {text} {options.caption_suffix}".split())
    trigger = " ".join((options.trigger_word or "").split())
    if not trigger or _holds(text, trigger) or _begins_with(whole, trigger):
        return whole
    return f"{trigger}, {whole}" if whole else trigger


def _without_wildcards(
    caption: str, options: FolderOptions, choose: Callable[[Sequence[str]], str]
) -> str:
    """One line of the caption, with one of each choice."""
    if not options.wildcards:
        return " ".join(caption.split())
    lines = [line for line in caption.splitlines() if line.strip()]
    return " ".join(_choose(choose(lines or [""]), choose).split())


def _choose(text: str, choose: Callable[[Sequence[str]], str]) -> str:
    """'{a|{b|c}}' resolved from the inside out. A brace that has no partner stays as it is."""
    groups: list[list[str]] = [[""]]  # the choices of each open brace; the first is the text itself
    for part in re.split(r"([{}|])", text):
        if part == "{":
            groups.append([""])
        elif part == "}" and len(groups) > 1:
            chosen = choose(groups.pop())
            groups[-1][-1] += chosen
        elif part == "|" and len(groups) > 1:
            groups[-1].append("")
        else:
            groups[-1][-1] += part
    return "{".join("|".join(choices) for choices in groups)


def _tags(text: str, options: FolderOptions) -> tuple[list[str], list[str], list[str]]:
    """(those that stay in front, those that may move and go, those that stay at the end)."""
    if SEPARATOR in text:
        front, free, end = [*text.split(SEPARATOR, 2), ""][:3]
        return _split(front), _split(free), _split(end.replace(SEPARATOR, ","))
    tags = _split(text)
    return tags[: options.keep_tags], tags[options.keep_tags :], []


def _split(text: str) -> list[str]:
    return [tag.strip() for tag in text.split(",") if tag.strip()]


def _holds(text: str, trigger: str) -> bool:
    lowered = [tag.casefold() for tag in _split(text)]
    return trigger.casefold() in lowered or _begins_with(text, trigger)


def _begins_with(text: str, trigger: str) -> bool:
    """Whether the text's first word or words are the trigger."""
    return bool(re.match(rf"{re.escape(trigger)}(?!\w)", text, re.IGNORECASE))
