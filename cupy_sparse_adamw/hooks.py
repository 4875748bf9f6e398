"""Hooks that decide which ids a HashTable takes in, under RecIS's names."""

from __future__ import annotations


class AdmitHook:
    """What a lookup in training mode does with an id that is not in the table.

    Args:
        name: "ReadOnly": such an id reads as zeros and gets no row.
    """

    def __init__(self, name: str) -> None:
        if name != "ReadOnly":
            raise ValueError(f"admit hook must be 'ReadOnly', got {name!r}")
        self.name = name
