"""Frozen config records to JSON and back: in JSON, tuples are lists."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def plain(record: Any) -> dict[str, Any]:
    """The fields of a record, those inside it included, as JSON holds them."""
    return json.loads(json.dumps(dataclasses.asdict(record)))


def record_of(kind: type[T], fields: Mapping[str, Any]) -> T:
    """The record of plain fields; records inside it are to be made first.

    Raises:
      TypeError: A field that it has not, or one that is missing.
      InputError: What the record itself refuses.
    """
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
