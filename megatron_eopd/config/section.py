"""What every section of the configuration is: frozen, strict, its docstrings its help."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _none_unsets(cls, value: Any, info: ValidationInfo) -> Any:
        """The word none unsets an option, except where it is one of the option's own values."""
        annotation = cls.model_fields[info.field_name].annotation
        return None if value == "none" and "none" not in words_of(annotation) else value


def words_of(annotation: Any) -> list[str]:
    """The values of every Literal in a type."""
    words = []
    for part in get_args(annotation):
        words += words_of(part) if get_args(part) else [part] if isinstance(part, str) else []
    return words
