"""Measuring steps: networks with random weights, the methods to compare, interleaved timing, JSON results."""
