"""Sections 2.1 to 2.5 and 2.14 of the robustness catalogue as mutators: a legal ring, and one defect."""

from __future__ import annotations

from . import buffers as _buffers
from . import packed as _packed
from . import refused as _refused
from . import split as _split
from . import tables as _tables
from . import used as _used
from .registry import MUTATORS, Mutator

__all__ = ["MUTATORS", "Mutator"]

# They register their mutators when they are imported.
_ALL = (_split, _refused, _buffers, _tables, _packed, _used)
