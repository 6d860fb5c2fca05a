"""How much quality clustered heads cost."""
