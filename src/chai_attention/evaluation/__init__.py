"""How much quality clustered heads cost."""

from chai_attention.evaluation.perplexity import Loss, PairedRise, paired_rise, token_loss

__all__ = ["Loss", "PairedRise", "paired_rise", "token_loss"]
