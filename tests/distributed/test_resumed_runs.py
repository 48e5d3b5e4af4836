"""6 iterations are 3, a resume, and 3 more, to the bit: a student of experts, and live rollouts of
the trainer's own sampler. (tests/e2e has vLLM's; test_interruption.py stops within an iteration.)
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.multiprocessing import ProcessRaisedException

from megatron_eopd.interruption import EXIT_STOPPED
from tests.distributed.test_interruption import ROOT, few_prompts, rows, start
from tests.tiny_models import make_model

__all__ = ["few_prompts"]


def test_experts_go_on_as_if_nothing_had_happened(tmp_path):
    model = Path(shutil.copytree(ROOT / "examples/quickstart/models/student", tmp_path / "model"))
    make_model("qwen3_moe", model, vocab_size=112)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    options = [
        f"student.hf_path={model}",
        "parallel.expert_model_parallel_size=2",
        "training.lr_decay_style=constant",
        'logging.trackers=["tensorboard"]',
        "evaluation.interval=3",
    ]
    assert start(straight, *options, "training.train_iters=6") == 0
    assert start(resumed, *options, "training.train_iters=3") == 0
    assert start(resumed, *options, "training.train_iters=6") == 0
    # At its own end the shorter run made an evaluation that is due in the longer one too.
    assert rows(resumed) == rows(straight)
    ours, theirs = (load_file(path / "hf/model.safetensors") for path in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    sampled = [
        {path.name: path.read_bytes() for path in run_dir.glob("rollouts/*.jsonl")}
        for run_dir in (resumed, straight)
    ]
    assert sampled[0] == sampled[1] and len(sampled[0]) == 6
    steps = [shown_steps(path) for path in (resumed, straight)]
    assert steps[0] == steps[1] and steps[0]["loss/total"] == [1, 2, 3, 4, 5, 6]


def shown_steps(run_dir: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [e.step for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


FOLLOWING = [
    "teacher.source=student",
    "teacher.hf_path=none",
    "teacher.ema_decay=0.8",
    "teachers.late.source=student",
    "teachers.late.lag_steps=3",
    "teachers.late.parallel.pipeline_model_parallel_size=2",
    "data.teacher_prompt_template=9 {prompt}",
    "training.lr=1e-3",
]


def test_teachers_that_follow_go_on_as_if_nothing_had_happened(tmp_path):
    """One in the student's layout and one in its own: what they are by now is in the checkpoint,
    also of a run that was stopped between two optimizer steps."""
    lines = [
        {"prompt": f"{n} 7 8 8 -> 29 :", "answer": ""} | ({"teacher": "late"} if n % 2 else {})
        for n in range(1, 21)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert start(straight, *FOLLOWING) == 0
    assert start(stopped, *FOLLOWING, stop_at=("step 1", 1)) == EXIT_STOPPED
    late = "teachers.late.lag_steps"
    for changed, told in (
        ([f"{late}=2"], f"{late}=3 there, and are teacher.ema_decay, {late}=2 now"),
        (["teacher.ema_decay=none"], f"there, and are {late}=3 now"),
        (["teacher.ema_decay=none", "teacher.lag_steps=1"], "are teacher.lag_steps=1, teachers"),
        (["data.teacher_prompt_template=8 {prompt}"], "whose teachers read other prompts"),
    ):
        with pytest.raises(ProcessRaisedException, match=re.escape(told)):
            start(stopped, *FOLLOWING, *changed)
    assert start(stopped, *FOLLOWING) == 0
    assert rows(stopped) == rows(straight)
    ours, theirs = (load_file(path / "hf/model.safetensors") for path in (stopped, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
