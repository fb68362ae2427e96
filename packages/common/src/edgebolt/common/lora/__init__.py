"""LoRA through PEFT, by layers: ranks, depth, export, quantised bases, and the federated baselines."""

from edgebolt.common.lora.adapter import add_lora, export_adapter
from edgebolt.common.lora.depth import set_depth
from edgebolt.common.lora.fedlora import FedLoRA, FedLoRAStrategy, LoraRanks
from edgebolt.common.lora.hetlora import HetLoRA, HetLoRAStrategy
from edgebolt.common.lora.names import adapter_layers, layers_held, pairs
from edgebolt.common.lora.quantized import prepare_quantized, quantization
from edgebolt.common.lora.ranks import ranks_of, set_ranks

__all__ = [
    "FedLoRA",
    "FedLoRAStrategy",
    "HetLoRA",
    "HetLoRAStrategy",
    "LoraRanks",
    "adapter_layers",
    "add_lora",
    "export_adapter",
    "layers_held",
    "pairs",
    "prepare_quantized",
    "quantization",
    "ranks_of",
    "set_depth",
    "set_ranks",
]
