"""How a method looks at the gradients of a few batches before it trains, for its start or for the ranks of layers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GradientSettings:
    """``adapter.gradient``: what is looked at.

    Attributes:
        batches: of ``trainer.batch_size`` examples, at most one pass over the training split.
        head_steps: optimiser steps that a fresh head is trained for before, alone, as the gradients go through it.
        put_back: the head then starts afresh; False: it goes on from there.

    Raises:
        ValueError: a number that cannot be used.
    """

    batches: int = 16
    head_steps: int = 128
    put_back: bool = True

    def __post_init__(self) -> None:
        for name, least in (("batches", 1), ("head_steps", 0)):
            if type(value := getattr(self, name)) is not int or value < least:
                raise ValueError(f"adapter.gradient.{name} must be a whole number from {least} on, got {value!r}")
        if not isinstance(self.put_back, bool):
            raise ValueError(f"adapter.gradient.put_back must be true or false, got {self.put_back!r}")
