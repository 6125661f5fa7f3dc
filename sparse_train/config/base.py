"""The base class of the config's sections, and types that several of them use.

Sections are frozen, and closed: an unknown key is a mistake. The text below a key is its documentation.
"""

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Precision = Literal["fp32", "bf16"]


def _absolute(path: str) -> str:
    """Absolute where it exists, since a run may be resumed and inspected from other working directories."""
    expanded = os.path.expanduser(path)
    return os.path.abspath(expanded) if os.path.exists(expanded) else path


Location = Annotated[str, AfterValidator(_absolute)]
"""A file or folder where one of that name exists, else a name on the hub."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def in_present_names(cls, data: dict[str, Any]) -> dict[str, Any]:
        """What an older release wrote, under the keys and values of this one."""
        return data
