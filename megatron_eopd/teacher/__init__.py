"""Frozen teachers: where they sit, what they hand over, and how the loss reads it."""
