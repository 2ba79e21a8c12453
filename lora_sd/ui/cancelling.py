"""Long work that an open page can cancel."""

from typing import Any


class Cancelling:
    """Which open pages have asked to stop what they began, by the hash of their session."""

    def __init__(self) -> None:
        self._cancelled: set[str] = set()

    def begin(self, page: str) -> None:
        """A page begins something: forget that it cancelled before."""
        self._cancelled.discard(page)

    def cancel(self, page: str) -> None:
        """Stop what the page began, at the next step of it."""
        self._cancelled.add(page)

    def is_cancelled(self, page: str) -> bool:
        """Whether that page asked to stop."""
        return page in self._cancelled


def page_of(request: Any) -> str:
    """The open page that an event (`gr.Request`) comes from: the hash of its session."""
    return str(request.session_hash)
