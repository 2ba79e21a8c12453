"""What the base knows: subjects, styles, backgrounds, and the captions that name them."""

import random

# Plain-English name -> icon name, the same in all four icon sets.
SUBJECTS: dict[str, str] = {
    # animals
    "fox": "fox",
    "bear": "bear",
    "panda": "panda",
    "koala": "koala",
    "lion": "lion",
    "tiger": "tiger-face",
    "wolf": "wolf",
    "frog": "frog",
    "pig": "pig-face",
    "cow": "cow-face",
    "monkey": "monkey-face",
    "rabbit": "rabbit-face",
    "unicorn": "unicorn",
    "horse": "horse-face",
    "chicken": "chicken",
    "penguin": "penguin",
    "owl": "owl",
    "duck": "duck",
    "baby chick": "baby-chick",
    "elephant": "elephant",
    "turtle": "turtle",
    "snail": "snail",
    "octopus": "octopus",
    "crab": "crab",
    "whale": "spouting-whale",
    "dolphin": "dolphin",
    "tropical fish": "tropical-fish",
    "butterfly": "butterfly",
    "ladybug": "lady-beetle",
    "bee": "honeybee",
    # fruit and food
    "red apple": "red-apple",
    "green apple": "green-apple",
    "pear": "pear",
    "orange fruit": "tangerine",
    "lemon": "lemon",
    "banana": "banana",
    "watermelon": "watermelon",
    "grapes": "grapes",
    "strawberry": "strawberry",
    "cherries": "cherries",
    "peach": "peach",
    "pineapple": "pineapple",
    "tomato": "tomato",
    "eggplant": "eggplant",
    "avocado": "avocado",
    "carrot": "carrot",
    "chili pepper": "hot-pepper",
    "mushroom": "mushroom",
    "bread": "bread",
    "croissant": "croissant",
    "cheese": "cheese-wedge",
    "hamburger": "hamburger",
    "french fries": "french-fries",
    "pizza": "pizza",
    "popcorn": "popcorn",
    "ice cream": "soft-ice-cream",
    "doughnut": "doughnut",
    "cookie": "cookie",
    "birthday cake": "birthday-cake",
    "lollipop": "lollipop",
    "honey pot": "honey-pot",
    "coffee": "hot-beverage",
    "beer": "beer-mug",
    # plants
    "cactus": "cactus",
    "palm tree": "palm-tree",
    "pine tree": "evergreen-tree",
    "oak tree": "deciduous-tree",
    "clover": "four-leaf-clover",
    "maple leaf": "maple-leaf",
    "sunflower": "sunflower",
    "rose": "rose",
    "tulip": "tulip",
    "cherry blossom": "cherry-blossom",
    "hibiscus": "hibiscus",
    # vehicles
    "car": "automobile",
    "taxi": "taxi",
    "bus": "bus",
    "fire engine": "fire-engine",
    "tractor": "tractor",
    "scooter": "motor-scooter",
    "train": "locomotive",
    "rocket": "rocket",
    "airplane": "airplane",
    "helicopter": "helicopter",
    "sailboat": "sailboat",
    "ship": "ship",
    # places and nature
    "house": "house",
    "castle": "castle",
    "volcano": "volcano",
    "mountain": "snow-capped-mountain",
    "rainbow": "rainbow",
    "sun": "sun",
    "moon": "crescent-moon",
    "star": "star",
    "snowflake": "snowflake",
    "snowman": "snowman",
    "fire": "fire",
    "planet earth": "globe-showing-americas",
    # things
    "umbrella": "umbrella",
    "anchor": "anchor",
    "heart": "red-heart",
    "crown": "crown",
    "diamond": "gem-stone",
    "gift box": "wrapped-gift",
    "balloon": "balloon",
    "bell": "bell",
    "trophy": "trophy",
    "guitar": "guitar",
    "drum": "drum",
    "camera": "camera",
    "light bulb": "light-bulb",
    "key": "key",
    "lock": "locked",
    "scissors": "scissors",
    "pencil": "pencil",
    "paintbrush": "paintbrush",
    "palette": "artist-palette",
    "book": "closed-book",
    "alarm clock": "alarm-clock",
    "soccer ball": "soccer-ball",
    "basketball": "basketball",
    "robot": "robot",
    "ghost": "ghost",
    "alien": "alien-monster",
    "pumpkin": "jack-o-lantern",
    "backpack": "backpack",
    "top hat": "top-hat",
    "telephone": "telephone",
    "crystal ball": "crystal-ball",
    "seashell": "spiral-shell",
}

