"""A run acted out on one CPU process: real models of real sizes, without memory or ranks."""
