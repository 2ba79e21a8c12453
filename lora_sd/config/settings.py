"""All settings together: checked, read from YAML, written as YAML."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from lora_sd.config.adapter import AdapterGroup
from lora_sd.config.base import BaseGroup
from lora_sd.config.data import DataGroup, FolderGroup
from lora_sd.config.group import Group
from lora_sd.config.output import OutputGroup, SampleGroup
from lora_sd.config.training import (
    NEEDS_NO_SCHEDULE,
    MemoryGroup,
    ObjectiveGroup,
    OptimizerGroup,
    TrainGroup,
)
from lora_sd.errors import ConfigError, nearest


class Config(BaseSettings):
    """All settings of a run."""

    model_config = SettingsConfigDict(extra="forbid", validate_default=True)

    base: BaseGroup = Field(BaseGroup(), description="the model to adapt")
    data: DataGroup = Field(DataGroup(), description="the training pictures")
    adapter: AdapterGroup = Field(AdapterGroup(), description="what is trained")
    train: TrainGroup = Field(TrainGroup(), description="the run: how long, in what batches")
    optimizer: OptimizerGroup = Field(OptimizerGroup(), description="how fast it learns")
    objective: ObjectiveGroup = Field(ObjectiveGroup(), description="what counts as an error")
    memory: MemoryGroup = Field(MemoryGroup(), description="what fits a small card")
    sample: SampleGroup = Field(SampleGroup(), description="pictures drawn on the way")
    output: OutputGroup = Field(OutputGroup(), description="what is kept, and where")

    @model_validator(mode="after")
    def _groups_go_together(self) -> "Config":
        if self.train.ema_decay and self.optimizer.name in NEEDS_NO_SCHEDULE:
            raise ValueError(
                f"optimizer.name {self.optimizer.name} averages by itself: set train.ema_decay to 0"
            )
        if self.optimizer.max_weight_norm and self.adapter.init == "pissa":
            raise ValueError(
                "adapter.init pissa starts with a part of the base in the factors, which "
                "optimizer.max_weight_norm would scale away: turn one of them off"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: Any, *_: Any, **__: Any
    ) -> tuple[Any, ...]:
        return (init_settings,)  # no environment variables: a run is its file and its flags

    def to_yaml(self) -> str:
        """The whole configuration, defaults included, as YAML that `from_values` reads back."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True, width=100)


def config_from_values(values: dict[str, Any]) -> Config:
    """Check plain values (from YAML, flags or the app's form).

    Raises:
        ConfigError: all problems at once, each naming the setting.
    """
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError([_sentence(detail) for detail in error.errors()]) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a YAML file, unchecked.

    Raises:
        ConfigError: no such file, or not a mapping of settings.
    """
    if path.suffix.lower() == ".toml":
        raise ConfigError(
            f"'{path}' is TOML, as kohya's tools read it; settings here are YAML. README shows "
            f"them side by side under 'From kohya's tools'."
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _OnceOnly)
    except FileNotFoundError:
        near = sorted(str(found) for found in path.parent.glob("*.yaml"))
        hint = f" That folder holds {', '.join(near)}." if near else ""
        raise ConfigError(f"There is no config file '{path}'.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read as text: {error}.") from None
    except yaml.YAMLError as error:
        where = str(getattr(error, "problem_mark", "")).strip()
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"'{path}' is not valid YAML: {reason} {where}".rstrip()) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"'{path}' cannot be read as settings: {error}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"'{path}' must hold groups of settings such as 'train:', not a list.")
    strange = [key for key in values if not isinstance(key, str) or key.startswith("_")]
    if strange:
        raise ConfigError([f"'{path}': there is no setting '{key}'." for key in strange])
    return values


class _OnceOnly(yaml.SafeLoader):
    """YAML as `safe_load` reads it, but a key given twice is an error, not a loss."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                problem = f"'{key}' is given twice,"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def settings() -> Iterator[tuple[str, FieldInfo]]:
    """('train.steps', its field) for every setting, in the order they are declared."""
    for group, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Group)
        for name, inner in field.annotation.model_fields.items():
            yield f"{group}.{name}", inner


def setting_names() -> list[str]:
    """Every setting's dotted name."""
    return [name for name, _ in settings()]


def _sentence(detail: ErrorDetails) -> str:
    """One pydantic error as a sentence that names the setting as a user writes it."""
    name = ".".join(str(part) for part in detail["loc"])
    where, known = "", setting_names() if "." in name else list(Config.model_fields)
    if in_list := re.fullmatch(r"data\.folders\.(\d+)(?:\.(.+))?", name):
        folder = f"folder {int(in_list[1]) + 1}"
        where = f" of {folder} in 'data.folders'" if in_list[2] else " in 'data.folders'"
        name, known = in_list[2] or folder, list(FolderGroup.model_fields)
    if detail["type"] == "extra_forbidden":
        return f"There is no setting '{name}'{where}.{hint(name, known)}"
    if detail["type"] in ("model_type", "model_attributes_type"):
        return f"'{name}'{where} is {detail['input']!r}: write settings, as in {{folder: more/}}."
    message = detail["msg"].removeprefix("Value error, ")
    if not name:  # groups that do not go together
        return f"{message}."
    if isinstance(detail["input"], dict):  # settings that do not go together
        return f"'{name}'{where}: {message}."
    return f"'{name}'{where} is {detail['input']!r}: {message[:1].lower()}{message[1:]}."


def hint(unknown: str, known: Sequence[str]) -> str:
    """What to say of a setting that does not exist."""
    group, _, name = unknown.removeprefix("--").partition(".")
    if group == "data" and name in FolderGroup.model_fields:
        return f" Each of 'data.folders' has a '{name}' of its own."
    return nearest(unknown, known)
