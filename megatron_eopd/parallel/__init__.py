"""Ranks and groups: the layout as integers, Megatron's global state, and its emulation on CPU."""
