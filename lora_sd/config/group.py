"""What every group of settings is made of."""

from typing import Any

from pydantic import BaseModel, ConfigDict


def as_list(value: Any) -> Any:
    """One value where several may stand."""
    return value if isinstance(value, list | tuple) else [value]


class Group(BaseModel):
    """A named group of settings."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)
