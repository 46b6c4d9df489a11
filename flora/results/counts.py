"""What methods train, counted without weights; and experiments/claims.yaml, claims about it, computed."""

from collections.abc import Sequence
from typing import Any

import torch
import yaml
from omegaconf import DictConfig

from flora.adapters.heads import trained
from flora.config import instantiate
from flora.errors import ConfigError
from flora.results.experiments import ROOT, composed

_COLUMNS = ("claim", "assumes", "claimed", "computed", "verdict", "source")


def count(cfg: DictConfig) -> dict[str, int]:
    """Parameters trained outside the head, trained in the head, and of the base model with its head.

    Args:
        cfg: what train.py composes; ``model`` and ``adapter`` are read.

    Raises:
        ConfigError: a setting that does not fit the model.
    """
    model, method = instantiate(cfg.model), instantiate(cfg.adapter)
    base = model.skeleton()
    total = sum(p.numel() for p in base.parameters())
    try:
        with torch.device("meta"):
            adapted = method.apply(base, model.classifier)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"adapter: {error}") from error
    outside, inside = trained(adapted.model, model.classifier)
    return {"trainable_params": outside, "head_params": inside, "total_params": total}


def compute(claim: dict[str, Any]) -> float:
    """The value that a claim of experiments/claims.yaml is about, in its unit: percent or parameters."""
    counted = _count(claim["counted"])
    adapter = counted["trainable_params"]
    if claim["value"] == "count":
        return adapter
    if claim["value"] == "of_model":
        return 100 * (adapter + counted["head_params"]) / (counted["total_params"] + adapter)
    against = _count(claim["against"])["trainable_params"]
    if claim["value"] == "extra":
        return adapter - against
    share = 100 * adapter / against
    return share if claim["value"] == "share" else 100 - share


def claims_markdown() -> str:
    """experiments/claims.yaml as a Markdown table: what is claimed, what is computed, whether it holds."""
    definition = yaml.safe_load((ROOT / "experiments" / "claims.yaml").read_text())
    body = [list(_COLUMNS), ["---"] * len(_COLUMNS)]
    for claim in definition["claims"]:
        value = compute(claim)
        unit = "" if claim["value"] in ("count", "extra") else " %"
        verdict = "holds" if abs(value - claim["claimed"]) <= claim["within"] else "does not hold"
        shown = f"{value:,.0f}" if not unit else f"{value:.2f}{unit}"
        claimed = f"{claim['claimed']:,}{unit}"
        body.append([claim["claim"], claim["assumes"], claimed, shown, verdict, claim["source"]])
    note = "Counted from the models' sizes without weights, heads left out (`scripts/count_params.py`)."
    return (
        "\n".join([f"# {definition['title']}", "", *("| " + " | ".join(row) + " |" for row in body), "", note]) + "\n"
    )


def _count(overrides: Sequence[str]) -> dict[str, int]:
    return count(composed(overrides))
