"""`Section`: what all tables of a TOML file have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table of a TOML file: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
