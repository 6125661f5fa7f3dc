"""Options: the settings that a pruning method or a task of another package declares as a section of its own."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from sparse_train.config.base import Section
from sparse_train.config.mistakes import describe
from sparse_train.errors import UserError


def read_options(schema: type[Section], options: Mapping[str, Any], key: str, owner: str) -> Section:
    """`options` as a `schema`. Raises UserError for a key or value that it does not have.

    `key` is where they stand, such as prune.options; `owner` is what has chosen the schema, such as prune.method=wanda.
    """
    if options and not schema.model_fields:
        raise UserError(f"{key}: {owner} has no options of its own; leave it out")
    try:
        return schema.model_validate(options, strict=True)
    except ValidationError as error:
        raise UserError(describe(error, schema, f"{key}.")) from error
