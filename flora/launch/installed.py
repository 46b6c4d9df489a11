"""Imported first by train.py and the scripts: without the suite's packages they end in one line."""

import importlib.util
import sys

from flora import extras

if importlib.util.find_spec("hydra") is None:
    print(f"error: {extras.needs('this program', 'hydra')}", file=sys.stderr)
    sys.exit(2)
