"""The README.md saved beside an adapter: what it is and how to load it."""

from pathlib import Path

from flora.results.record import Record
from flora.secrets import without_secrets

_PEFT = """import flora, flora.models, peft  # `import flora` registers FLoRA with PEFT

base = flora.models.load("{model}", num_classes={num_classes})
model = peft.PeftModel.from_pretrained(base, "{folder}").eval()
"""
_PLAIN = """import flora.models
from flora.methods.base import load

spec = flora.models.get("{model}")
model = load(spec.build({num_classes}), spec.classifier, pathlib.Path("{folder}")).model.eval()
"""


def write_card(record: Record, num_classes: int, folder: Path) -> None:
    """Write the model card of a finished run into its adapter folder.

    Args:
        record: the run's record, with its result.
        num_classes: classes of the head.
        folder: where the method has saved the adapter, on its way to ``record.adapter_path``.
    """
    is_peft = (folder / "adapter_config.json").exists()
    code = (_PEFT if is_peft else _PLAIN).format(
        model=record.model, num_classes=num_classes, folder=record.adapter_path
    )
    source = record.data.get("source", "unknown")
    lines = [
        "---",
        f"library_name: {'peft' if is_peft else 'timm'}",
        f"tags: [{record.adapter}, {record.model}, {record.dataset}]",
        "---",
        f"# {record.adapter} on {record.model}, {record.dataset}",
        "",
        f"- Task: {record.task}, dataset {record.dataset} (source: {source}), protocol {record.protocol}",
        f"- Test {record.metric}: {record.value:.4f}, seed {record.seed}",
        f"- Trained parameters: {record.trainable_params} and {record.head_params} in the head,"
        f" of a base model of {record.total_params}",
        f"- Run {record.run_id}, commit {record.commit}, device {record.device}, dtype {record.dtype}",
        f"- Command: `{record.command}`",
        "",
        "## Load",
        "```python",
        code.rstrip(),
        "```",
        "",
        "The licence of the base weights and of the data applies to this adapter as well.",
    ]
    (folder / "README.md").write_text(without_secrets("\n".join(lines)) + "\n")
