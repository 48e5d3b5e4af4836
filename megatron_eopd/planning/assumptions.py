"""The speeds that time estimates rest on. Each is an option of tools/plan.py."""

from megatron_eopd.config import Section


class Assumptions(Section):
    """Of one GPU and its links. Defaults are for an H100 SXM node: data sheets, and the share of
    them that is usually reached. None was measured here."""

    tflops: float = 989.0
    """peak of bfloat16 matrix products, TFLOP/s, by the data sheet"""
    tflops_float32: float = 67.0
    """the same in float32, without TF32"""
    mfu: float = 0.4
    """share of the peak that forward and backward passes reach"""
    decode_mfu: float = 0.3
    """share of the peak that vLLM reaches on prompts and large batches"""
    decode_bandwidth: float = 2000.0
    """GB/s at which vLLM reads weights and key/value cache (data sheet: 3,350)"""
    memory_bandwidth: float = 2500.0
    """GB/s of the optimizer step and of the loss"""
    node_bandwidth: float = 300.0
    """GB/s that a GPU sends to others of its node (NVLink's data sheet: 450)"""
    network_bandwidth: float = 40.0
    """GB/s that a GPU sends to other nodes (a port of 400 Gbit/s each: 50)"""
    sync_bandwidth: float = 2.0
    """GB/s of the weight sync through host memory"""
    sync_bandwidth_nccl: float = 20.0
    """GB/s of the weight sync to GPUs of vLLM's own"""
    host_bandwidth: float = 25.0
    """GB/s between host memory and a GPU, for teacher.offload"""
    layer_launch_us: float = 400.0
    """microseconds to launch one layer's forward pass: what a small microbatch takes anyway"""
    step_overhead_s: float = 0.2
    """seconds of a stage beside its work: packing, metrics, synchronisation"""
    expert_imbalance: float = 1.2
    """tokens of the busiest rank's experts over the mean"""


def describe_assumptions() -> list[tuple[str, float, str]]:
    """(name, default, what it is)"""
    known = Assumptions.model_fields.items()
    return [(name, field.default, field.description or "") for name, field in known]