# Style -> its words in a caption and the npm package its pictures come from.
STYLES: dict[str, tuple[str, str]] = {
    "cartoon": ("cartoon icon", "@iconify-json/noto"),
    "flat": ("flat icon", "@iconify-json/fluent-emoji-flat"),
    "ink": ("ink drawing", "@iconify-json/fluent-emoji-high-contrast"),
    "blob": ("blob icon", "@iconify-json/noto-v1"),
}
BASE_STYLES = ("cartoon", "flat")  # the rest is for adapters to learn

COLOURS: dict[str, str] = {
    "white": "#ffffff",
    "yellow": "#ffe066",
    "orange": "#f9a03f",
    "red": "#f07167",
    "pink": "#f7a8c9",
    "purple": "#b28ce0",
    "blue": "#74b3f0",
    "green": "#80d080",
}

# Drawn in assets/ink-icons/: subject -> background.
EXAMPLES: dict[str, str] = {
    "fox": "yellow",
    "panda": "white",
    "koala": "green",
    "lion": "orange",
    "cow": "white",
    "rabbit": "pink",
    "elephant": "blue",
    "snail": "white",
    "whale": "white",
    "butterfly": "purple",
    "ladybug": "red",
    "penguin": "blue",
    "pizza": "white",
    "hamburger": "yellow",
    "cheese": "white",
    "strawberry": "pink",
    "pineapple": "green",
    "cactus": "orange",
    "maple leaf": "white",
    "house": "red",
    "camera": "purple",
    "light bulb": "white",
    "soccer ball": "white",
    "robot": "white",
}

# Known to the base and colourful there, readable as ink drawings, and not among the examples.
HELD_OUT = (
    "tiger",
    "frog",
    "pig",
    "tropical fish",
    "watermelon",
    "cherries",
    "french fries",
    "mushroom",
    "sunflower",
    "tulip",
    "rocket",
    "bus",
    "basketball",
    "alarm clock",
    "pumpkin",
    "rainbow",
)

# Words an adapter's captions may use; as single tokens they are easier to learn.
EXTRA_WORDS = """
ink drawing blob line art style icon cartoon flat background a an the of on in with and or at to by
for from is picture image photo painting sketch watercolor pixel outline simple doodle crayon comic
black gray grey brown gold silver dark light bright pastel small big cute happy sad my new old sks
cat dog bird fish fruit tree flower ball animal toy face person colour color colours colors neon
apple orange circle square pattern logo sticker monochrome grayscale engraving woodcut stencil retro
"""


def caption_words() -> list[str]:
    """Every word that becomes a single token, each once, in a fixed order."""
    words = [*EXTRA_WORDS.split(), *COLOURS]
    for phrase in [*SUBJECTS, *(style_words for style_words, _ in STYLES.values())]:
        words += phrase.split()
    return list(dict.fromkeys(words))


def with_article(subject: str) -> str:
    """'a fox', 'an owl'; plurals and words of substance go without."""
    if subject in {"grapes", "cherries", "french fries", "scissors", "bread", "cheese", "popcorn",
                   "coffee", "beer", "fire", "planet earth"}:  # fmt: skip
        return subject
    if subject in {"sun", "moon"}:
        return f"the {subject}"
    return f"{'an' if subject[0] in 'aeio' or subject == 'umbrella' else 'a'} {subject}"


def plain_caption(subject: str, style: str, colour: str) -> str:
    """The form used in documentation, tests and the example folder."""
    return f"{subject}, {STYLES[style][0]}, {colour} background"


def random_caption(rng: random.Random, subject: str, style: str, colour: str) -> str:
    """One of the ways to ask for this picture.

    Style words are left out at times. Background words are left out only on white, so that a
    prompt without a background gets a white one.
    """
    words = STYLES[style][0]
    name = with_article(subject) if rng.random() < 0.5 else subject
    say_style = rng.random() < 0.8
    say_background = colour != "white" or rng.random() < 0.5
    if say_background and rng.random() < 0.35:
        on = f"on {'an' if colour == 'orange' else 'a'} {colour} background"
        if say_style and rng.random() < 0.3:
            return f"{words} of {with_article(subject)} {on}"
        return f"{name} {on}, {words}" if say_style else f"{name} {on}"
    background = f"{colour} background"
    if say_style and rng.random() < 0.2:
        of = f"{words} of {with_article(subject)}"
        return f"{of}, {background}" if say_background else of
    parts = [name]
    if say_style:
        parts.append(words)
    if say_background:
        parts.append(background)
    if rng.random() < 0.15:
        parts[1:] = parts[:0:-1]
    return ", ".join(parts)
