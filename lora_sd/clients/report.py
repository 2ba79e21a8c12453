"""What one client would do with an adapter file."""

from dataclasses import dataclass, field

from lora_sd.clients.outline import Outline

TITLES = {
    "comfy": "ComfyUI",
    "forge": "Forge",
    "a1111": "A1111",
    "invoke": "InvokeAI",
    "diffusers": "diffusers",
    "kohya": "kohya's tools",
    "lycoris": "LyCORIS",
}
"""The clients, and what people call them."""


@dataclass
class ClientReport:
    """What one client would do with a file. The rules of the client fill it.

    Attributes:
        client: a key of TITLES.
        keys: every key of the file, in its order.
        matched: keys that the client knows and reads.
        ignored: keys that match a layer and do nothing all the same -> why.
        shape_errors, fatal, warnings: sentences; `fatal` means that the whole file is refused,
            `warnings` that it loads, but not with the scale or the layers that were meant.
    """

    client: str
    keys: list[str]
    matched: set[str] = field(default_factory=set)
    ignored: dict[str, str] = field(default_factory=dict)
    shape_errors: list[str] = field(default_factory=list)
    fatal: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, client: str, outline: Outline) -> "ClientReport":
        return cls(client, list(outline.shapes))

    @property
    def title(self) -> str:
        return TITLES[self.client]

    @property
    def used(self) -> set[str]:
        """Keys that act on the model: none when the file is refused."""
        return set() if self.fatal else self.matched

    @property
    def unrecognised(self) -> list[str]:
        """Keys that match nothing there."""
        return [key for key in self.keys if key not in self.matched and key not in self.ignored]

    @property
    def ok(self) -> bool:
        """Whether every key acts, as it was meant."""
        found = self.ignored or self.shape_errors or self.fatal or self.warnings
        return not found and not self.unrecognised
