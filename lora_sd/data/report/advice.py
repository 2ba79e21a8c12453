"""What the data report says in sentences, and what all captions have in common."""

import re
from collections import Counter
from collections.abc import Sequence
from statistics import median_low

from lora_sd.data.findings import counted
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.picture_set import LeftOut
from lora_sd.data.report.facts import CaptionFacts, CheckedPicture, TokenCounts
from lora_sd.errors import shown_list

MOST = 0.5  # of the pictures: more than that and it is the settings
MOST_TAGS = 200
FEW_PICTURES = 5
"""Fewer training pictures than that are worth a word; people train subjects on 10 to 30."""
FILLERS = {
    "a", "an", "and", "at", "by", "for", "from", "her", "his", "image", "in", "is", "it", "its",
    "my", "of", "on", "one", "our", "photo", "photograph", "picture", "some", "that", "the",
    "their", "this", "to", "with", "your",
}  # fmt: skip
"""Words that call nothing, though every caption may have them."""


def caption_facts(pictures: Sequence[CheckedPicture]) -> CaptionFacts:
    """What the training captions have in common, and not with those of regularisation."""
    captions = [one.caption for one in pictures if one.kind == "training"]
    tokens = [one.tokens for one in pictures if one.kind == "training"]
    tags: Counter[str] = Counter()
    for caption in captions:
        tags.update(_tags(caption))
    prior = [one.caption for one in pictures if one.kind == "regularisation"]
    same = [(text, n) for text, n in Counter(captions).most_common(MOST_TAGS) if n > 1 and text]
    return CaptionFacts(
        tokens=TokenCounts(min(tokens), median_low(tokens), max(tokens)) if tokens else None,
        tags=tuple(tags.most_common(MOST_TAGS)),
        tags_once=sum(count == 1 for count in tags.values()),
        on_every=tuple(_on_every(captions, prior)) if len(captions) > 1 else (),
        same=tuple(same),
        empty=sum(not caption for caption in captions),
    )


def _tags(caption: str) -> list[str]:
    """The different tags of a caption that commas part."""
    tags = [tag.strip() for tag in caption.split(",")]
    return list(dict.fromkeys(tag for tag in tags if tag)) if len(tags) > 1 else []


def _on_every(captions: Sequence[str], prior: Sequence[str]) -> list[str]:
    """The tags of every caption but not of prior ones, in the first one's order; where there are
    none, the words."""
    elsewhere = {part.lower() for caption in prior for part in _tags(caption) + _words(caption)}
    for parts in (_tags, _words):
        common = set(parts(captions[0])).intersection(*map(parts, captions[1:]))
        if own := [p for p in parts(captions[0]) if p in common and p.lower() not in elsewhere]:
            return own
    return []


def _words(caption: str) -> list[str]:
    words = re.findall(r"\w[\w'-]*", caption)
    return [word for word in dict.fromkeys(words) if word.lower() not in FILLERS]


def advice(
    pictures: Sequence[CheckedPicture],
    left_out: Sequence[LeftOut],
    without_caption: Sequence[str],
    facts: CaptionFacts,
    folders: Sequence[FolderOptions],
    max_tokens: int,
    bad: str,
) -> list[str]:
    """Sentences on what to do, the gravest first; always at least one. But for files, they are on
    what is learnt: the training pictures.

    Args:
        without_caption: as of `PictureSet`.
        bad: 'fail' or 'skip', what training does about files that cannot be used.
    """
    trained = [one for one in pictures if one.kind == "training"]
    prior = any(one.kind == "regularisation" for one in pictures)
    said = [
        *_on_files(left_out, bad),
        *without_caption,
        *_on_likeness(pictures),
        *_on_looks(trained),
        *_on_sizes(trained, folders),
        *_on_captions(trained, facts, max_tokens, prior),
    ]
    if 0 < len(trained) < FEW_PICTURES:
        said.append(
            f"{counted(len(trained))} to train on {_are(len(trained))} few: what is the same in "
            f"all of them, ground and light included, is learnt with the subject."
        )
    return said or ["Nothing stands out."]


def _on_files(left_out: Sequence[LeftOut], bad: str) -> list[str]:
    number = sum(not one.on_purpose for one in left_out)
    if not number:
        return []
    it, they = ("it", "it is") if number == 1 else ("them", "they are")
    rest = "or set data.bad_pictures to skip" if bad == "fail" else f"else {they} skipped"
    return [f"{counted(number, 'file')} cannot be used: mend or remove {it}, {rest}."]


