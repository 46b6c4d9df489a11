"""Rivals that no kept library has, and ablations of FLoRA, as methods of PEFT, which saves, loads and merges them.

``form``: what a rival adds to a weight. ``inserted``: modules added to a model. ``adalora`` and ``biases`` are classes
beside those of ``flora.methods.base``.
"""

from flora.methods.rivals.ablations import (
    FloraFlatConfig,
    FloraFlatModel,
    FloraNocoreConfig,
    FloraNocoreModel,
    FloraShuffledConfig,
    FloraShuffledModel,
)
from flora.methods.rivals.bottleneck import BottleneckConfig, BottleneckModel
from flora.methods.rivals.form import register
from flora.methods.rivals.locon import LoconConfig, LoconModel
from flora.methods.rivals.lora_flat import LoraFlatConfig, LoraFlatModel
from flora.methods.rivals.lotr import LotrConfig, LotrModel
from flora.methods.rivals.mixed import MosloraConfig, MosloraModel, TriloraConfig, TriloraModel
from flora.methods.rivals.oft import OftConfig, OftModel
from flora.methods.rivals.vpt import VptConfig, VptModel

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
