"""Ranks from a budget: given how many parameters a method may train, which rank each layer gets.

Every adapted weight has a ladder of ranks with their parameter counts (``flora.methods.ladders``); an allocation says
in which order the rungs of all ladders are climbed while the budget pays for them (``flora.methods.allocation``).
"""

import functools
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from flora.methods.allocation import TOLERANCE, Spectra, check_allocation, climb, levels
from flora.methods.base import Method
from flora.methods.heads import in_head, trained
from flora.methods.ladders import Ladder, ladders_of, skeleton, wrapped_on_meta

# (name of the method, its rank or None for its default, layers to adapt) -> that method, ready to be applied
Matched = Callable[[str, int | None, str | Sequence[str]], Method]

_UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
_SIZE = re.compile(r"(?P<number>\d+(\.\d*)?([eE][+-]?\d+)?)\s*(?P<unit>%|[kMG]?)")
_MATCH = re.compile(r"((?P<times>\d+(\.\d*)?)\s*\*\s*)?match:(?P<method>\w+)(:(?P<rank>[1-9]\d*))?")


class OutOfReach(ValueError):
    """No ranks of the method come to the budget on this model, and counting alone says so."""


class Budget:
    """A number of trainable parameters outside the head, and how layers share it.

    Args:
        size: ``2%`` of the backbone (the model without its head), a number with or without unit (``1330000``,
            ``1.33M``, ``500k``), or ``match:METHOD[:RANK]``: what that method trains on the same model at that rank,
            ``0.25*match:lora:1`` a quarter of it.
        allocation: ``uniform`` (also None), ``proportional``, ``spectral`` or ``gradient``.
        matched: makes the method that ``match:`` names; needed for such a size alone.

    Raises:
        ValueError: a size or an allocation that cannot be read, or a match without what makes the method.
    """

    def __init__(self, size: str | int | float, allocation: str | None = None, matched: Matched | None = None) -> None:
        self.size = size
        self.allocation = check_allocation(allocation)
        text = "" if isinstance(size, bool) else str(size).strip()
        self._match, number = _MATCH.fullmatch(text), _SIZE.fullmatch(text)
        self._percent = number is not None and number["unit"] == "%"
        self._number = float(number["number"]) * _UNITS.get(number["unit"], 1) if number else 0.0
        if self._match is not None:
            self._number = float(self._match["times"] or 1)
        if not 0 < self._number < math.inf:
            raise ValueError(
                f"adapter.budget must be a share of the backbone (2%), a number of parameters (1.33M) or "
                f"match:METHOD:RANK (match:lora:8, 0.25*match:lora:1), got {size!r}"
            )
        self._matched = matched
        if self._match is not None and matched is None:
            raise ValueError(f"adapter.budget={size}: nothing here makes the method to match; give a size instead")

    def parameters(self, model: nn.Module, head: Sequence[str], targets: str | Sequence[str]) -> int:
        """The budget on a model, in parameters; ``targets`` are the layers that a matched method adapts."""
        if self._match is not None and self._matched is not None:
            name, rank = self._match["method"], self._match["rank"]
            matched = _trains(self._matched(name, int(rank) if rank else None, targets), model, head)
            return math.floor(matched * self._number)
        if self._percent:
            backbone = sum(p.numel() for name, p in model.named_parameters() if not in_head(name, head))
            return math.floor(backbone * self._number / 100)
        return math.floor(self._number)

    def solve(
        self,
        config: Any,
        model: nn.Module,
        head: Sequence[str],
        targets: str | Sequence[str],
        spectra: Spectra | None = None,
    ) -> None:
        """Write the ranks to ``config.rank_pattern`` and print them on stderr, layer by layer.

        Args:
            config: PEFT config of the method, ready but for its ranks.
            model: the base model, on any device.
            head: names of its head's modules.
            targets: the configured targets, for a matched method.
            spectra: gives those of the gradients, for ``gradient``.

        Raises:
            OutOfReach: the message names what is possible.
            ValueError: ranks that are given besides; ``spectral`` on a model without values, ``gradient`` without
                spectra.
        """
        if config.rank_pattern:
            raise ValueError("adapter.rank_pattern: adapter.budget sets the rank of every layer; give one of the two")
        budget = self.parameters(model, head, targets)
        ladders = ladders_of(config, model)
        # LoKr's sizes end where its automatic factors do; smaller factors reach further.
        for factor in (16, 8, 4, 2) if getattr(config, "decompose_factor", 0) == -1 else ():
            if _largest(ladders) >= budget:
                break
            config.decompose_factor = factor
            ladders = ladders_of(config, model)
        smallest = sum(ladder.rungs[0].params for ladder in ladders)
        self._check_landing(ladders, max(smallest, min(budget, _largest(ladders))), budget)  # before levels read values
        rungs = climb(ladders, levels(self.allocation, ladders, model, spectra), budget)
        total = sum(rung.params for rung in rungs)
        self._check_landing(ladders, total, budget)
        # Patterns match endings of names, so the longest come first.
        named = sorted(zip(ladders, rungs, strict=True), key=lambda pair: (-len(pair[0].name), pair[0].name))
        config.rank_pattern = {re.escape(ladder.name): rung.pattern for ladder, rung in named}
        built = trained(wrapped_on_meta(config, model), head)[0]
        if built != total:
            raise ValueError(
                f"adapter.budget: an option of the adapter trains {built - total:+,} parameters that no rank decides "
                "(bias?); leave it out"
            )
        lines = [f"budget {self.size} = {budget:,} parameters, {self.allocation}: {total:,} used, {total / budget:.2%}"]
        for ladder, rung in zip(ladders, rungs, strict=True):
            lines.append(f"  {ladder.name} {list(ladder.shape)}: rank {rung.pattern}, {rung.params:,} parameters")
        _print_once("\n".join(lines))

    def _check_landing(self, ladders: Sequence[Ladder], total: int, budget: int) -> None:
        if total > budget:
            reach = f"below the smallest adapter, rank 1 everywhere, of {total:,}"
        elif total >= (1 - TOLERANCE) * budget:
            return
        elif total == _largest(ladders):
            reach = f"above the largest adapter, of {total:,}: no rank exceeds the size of its mode"
        else:
            reach = f"between two possible sizes, the smaller of {total:,}"
        raise OutOfReach(f"adapter.budget={self.size}, {budget:,} parameters on this model, is {reach}; choose {total}")


def _largest(ladders: Sequence[Ladder]) -> int:
    """Parameters with every weight on its highest rung."""
    return sum(ladder.rungs[-1].params for ladder in ladders)


def _trains(method: Method, model: nn.Module, head: Sequence[str]) -> int:
    """Parameters outside the head that a method trains on a model, which stays as it is."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return trained(method.apply(skeleton(model), head).model, head)[0]


@functools.cache
def _print_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
