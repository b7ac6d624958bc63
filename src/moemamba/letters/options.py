"""What the options of all letters can do."""

import dataclasses
from typing import Any, Self


class Options:
    """The options of a letter: a frozen dataclass that checks itself."""

    def changed(self, changes: dict[str, Any], used: set[str]) -> Self:
        """A copy with those of the changes that are its fields, which are then noted as used."""
        own = {name: value for name, value in changes.items() if name in self.names()}
        used.update(own)
        return dataclasses.replace(self, **own) if own else self  # type: ignore[type-var]

    def names(self) -> set[str]:
        """Of the fields that `changed` may change."""
        return {field.name for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def unused(self) -> tuple[str, ...]:
        """The fields, as "experts.activation", that mean nothing as the others are."""
        return ()
