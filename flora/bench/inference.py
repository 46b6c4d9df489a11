"""What an adapter costs at inference: the network without one, with one merged, and live ones of LoRA and FLoRA."""

import contextvars
import copy
import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import flora
from flora.bench.methods import Methods
from flora.bench.networks import Network, unlabelled
from flora.bench.report import Measuring
from flora.bench.timing import spread, summary, timed

MODELS = {
    "base": "the network without adapters",
    "merged": "FLoRA's adapter merged into it",
    "lora": "PEFT's LoRA, not merged; depthwise and grouped convolutions left out",
    "flora_alone": "FLoRA, not merged, every layer building its own weight in every pass",
    "flora": "the same within flora.batched, entered for every pass",
    "flora_kept": "the same within one flora.batched(model, keep=ADAPTERS) around all passes",
    "flora_factored": "the same with forward=factored, which keeps thin matrices of linear layers",
}
_TUNED = {"lora": "lora", "flora_factored": "flora_factored"}  # by FLoRA, forward=auto, all others


class Models:
    """The models of a benchmark, and a forward pass of each.

    Their frozen weights are shared, but for those that an adapter is merged into.

    Args:
        methods: on which network.
        names: which of ``MODELS``.
        device: where.
        adapters: how many each holds. With more than one, every pass takes the next one, ``set_adapter`` included;
            the base and the merged model have none to take.
        seed: of weights, adapters and inputs.
    """

    def __init__(
        self, methods: Methods, names: Sequence[str], device: torch.device, adapters: int = 1, seed: int = 0
    ) -> None:
        self.network: Network = methods.network
        self.names, self.adapters = list(names), adapters
        torch.manual_seed(seed)
        base = self.network.build(device).to(device)
        tuned: dict[str, nn.Module] = {}
        for name in names:
            tuning = _TUNED.get(name, "flora")
            if name != "base" and tuning not in tuned:
                torch.manual_seed(seed + 1)  # the same numbers for every form
                tuned[tuning] = self._with_adapters(methods, tuning, base)
        self.by_name = {name: base if name == "base" else tuned[_TUNED.get(name, "flora")] for name in names}
        if "merged" in names:
            merged: Any = copy.deepcopy(tuned["flora"])
            self.by_name["merged"] = merged.merge_and_unload()
        for model in self.by_name.values():
            model.eval().requires_grad_(False)
        self.inputs = unlabelled(self.network.inputs(device))

    def _with_adapters(self, methods: Methods, tuning: str, base: nn.Module) -> nn.Module:
        frozen = [*base.parameters(), *base.buffers()]
        shared = copy.deepcopy(base, {id(tensor): tensor for tensor in frozen})
        model: Any = methods.prepare(tuning, shared).model
        for number in range(1, self.adapters):
            model.add_adapter(f"adapter{number}", copy.deepcopy(model.peft_config["default"]))
        return model.to(self.network.dtype) if self.network.cast else model

    def logits(self, name: str) -> Tensor:
        """What a model gives under the adapter that it was made with."""
        model: Any = self.by_name[name]
        if name not in ("base", "merged"):
            model.set_adapter("default", inference_mode=True)
        with torch.inference_mode():
            return self.network.outputs(model, self.inputs)

    def runner(self, name: str) -> Callable[[], Tensor]:
        """A forward pass of a model; call it in inference mode."""
        model: Any = self.by_name[name]
        live = name not in ("base", "merged") and self.adapters > 1
        turns = itertools.cycle(model.peft_config if live else [None])

        def run() -> Tensor:
            if (adapter := next(turns)) is not None:
                model.set_adapter(adapter, inference_mode=True)
            return self.network.outputs(model, self.inputs)

        if name == "flora":
            together = flora.batched(model)

            def within() -> Tensor:
                with together:
                    return run()

            return within
        if name in ("flora_kept", "flora_factored"):
            around = contextvars.copy_context()  # in which the block stays open, while the others take their turns
            around.run(flora.batched(model, keep=self.adapters).__enter__)
            return lambda: around.run(run)
        return run


@torch.inference_mode()
def measured(
    models: Models, rounds: int, steps: int, seed: int, device: torch.device, measuring: Measuring | None = None
) -> list[dict[str, Any]]:
    """A JSON object per model: milliseconds of a pass, by round, and what stays on the GPU because of it.

    The models take turns in rounds of random order. A first round is not counted, nor one that ``measuring``, of the
    script, ends. One that fails keeps its error.
    """
    order, runs = random.Random(seed), {name: models.runner(name) for name in models.names}
    rows: dict[str, dict[str, Any]] = {name: {"method": name, "ms_rounds": []} for name in models.names}
    turns = ((number, name) for number in range(rounds + 1) for name in order.sample(models.names, len(models.names)))
    with measuring or Measuring() as measuring:
        for number, name in turns:
            if "error" in rows[name]:
                continue
            try:
                before = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
                spent = timed(runs[name], max(steps, models.adapters) if number == 0 else steps, device)
                if number > 0:
                    rows[name]["ms_rounds"].append(statistics.median(spent))
                else:
                    after = None if before is None else torch.cuda.memory_allocated(device) - before
                    rows[name]["kept_bytes"] = after
            except Exception as error:  # reported in the model's row; the others go on
                rows[name]["error"] = summary(error)
    if measuring.stopped:  # rounds that all have: ratios are taken within one
        whole = min((len(row["ms_rounds"]) for row in rows.values() if "error" not in row), default=0)
        for row in rows.values():
            row["ms_rounds"] = row["ms_rounds"][:whole]
            if not whole:
                row.setdefault("error", Measuring.UNMEASURED)
    return [_row(row, rows) for row in rows.values()]


def _row(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians, spreads, and ratios to the base and to LoRA within a round."""
    listed = {"method": row["method"], "ms": None, "ms_spread": None}
    for name in ("ratio", "lora_ratio"):
        listed |= {name: None, f"{name}_spread": None}
    if "error" in row:
        return listed | {"kept_bytes": None, "error": row["error"]}
    spent = row["ms_rounds"]
    listed |= {"ms": round(statistics.median(spent), 4), "ms_spread": round(spread(spent), 4)}
    for name, other in (("ratio", "base"), ("lora_ratio", "lora")):
        if other in rows and "error" not in rows[other]:
            ratios = [ours / theirs for ours, theirs in zip(spent, rows[other]["ms_rounds"], strict=True)]
            listed[name], listed[f"{name}_spread"] = round(statistics.median(ratios), 4), round(spread(ratios), 4)
    return listed | {"kept_bytes": row["kept_bytes"]}