def _on_likeness(pictures: Sequence[CheckedPicture]) -> list[str]:
    said = []
    if same := _marked(pictures, "same-file"):
        said.append(
            f"{_of(same, pictures)} {_are(len(same))} the same file as another: remove "
            f"{shown_list(same)}."
        )
    trained = [one for one in pictures if one.kind == "training"]
    twice = [
        one for one in trained if one.like is not None and pictures[one.like].kind == "training"
    ]
    if like := _marked(twice, "near-duplicate"):
        said.append(
            f"{_of(like, trained)} may be {_near(len(like))} of another, which is then "
            f"learnt more than the rest: keep one of each ({shown_list(like)} may go)."
        )
    return said


def _on_looks(pictures: Sequence[CheckedPicture]) -> list[str]:
    said = []
    if blurred := _marked(pictures, "blurred"):
        said.append(
            f"{_of(blurred, pictures)} may be blurred, and blur is learnt too: look at "
            f"{shown_list(blurred)}."
        )
    if borders := _marked(pictures, "borders"):
        said.append(
            f"{_of(borders, pictures)} may have borders, which are learnt too: cut them off "
            f"{shown_list(borders)}."
        )
    return said


def _on_sizes(pictures: Sequence[CheckedPicture], folders: Sequence[FolderOptions]) -> list[str]:
    said = []
    if small := _marked(pictures, "small"):
        sentence = f"{_of(small, pictures)} {_are(len(small))} smaller than the resolution wants"
        if len(small) > MOST * len(pictures):
            sentence += ": larger originals or a lower data.resolution_px would do them justice."
        else:
            sentence += f" and shown smaller, with less detail: {shown_list(small)}."
        said.append(sentence)
    if enlarged := _marked(pictures, "enlarged"):
        said.append(
            f"{_of(enlarged, pictures)} {_are(len(enlarged))} enlarged and may look soft: "
            f"{shown_list(enlarged)}. Larger originals help, or data.upscale off."
        )
    if cropped := _marked(pictures, "cropped"):
        longest = max(one.max_aspect_ratio for one in folders)
        said.append(
            f"{_of(cropped, pictures)} {'loses' if len(cropped) == 1 else 'lose'} much to the "
            f"crop: {shown_list(cropped)}. Cut to what matters, or raise "
            f"data.max_aspect_ratio, which is {longest:g}."
        )
    return said


def _on_captions(
    trained: Sequence[CheckedPicture], facts: CaptionFacts, max_tokens: int, prior: bool
) -> list[str]:
    said = []
    if cut := _marked(trained, "caption-cut"):
        longest = max(one.tokens for one in trained)
        enough = next((n for n in (150, 225) if n > max_tokens and n >= longest), None)
        hint = f", or set data.max_tokens to {enough}" if enough else ""
        said.append(
            f"{counted(len(cut), 'caption')} {'is' if len(cut) == 1 else 'are'} longer than "
            f"{max_tokens} tokens and {'loses its' if len(cut) == 1 else 'lose their'} end: "
            f"shorten {shown_list(cut)}{hint}."
        )
    if facts.empty:
        said.append(
            f"{counted(facts.empty)} {'has' if facts.empty == 1 else 'have'} an empty caption, and "
            f"{'is' if facts.empty == 1 else 'are'} learnt as what the base draws unasked."
        )
    if len(trained) < 2:
        return said
    alike = sum(n for _, n in facts.same)
    if facts.same and facts.same[0][1] == len(trained):
        said.append(
            f"All {len(trained)} pictures have the same caption, '{_short(facts.same[0][0])}': "
            f"what differs between them cannot be called for."
        )
    elif facts.same and alike > 2:
        text, count = facts.same[0]
        said.append(
            f"{alike} of {len(trained)} pictures share their caption with another, such as "
            f"'{_short(text)}' ({count} times): say what differs."
        )
    if facts.on_every:
        words = shown_list([_short(word) for word in facts.on_every])
        every = "Every training caption has" if prior else "Every caption has"
        said.append(f"{every} {words}: that may call the result in a prompt.")
    elif not facts.empty:
        none = "No word is in every caption"
        if prior:
            none = "No word is in every training caption and in no regularisation caption"
        said.append(
            f"{none}, so no word will call the result: data.trigger_word puts one in front of each."
        )
    return said


def _marked(pictures: Sequence[CheckedPicture], kind: str) -> list[str]:
    return [one.name for one in pictures if any(mark.kind == kind for mark in one.marks)]


def _of(names: Sequence[str], pictures: Sequence[CheckedPicture]) -> str:
    return f"{len(names)} of {counted(len(pictures))}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _near(number: int) -> str:
    return "a near-duplicate" if number == 1 else "near-duplicates"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57].rstrip()}..."
