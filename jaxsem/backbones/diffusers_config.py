"""Reads the fields of a diffusers `config.json`: every value is checked, and every error is one sentence with what was seen."""

from collections.abc import Mapping
from typing import Any

from jaxsem.errors import InputError

MOST_LEVELS = 8
MOST_LAYERS = 64
_MOST = 1 << 20


class Fields:
    """The fields of one model.

    Args:
      fields: Of the config.json; absent ones have the defaults given to the methods, which are those of diffusers.
      kind: The class that it must be of.

    Raises:
      InputError: It is of another class; and, from the methods, a value that cannot be.
    """

    def __init__(self, fields: Mapping[str, Any], kind: str):
        if not isinstance(fields, Mapping):
            raise InputError(f"the config is a {type(fields).__name__}, not an object")
        if fields.get("_class_name") != kind:
            raise InputError(f"the config is one of {_shown(fields.get('_class_name'))}, not of {kind!r}")
        self.fields = fields

    def only(self, known: Mapping[str, Any], what: str) -> None:
        """Refuses what changes the result and is not the one value that is known, which is also the default."""
        for key, value in known.items():
            found = self.fields.get(key, value)
            if found != value:
                raise InputError(f"it has {key}={_shown(found)}, and only {value!r} is known: {what}")

    def count(self, key: str, default: int, most: int = _MOST) -> int:
        """An integer from 1 on."""
        return _checked_count(key, self.fields.get(key, default), most)

    def counts(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """One integer from 1 on for each level."""
        value = self.fields.get(key, default)
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= MOST_LEVELS:
            raise InputError(f"it has {key}={_shown(value)}; a list of 1 to {MOST_LEVELS} numbers is wanted")
        return tuple(_checked_count(key, entry, _MOST) for entry in value)

    def per_level(self, key: str, default: int, levels: int, most: int = _MOST) -> tuple[int, ...]:
        """One integer for all levels, or a list with one for each."""
        value = self.fields.get(key, default)
        values = value if isinstance(value, list | tuple) else [value] * levels
        if len(values) != levels:
            raise InputError(
                f"it has {key}={_shown(value)} and {levels} levels: one number, or one for each, is wanted"
            )
        return tuple(_checked_count(key, entry, most) for entry in values)

    def same(self, key: str, default: int, levels: int, most: int = _MOST) -> int:
        """One integer for all levels, which may be repeated for each."""
        values = self.per_level(key, default, levels, most)
        if len(set(values)) > 1:
            raise InputError(f"it has {key}={list(values)}, and only the same number at all levels is known")
        return values[0]

    def kinds(self, key: str, default: tuple[str, ...], known: Mapping[str, bool], levels: int) -> tuple[bool, ...]:
        """What `known` says of the kind of block at each level."""
        value = self.fields.get(key, default)
        if not isinstance(value, list | tuple) or not all(isinstance(kind, str) and kind in known for kind in value):
            raise InputError(f"it has {key}={_shown(value)}; a list of {' or '.join(known)} is wanted")
        if len(value) != levels:
            raise InputError(
                f"it has {len(value)} {key} and {levels} block_out_channels: one of each for every level is wanted"
            )
        return tuple(known[kind] for kind in value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.fields.get(key, default)
        if not isinstance(value, bool):
            raise InputError(f"it has {key}={_shown(value)}; true or false is wanted")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number; null is 0."""
        value = self.fields.get(key, default)
        value = 0.0 if value is None else value
        if type(value) not in (int, float) or not abs(value) < 1e9:
            raise InputError(f"it has {key}={_shown(value)}; a number is wanted")
        return float(value)


def _checked_count(key: str, value: Any, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise InputError(f"it has {key}={_shown(value)}; a number from 1 to {most} is wanted")
    return value


def _shown(value: Any) -> str:
    return f"{value!r:.200}"
