"""The README.md saved beside an adapter: what it is and how to load it."""

import json
from pathlib import Path

from flora.results.escape import code, markdown
from flora.results.record import Record
from flora.secrets import without_secrets

_PEFT = """import flora, flora.models, peft  # `import flora` registers FLoRA with PEFT

base = flora.models.load({model!r}, num_classes={num_classes})
model = peft.PeftModel.from_pretrained(base, {folder!r}).eval()
"""
_PLAIN = """import pathlib

import flora.models
from flora.methods.base import load

spec = flora.models.get({model!r})
model = load(spec.build({num_classes}), spec.classifier, pathlib.Path({folder!r})).model.eval()
"""


def write_card(record: Record, num_classes: int, folder: Path) -> None:
    """Write the model card of a finished run into its adapter folder.

    Args:
        record: the run's record, with its result.
        num_classes: classes of the head.
        folder: where the method has saved the adapter, on its way to ``record.adapter_path``.
    """
    is_peft = (folder / "adapter_config.json").exists()
    lines_to_load = (_PEFT if is_peft else _PLAIN).format(
        model=record.model, num_classes=num_classes, folder=record.adapter_path
    )
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
        f"- Run {record.run_id}, commit {record.commit}, device {markdown(record.device)}, dtype {record.dtype}",
        f"- Command: {code(record.command)}",
        "",
        "## Load",
        "```python",
        lines_to_load.rstrip(),
        "```",
        "",
        "The licence of the base weights and of the data applies to this adapter as well.",
    ]
    (folder / "README.md").write_text(without_secrets("\n".join(lines)) + "\n")
