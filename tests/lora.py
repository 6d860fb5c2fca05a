"""Adapters: those of PEFT where it is installed, and a stand-in of the same structure."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class LoraLinear(nn.Module):
    """What PEFT puts in the place of an ``nn.Linear``."""

    def __init__(self, base_layer: nn.Linear, rank: int = 4):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, False)})

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class PeftModel(nn.Module):
    """What PEFT puts around a model."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        self.config = model.config

    def get_base_model(self) -> PreTrainedModel:
        return self.base_model.model

    def forward(self, *args, **kwargs):
        return self.get_base_model()(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.get_base_model().generate(*args, **kwargs)


def add_lora(model: PreTrainedModel, *targets: str) -> nn.Module:
    """Put adapters with random weights in; returns the wrapped model."""
    try:
        import peft
    except ImportError:
        for parent in list(model.modules()):
            for name in targets:
                if isinstance(getattr(parent, name, None), nn.Linear):
                    setattr(parent, name, LoraLinear(getattr(parent, name)))
        wrapped: nn.Module = PeftModel(model)
    else:
        config = peft.LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, 0.0, 0.1)
    return wrapped.eval()


def remove_lora(model: PreTrainedModel) -> None:
    """Take the adapters out again, as PEFT's ``unload()`` does."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "base_layer"):
                setattr(parent, name, child.base_layer)
