"""Records of runs: their schema, where they live, and what is made of them."""

from flora.results.record import Record
from flora.results.store import Store

__all__ = ["Record", "Store"]
