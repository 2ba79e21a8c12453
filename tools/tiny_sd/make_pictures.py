"""Write the example image folder and the reference sheets of `assets/`.

python -m tools.tiny_sd.make_pictures
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from tools.tiny_sd.render import (
    SIZE_PX,
    fetch_icons,
    icon_svg,
    load_icons,
    on_background,
    render_sprites,
    sprite,
)
from tools.tiny_sd.subjects import COLOURS, EXAMPLES, HELD_OUT, STYLES, SUBJECTS, plain_caption

EXAMPLE_PX = 128
COLUMNS = 13


def write_examples(icons_dir: Path, folder: Path) -> None:
    """Ink drawings with their captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    icons = load_icons(icons_dir, "ink")
    for subject, colour in EXAMPLES.items():
        figure = sprite(icon_svg(icons, SUBJECTS[subject]), EXAMPLE_PX)
        name = subject.replace(" ", "_")
        on_background(figure, colour).save(folder / f"{name}.png", optimize=True)
        caption = plain_caption(subject, "ink", colour)
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


def six_bits(image: Image.Image) -> Image.Image:
    """Round every channel to 64 levels (an error of 2/255 at most), which saves a third of a PNG,
    and blank what is fully transparent."""
    levels = [round(round(value * 63 / 255) * 255 / 63) for value in range(256)]
    rounded = image.point(levels * 4)
    blank = Image.new("RGBA", image.size)
    return Image.composite(rounded, blank, rounded.getchannel("A").point(lambda a: 255 * (a > 0)))


def write_reference(icons_dir: Path, folder: Path) -> None:
    """One RGBA sheet a style, and an index of what is where."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = -(-len(SUBJECTS) // COLUMNS)
    for style in STYLES:
        sheet = Image.new("RGBA", (COLUMNS * SIZE_PX, rows * SIZE_PX))
        for i, figure in enumerate(render_sprites(icons_dir, style)):
            sheet.paste(figure, (i % COLUMNS * SIZE_PX, i // COLUMNS * SIZE_PX))
        six_bits(sheet).save(folder / f"{style}.png", optimize=True)
    index = {
        "size_px": SIZE_PX,
        "columns": COLUMNS,
        "styles": {style: words for style, (words, _) in STYLES.items()},
        "colours": COLOURS,
        "subjects": list(SUBJECTS),
        "example_subjects": list(EXAMPLES),
        "held_out_subjects": list(HELD_OUT),
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("outputs/tiny-sd-build"))
    parser.add_argument("--icons", type=Path, help="folder with the unpacked npm packages")
    parser.add_argument("--out", type=Path, default=Path("assets"))
    args = parser.parse_args()
    icons_dir = args.icons or args.work / "icons"
    fetch_icons(icons_dir)
    write_examples(icons_dir, args.out / "ink-icons")
    write_reference(icons_dir, args.out / "reference")


if __name__ == "__main__":
    main()
