"""LoRA adapters in peft's format: read and checked, merged into weights, or applied beside them."""
