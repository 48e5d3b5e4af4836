"""The frozen teacher: where it sits, what it hands over, and how the loss gets its logits."""

from megatron_eopd.teacher.colocated import ColocatedTeacher

__all__ = ["ColocatedTeacher"]
