"""Find and check the pictures and captions of all folders, before anything else happens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageColor

from lora_sd.data.candidates import NO_CAPTION, Candidate, Found
from lora_sd.data.findings import Finding, counted, sentences
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.images import SUFFIXES, WHOLLY_TRANSPARENT
from lora_sd.data.listing import Listing, list_folder
from lora_sd.data.picture_set import LeftOut, Picture, PictureSet
from lora_sd.data.scan import Index, Job, Scanned, scan
from lora_sd.errors import DataError, shown_list

MASK_SHAPE_TOLERANCE = 0.01  # of width / height: masks drawn at another size are rounded


def read_folders(
    folders: Sequence[FolderOptions],
    bad: str = "fail",
    *,
    inspect: Callable[[Image.Image], Any] | None = None,
    on_picture: Callable[[int, int], bool] = lambda done, of: False,
    index: Path | None = None,
) -> PictureSet:
    """Read every picture and caption of some folders and of those inside them.

    Args:
        bad: what to do about files that cannot be used: 'fail', or 'skip', which leaves them out.
        inspect: called with each picture in RGB as `load_picture` gives it, in several threads.
        on_picture: called with (files looked at, files in all); when it returns True, the set
            holds only the pictures so far.
        index: a file in which what was found is remembered by content, so that the next time
            pictures need not be decoded, unless for `inspect`; it may be deleted.

    Raises:
        DataError: no folder, no picture that can be used, or with 'fail' anything that cannot be
            used: all at once.
    """
    fatal: list[str] = []
    found = Found()
    for options in folders:
        try:
            ImageColor.getcolor(options.background, "RGB")
        except ValueError:
            fatal.append(
                f"The background '{options.background}' is no colour. Name one, such as 'white', "
                f"or write '#rrggbb'."
            )
        try:
            listing = list_folder(options.folder)
        except DataError as error:
            if not (options.class_pictures and not options.folder.exists()):
                fatal += error.problems
            continue
        found.add(listing, options)
        if not listing.pictures and not options.class_pictures:
            fatal.append(_no_pictures(listing))
    if fatal:
        raise DataError(list(dict.fromkeys(fatal)) + sentences(found.problems))
    remembered = Index(index)
    try:
        scanned, stopped = _scanned(found.candidates, remembered, inspect, on_picture)
    finally:
        remembered.save()  # also of what was found before something stopped it
    return _assembled(found, scanned, bad, stopped, remembered.notice)


def _scanned(
    candidates: Sequence[Candidate],
    index: Index,
    inspect: Callable[[Image.Image], Any] | None,
    on_picture: Callable[[int, int], bool],
) -> tuple[dict[Path, Scanned], bool]:
    """(what each picture and mask holds, whether it was stopped)."""
    jobs = {}
    for one in candidates:
        jobs[one.file] = Job(one.file, one.options.background)
        if one.mask:
            jobs[one.mask] = Job(one.mask, is_mask=True)
    scanned: dict[Path, Scanned] = {}
    for file, result in zip(jobs, scan(list(jobs.values()), index, inspect), strict=False):
        scanned[file] = result
        if on_picture(len(scanned), len(jobs)):
            return scanned, len(scanned) < len(jobs)
    return scanned, False


def _assembled(
    found: Found, scanned: dict[Path, Scanned], bad: str, stopped: bool, index_notice: str
) -> PictureSet:
    pictures, inspected, opaque = [], {}, 0
    problems, oddities = list(found.problems), list(found.oddities)
    for one in found.candidates:
        holds = scanned.get(one.file)
        mask = scanned.get(one.mask) if one.mask else None
        if holds is None or (one.mask and mask is None):
            continue  # stopped before it
        wrong = [p for p in one.problems if holds.facts or p.reason != NO_CAPTION]
        wrong += _wrong(one, holds, mask)
        problems += wrong
        if wrong or holds.facts is None:
            continue
        oddities += [Finding(one.file, notice) for notice in holds.facts.notices]
        pictures.append(
            Picture(
                file=one.file,
                name=one.name,
                sha256=holds.sha256,
                size_px=holds.facts.size_px,
                caption=one.caption,
                caption_source=one.caption_source,
                mask=one.mask,
                mask_sha256=mask.sha256 if mask else "",
                repeats=one.repeats,
                options=one.options,
            )
        )
        inspected[one.file] = holds.inspected
        opaque += one.options.masks == "alpha" and not holds.facts.has_alpha
    readable = [one for one in found.candidates if one.file in scanned and scanned[one.file].facts]
    without_caption = _without_caption(readable)
    told = without_caption + sentences([one for one in problems if one.reason != NO_CAPTION])
    if bad == "fail" and told and not stopped:
        raise DataError(told)
    if not pictures and found.candidates and not stopped:
        raise DataError(["No picture can be used.", *told])
    reasons: dict[Path, list[str]] = {}
    for finding in problems:
        reasons.setdefault(finding.file, []).append(finding.why)
    left_out = [LeftOut(file, " It ".join(why)) for file, why in reasons.items()]
    left_out += [LeftOut(one.file, one.why, on_purpose=True) for one in found.unused]
    notices = list(found.notices)
    if opaque:
        notices.append(f"Pictures that have no alpha channel and count wholly: {opaque}.")
    notices += (
        sentences(oddities) + _about_content(pictures) + ([index_notice] if index_notice else [])
    )
    return PictureSet(pictures, left_out, notices, inspected, without_caption)


def _wrong(one: Candidate, holds: Scanned, mask: Scanned | None) -> list[Finding]:
    """Why a picture cannot be used."""
    wrong = []
    if holds.problem:
        wrong.append(Finding(one.file, *holds.problem))
    elif one.options.masks == "alpha" and holds.facts and WHOLLY_TRANSPARENT in holds.facts.notices:
        wrong.append(Finding(one.file, "is wholly transparent: as a mask, nothing of it counts"))
    if one.mask and mask and mask.problem:
        reason, detail = mask.problem
        detail = f"{one.mask.name}: {detail}" if detail else one.mask.name
        wrong.append(Finding(one.file, f"has a mask that {reason}", detail))
    elif one.mask and mask and mask.facts and holds.facts:
        (width, height), (mask_width, mask_height) = holds.facts.size_px, mask.facts.size_px
        if abs(mask_width / mask_height / (width / height) - 1) > MASK_SHAPE_TOLERANCE:
            detail = f"{one.mask.name}: {mask_width} x {mask_height}, not {width} x {height}"
            wrong.append(Finding(one.file, "has a mask of another shape", detail))
    return wrong


def _without_caption(readable: Sequence[Candidate]) -> list[str]:
    """A sentence for each folder on the captions that are missing, and what to do."""
    told = []
    for options in dict.fromkeys(one.options for one in readable):
        inside = [one for one in readable if one.options == options]
        bare = [one for one in inside if any(p.reason == NO_CAPTION for p in one.problems)]
        if not bare:
            continue
        if options.kind == "regularisation":  # it does not take over that of data
            setting = "give that folder a 'caption' in data.folders, which may be empty"
        else:
            setting = "set data.caption, which may be empty, or data.caption_fallback"
        file = bare[0].file
        told.append(
            f"{len(bare)} of {counted(len(inside))} in '{options.folder}' "
            f"{'has' if len(bare) == 1 else 'have'} no caption: "
            f"{shown_list([one.name for one in bare])}. Add {file.stem}.txt beside {file.name}, "
            f"let `python -m lora_sd caption` write them, or {setting}."
        )
    return told


def _no_pictures(listing: Listing) -> str:
    others = len(listing.others) + sum(map(len, listing.captions.values()))
    found = f"It holds {counted(others, 'other file')}." if others else "It is empty."
    if listing.notices or listing.problems:
        found += " " + " ".join(sentences(listing.problems + listing.notices, most=3))
    kinds = ", ".join(sorted(SUFFIXES))
    return f"The image folder '{listing.folder}' holds no pictures ({kinds}). {found}"


def _about_content(pictures: Sequence[Picture]) -> list[str]:
    """What only a look at all pictures together shows."""
    notices = []
    same: dict[str, list[Picture]] = {}
    for one in pictures:
        same.setdefault(one.sha256, []).append(one)
    twice = [group for group in same.values() if len(group) > 1]
    for what, groups in (
        ("Pictures whose content is there more than once", twice),
        ("Pictures that are for training and for something else", [g for g in twice if _mixed(g)]),
    ):
        if groups:
            names = [f"{g[0].name} = {g[1].name}" + " = ..." * (len(g) > 2) for g in groups]
            notices.append(f"{what}: {len(groups)} ({shown_list(names)}).")
    training = [one for one in pictures if one.options.kind == "training"]
    alike = {one.caption for one in training}
    if len(training) > 1 and len(alike) == 1 and alike != {""}:
        notices.append(
            f"All {len(training)} training pictures have the same caption: "
            f"'{training[0].caption[:60]}'."
        )
    return notices


def _mixed(group: Sequence[Picture]) -> bool:
    kinds = {one.options.kind for one in group}
    return "training" in kinds and len(kinds) > 1
