"""Prompts in, microbatches out."""
