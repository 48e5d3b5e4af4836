"""Divergences that were saved are those to the teacher that an evaluation has now."""

from dataclasses import replace

from megatron_eopd.build import Session
from megatron_eopd.milestones import evaluate_student
from tests.distributed.test_teacher_check import start

MODEL = {"digest": "of the student"}
OPTIONS = [
    "evaluation.tasks=countdown",
    "evaluation.num_problems=4",
    "evaluation.samples_per_problem=1",
    "teacher.check=never",
]


def _evaluate_again(session: Session) -> None:
    """Into one directory, with the same teacher and with one that reads other prompts, and into an
    empty one."""
    (problems,) = session.problem_sets
    shown = [replace(p, teacher_ids={"teacher": p.prompt_ids[::-1]}) for p in problems.prompts]
    other = replace(session, problem_sets=[replace(problems, prompts=shown)])

    def figure(of: Session, directory: str) -> float:
        result = evaluate_student(of, session.config.run_dir / directory, MODEL, anew=False)
        return result.figures["eval/countdown/reverse_kl"]

    first, second = figure(session, "one"), figure(other, "one")
    assert second == figure(other, "empty") != first


def test_another_prompt_of_the_teacher_is_measured_again(tmp_path):
    start(tmp_path, *OPTIONS, work=_evaluate_again)
