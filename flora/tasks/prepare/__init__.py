"""Filling the data folder."""
