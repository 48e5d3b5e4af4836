"""Memory of every rank of a run, and the layouts that fit, before it starts."""
