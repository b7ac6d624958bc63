"""What the options of all letters can do."""

import dataclasses
from typing import Any, ClassVar, Self


class Options:
    """The options of a letter: a frozen dataclass that checks itself.

    Attributes:
        by_layer: fields that may be a tuple, with an entry for each layer that has these options.
    """

    by_layer: ClassVar[tuple[str, ...]] = ()

    def counts(self) -> dict[str, int]:
        """How many layers each field says something of that is given layer by layer, by its place in these options."""
        given = {name: getattr(self, name) for name in self.by_layer}
        return {name: len(value) for name, value in given.items() if isinstance(value, tuple)}

    def of_layer(self, number: int) -> Self:
        """As one layer has them, counted from the bottom among those that have these options."""
        own = {name: getattr(self, name)[number] for name in self.counts()}
        return dataclasses.replace(self, **own) if own else self  # type: ignore[type-var]

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
