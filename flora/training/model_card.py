"""The README.md saved beside an adapter: what it is and how to load it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flora.models.weights import name_of
from flora.results.escape import code, markdown
from flora.results.record import Record
from flora.secrets import without_secrets

_LOAD = """import flora

predictor = flora.load({folder!r})
"""
_PREDICT = "print(predictor.predict({example}))"
_MAPS = """print(predictor.predict({example}).classes)  # [H, W], places in predictor.class_names
predictor.model  # floats [B, 3, H, W], normalised as above, to logits [B, {classes}, ~H / 4, ~W / 4]"""
_BOXES = """for one in predictor.predict({example}).objects:
    print(one.label, one.score, one.box)  # left, top, right, bottom
# A list of floats [3, H, W] in [0, 1], of any size; rows of left, top, right, bottom, score and class, or of -100.
found = predictor.model(images)["detections"]"""
_TURNED = """predictor.model.eval()
# A list of floats [3, {tile}, {tile}] in [0, 1], tiles; rows of x and y of four corners, score and class, or of -100.
found = predictor.model(images)["detections"]"""
_USES = {"segment": _MAPS, "detect": _BOXES, "oriented": _TURNED}  # by task; others take inputs as they lie on a disk
_SHOWN = 20  # names of classes


def write_card(record: Record, facts: Mapping[str, Any], folder: Path) -> None:
    """Write the model card of a finished run into its adapter folder.

    Args:
        record: the run's record, with its result.
        facts: what run.json says beside the record (``flora.training.saved.write_facts``): ``num_classes``,
            ``class_names``, ``weights`` and ``inputs``.
        folder: where the method has saved the adapter, on its way to ``record.adapter_path``.
    """
    is_peft = (folder / "adapter_config.json").exists()
    inputs, names = facts["inputs"], facts["class_names"]
    use = _USES.get(record.task, _PREDICT)
    use = use.format(example=_example(inputs, facts["num_classes"]), classes=len(names), tile=inputs.get("tile"))
    lines_to_load = _LOAD.format(folder=record.adapter_path) + use
    seen = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in inputs.items())
    classes = f"{', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
    source = record.data.get("source", "unknown")
    about = f"{record.task}, dataset {record.dataset} (source: {source}), protocol {record.protocol}"
    lines = [
        "---",
        f"library_name: {'peft' if is_peft else 'timm'}",
        f"tags: {json.dumps([record.adapter, record.model, record.dataset])}",
        "---",
        f"# {markdown(f'{record.adapter} on {record.model}, {record.dataset}')}",
        "",
        f"- Task: {markdown(about)}",
        f"- Test {record.metric}: {record.value:.4f}, seed {record.seed}",
        f"- Trained parameters: {record.trainable_params} and {record.head_params} in the head,"
        f" of a base model of {record.total_params}",
        f"- Base weights: {markdown(_weights(facts['weights'], record.seed))}",
        *([f"- Inputs: {markdown(seen)}"] if seen else []),
        *([f"- Classes ({len(names)}): {markdown(classes)}"] if names else []),
        f"- Run {record.run_id}, commit {record.commit}, device {markdown(record.device)}, dtype {record.dtype}",
        f"- Command: {code(record.command)}",
        "",
        "## Load",
        "```python",
        lines_to_load,
        "```",
        "",
        "The base weights must be those above: `flora.load(..., model={'weights': PATH})` says where else they lie.",
        "The licence of the base weights and of the data applies to this adapter as well.",
    ]
    (folder / "README.md").write_text(without_secrets("\n".join(lines)) + "\n")


def _example(inputs: Mapping[str, Any], num_classes: int) -> str:
    texts = inputs.get("texts", [])
    if len(texts) > 1:
        return f"({', '.join(repr(name) for name in texts)})"
    if texts:
        return repr("a text")
    return repr("photo.jpg") if num_classes else "('photo.jpg', 'what is it?')"


def _weights(facts: Mapping[str, Any], seed: int) -> str:
    """Where base weights lie, with their checksums; of a network of several parts each."""
    if facts.get("pretrained") is False:
        return f"random, from seed {seed}"
    own = [f"{name} (sha256 {facts.get('sha256', 'unknown')})"] if (name := name_of(facts)) else []
    parts = [_weights(part, seed) for part in facts.values() if isinstance(part, Mapping)]
    return "; ".join([*own, *parts]) or "unknown"
