"""Checkpoints between Hugging Face and Megatron-Core, without ever holding a model."""
