"""VTAB-1K: 19 image datasets, their sources and rules."""
