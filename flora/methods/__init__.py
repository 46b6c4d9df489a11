"""How a pretrained model is fine-tuned: FLoRA, and what it is compared with.

The names below are public, and the ones that configs use: they stay where they are, wherever their code moves.
"""

from typing import Any

from flora import names

_HOMES = {
    "AdaLora": "adalora",
    "Adapted": "base",
    "BitFit": "bitfit",
    "BottleneckConfig": "rivals.bottleneck",
    "FloraFlatConfig": "rivals.flora_flat",
    "FloraNocoreConfig": "rivals.flora_nocore",
    "FloraShuffledConfig": "rivals.flora_shuffled",
    "Full": "full",
    "LinearProbe": "linear_probe",
    "LoconConfig": "rivals.locon",
    "LoraFlatConfig": "rivals.lora_flat",
    "LotrConfig": "rivals.lotr",
    "Method": "base",
    "MosloraConfig": "rivals.moslora",
    "OftConfig": "rivals.oft",
    "Peft": "peft",
    "SsbConfig": "rivals.ssb",
    "TriloraConfig": "rivals.trilora",
    "VptConfig": "rivals.vpt",
    "load": "base",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    return names.public(__name__, _HOMES, name)
