"""Rivals that no kept library has, and ablations of FLoRA, as methods of PEFT, which saves, loads and merges them.

``base``: rivals that add to a weight. ``inserted``: those that add modules. ``matched_ranks``: ablations that spend
what FLoRA would; flora_kernelfree needs no code, it is FLoRA with a large ``kernel_rank``.
"""

from flora.adapters.register import register
from flora.methods.rivals.bottleneck import BottleneckConfig, BottleneckModel
from flora.methods.rivals.flora_flat import FloraFlatConfig, FloraFlatModel
from flora.methods.rivals.flora_nocore import FloraNocoreConfig, FloraNocoreModel
from flora.methods.rivals.flora_shuffled import FloraShuffledConfig, FloraShuffledModel
from flora.methods.rivals.locon import LoconConfig, LoconModel
from flora.methods.rivals.lora_flat import LoraFlatConfig, LoraFlatModel
from flora.methods.rivals.lotr import LotrConfig, LotrModel
from flora.methods.rivals.moslora import MosloraConfig, MosloraModel
from flora.methods.rivals.oft import OftConfig, OftModel
from flora.methods.rivals.ssb import SsbConfig, SsbModel
from flora.methods.rivals.trilora import TriloraConfig, TriloraModel
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
register(SsbConfig, SsbModel)
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
    "SsbConfig",
    "TriloraConfig",
    "VptConfig",
]
