"""What all sections of a config share: frozen, closed models; a key means what stands under it.

Closed means that an unknown key is a mistake.
"""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


def _absolute(path: str) -> str:
    """A run is looked at, and goes on, from other folders than the one it was begun in."""
    found = os.path.expanduser(path)
    return os.path.abspath(found) if os.path.exists(found) else path


Location = Annotated[str, AfterValidator(_absolute)]
"""Of a file or folder, where there is one of that name, else on the hub."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
