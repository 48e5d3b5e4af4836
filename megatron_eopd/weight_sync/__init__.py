"""New student weights go to the rollout engine: manifest, transport, receiver, verification."""
