"""Rivals that no kept library has, and ablations of FLoRA, as methods of PEFT, which saves, loads and merges them.

``form``: what a rival adds to a weight. ``inserted``: modules added to a model. ``adalora`` and ``biases`` are classes
beside those of ``flora.adapters.methods``.
"""

from flora.adapters.rivals.ablations import (
    FloraFlatConfig,
    FloraFlatModel,
    FloraNocoreConfig,
    FloraNocoreModel,
    FloraShuffledConfig,
    FloraShuffledModel,
)
from flora.adapters.rivals.bottleneck import BottleneckConfig, BottleneckModel
from flora.adapters.rivals.form import register
from flora.adapters.rivals.locon import LoconConfig, LoconModel
from flora.adapters.rivals.lora_flat import LoraFlatConfig, LoraFlatModel
from flora.adapters.rivals.lotr import LotrConfig, LotrModel
from flora.adapters.rivals.mixed import MosloraConfig, MosloraModel, TriloraConfig, TriloraModel
from flora.adapters.rivals.oft import OftConfig, OftModel
from flora.adapters.rivals.prompts import VptConfig, VptModel

register(BottleneckConfig, BottleneckModel)
register(FloraFlatConfig, FloraFlatModel)
register(FloraNocoreConfig, FloraNocoreModel)
register(FloraShuffledConfig, FloraShuffledModel)
register(LoconConfig, LoconModel)
register(LoraFlatConfig, LoraFlatModel)
register(LotrConfig, LotrModel)
register(MosloraConfig, MosloraModel)
register(OftConfig, OftModel)
register(TriloraConfig, TriloraModel)
register(VptConfig, VptModel)

__all__ = [
    "BottleneckConfig",
    "FloraFlatConfig",
    "FloraNocoreConfig",
    "FloraShuffledConfig",
    "LoconConfig",
    "LoraFlatConfig",
    "LotrConfig",
    "MosloraConfig",
    "OftConfig",
    "TriloraConfig",
    "VptConfig",
]
