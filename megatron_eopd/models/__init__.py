"""Megatron-Core models from Hugging Face directories, and back."""
