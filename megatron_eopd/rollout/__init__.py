"""Student responses: the engine protocol, vLLM, and the trainer's exact reference sampler."""
