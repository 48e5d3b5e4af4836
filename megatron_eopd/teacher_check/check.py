"""Every teacher of a run against its reference implementation, transformers, before it teaches.

In: a Session. Out: lines in the log, or an error on every rank. One prompt of the run and a
response to it go the way of every rollout, through the teacher wherever it sits and the loss that
reads it; rank 0 has transformers score the same tokens, while the others wait.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_eopd.build import Session
from megatron_eopd.config import Config, TeacherConfig
from megatron_eopd.data.packing import rounds_as_trained
from megatron_eopd.data.prompts import PromptSet
from megatron_eopd.data.run_tokenizers import RunTokenizers
from megatron_eopd.errors import ConfigError, TeacherError
from megatron_eopd.model_paths import is_mcore, resolve_checkpoint
from megatron_eopd.models.megatron_config import uses_transformer_engine
from megatron_eopd.parallel.collectives import from_rank_zero, naming_stage
from megatron_eopd.records import Prompt, Rollout, teacher_name
from megatron_eopd.teacher_check import remembered
from megatron_eopd.teacher_check.judge import Verdict, judge
from megatron_eopd.teacher_check.memory import available_bytes
from megatron_eopd.teacher_check.reference import (
    Answer,
    Opinion,
    Reading,
    float32_bytes,
    opinion,
)
from megatron_eopd.teacher_check.told import lines_about
from megatron_eopd.tokens.notes import TokenNotes
from megatron_eopd.training.step import measure

NUM_TOKENS = 24
"""Of the response, its end among them."""
MAX_PROMPT_TOKENS = 1024
"""A longer prompt gives way to the first that is not, if there is one."""
LARGEST_BYTES = 40 * 2**30
"""Weights in float32 beyond which a start would wait for minutes: about 10 billion parameters."""
SMALL_BYTES = 2**30
"""Below it nobody notices that anything is waited for."""
GIB = 2**30


@dataclass(frozen=True)
class Compared:
    """One teacher, what it is asked, and what transformers says."""

    section: str
    rollout: Rollout
    opinion: Opinion


def check_teachers(session: Session, tokenizers: RunTokenizers) -> None:
    """Collective over the student's ranks; the engine sleeps meanwhile, and wants weights then.

    Raises:
        TeacherError: on rank 0, and the same as a RemoteError on the others: a teacher says
            something else here than in transformers, or transformers could not be asked.
        ConfigError: likewise, where `check=always` asks for what there is not.
    """
    begin, group = time.monotonic(), session.context.cpu_group
    # Its time-out has room for whatever one rank does alone: Config.longest_wait_s.
    due = from_rank_zero(lambda: _due(session, tokenizers), group)
    if not due:
        return
    with naming_stage("the comparison of the teachers with transformers"), session.engine.asleep():
        compared = from_rank_zero(lambda: _ask_all(due, session, tokenizers), group)
        columns = _measure(session, [each.rollout for each in compared])
    from_rank_zero(lambda: _settle(compared, columns, session, tokenizers), group)
    session.log.startup["teacher check"] = time.monotonic() - begin


def _due(session: Session, tokenizers: RunTokenizers) -> list[str]:
    """Sections of the teachers to compare. Tells of all of them what there is to know."""
    config, log = session.config, session.log
    before = remembered.read(config.run_dir)
    due = []
    for section, teacher in config.all_teachers.items():
        for line in lines_about(section, config, tokenizers):
            log.line(line)
        known = before.get(section) == _identity(section, session, tokenizers)
        why_not = reason_to_skip(section, teacher, session.prompts, is_known=known)
        if teacher.follows and session.resumed_from is not None:
            why_not = "it follows the student, and is no longer what its files say."
        if why_not is None:
            due.append(section)
        elif teacher.check != "never":
            log.line(f"[{section}] is not compared with transformers: {why_not}")
    return due


def _identity(section: str, session: Session, tokenizers: RunTokenizers) -> dict:
    device = session.context.device.type
    return remembered.identity(section, session.config, tokenizers.swaps[section], device)


def reason_to_skip(
    section: str, teacher: TeacherConfig, prompts: PromptSet, *, is_known: bool
) -> str | None:
    """A sentence, or None. `is_known`: it agreed before.

    Raises:
        ConfigError: it shall be compared, and cannot be.
    """
    if teacher.check == "never":
        return f"{section}.check=never."
    path = resolve_checkpoint(teacher.hf_path)
    if is_mcore(path):
        if teacher.check == "always":
            raise ConfigError(
                f"{section}.check=always: {path} is a Megatron checkpoint, which transformers does "
                f"not read. Set {section}.hf_path to the Hugging Face directory that it was made "
                f"of, or {section}.check=auto."
            )
        return f"{path} is a Megatron checkpoint, which transformers does not read."
    if first_prompt(prompts, teacher_name(section)) is None:
        return "no prompt of this run asks for it."
    if teacher.check == "always":
        return None
    if is_known:
        return f"it agreed when this run began. {section}.check=always compares it at every start."
    return _too_large(float32_bytes(teacher.hf_path), available_bytes(), section)


def _too_large(needed: int, available: int, section: str) -> str | None:
    size = f"in float32 its weights take {needed / GIB:.1f} GiB"
    anyway = f"{section}.check=always compares it all the same."
    if needed > available / 2:
        free = f"{available / GIB:.1f} GiB"
        return f"{size}, and rank 0's host has {free} to give, of which half would do. {anyway}"
    if needed > LARGEST_BYTES:
        most = f"{LARGEST_BYTES / GIB:.0f} GiB"
        return f"{size}, and more than {most} would keep the start waiting. {anyway}"
    return None


def first_prompt(prompts: PromptSet, teacher: str) -> Prompt | None:
    """The first one for the teacher that is not long; of long ones the shortest."""
    shortest = None
    for prompt in map(prompts.__getitem__, range(len(prompts))):
        if not prompt.is_scored_by(teacher):
            continue
        length = len(prompt.ids_for(teacher))
        if length <= MAX_PROMPT_TOKENS:
            return prompt
        if shortest is None or length < len(shortest.ids_for(teacher)):
            shortest = prompt
    return shortest


def _ask_all(due: Sequence[str], session: Session, tokenizers: RunTokenizers) -> list[Compared]:
    """On rank 0: one model after the other, so that only one is in memory."""
    remembered.forget(session.config.run_dir, due)
    return [_ask(section, session, tokenizers) for section in due]


def _ask(section: str, session: Session, tokenizers: RunTokenizers) -> Compared:
    config, teacher = session.config, session.config.all_teachers[section]
    prompt = first_prompt(session.prompts, teacher_name(section))
    size = float32_bytes(teacher.hf_path)
    if size > SMALL_BYTES:
        session.log.line(
            f"[{section}] is compared with transformers, which takes {size / GIB:.1f} GiB of rank "
            f"0's host, and a while ({section}.check=never leaves it out)"
        )
    reading = Reading(tokenizers.swaps[section], tokenizers.vocab_size, config.teacher_temperature)
    answer = _answer(prompt, session)
    prompt_ids = prompt.ids_for(teacher_name(section))
    # Beside a GPU the host has little to do now; on a CPU the ranks share it, and what they compute
    # must not depend on whether this ran.
    threads = torch.get_num_threads()
    if session.context.device.type == "cuda":
        threads = len(os.sched_getaffinity(0))
    try:
        found = opinion(teacher.hf_path, prompt_ids, answer, reading, threads)
    except Exception as error:
        raise TeacherError(
            f"[{section}] {teacher.hf_path}: transformers cannot be asked what it makes of this "
            f"teacher ({type(error).__name__}: {error}). {section}.check=never leaves it out."
        ) from error
    alone = replace(prompt, teacher=teacher_name(section))  # of several only this one
    nothing = (0.0,) * len(found.response_ids)
    version = session.first_iteration
    rollout = Rollout(alone, 0, found.response_ids, nothing, "stop", version)
    return Compared(section, rollout, found)


def _answer(prompt: Prompt, session: Session) -> Answer:
    """The beginning of the prompt's reference answer, or what the model will write."""
    count = min(NUM_TOKENS, session.config.rollout.max_response_length) - 1
    given = None
    if session.prompts.references_digest:  # there are some
        given = session.prompts.reference(prompt, 0)[:-1][:count]
    tokenizer = session.tokenizer
    return Answer(given, count, tokenizer.stop_ids, tokenizer.end_id)


def _measure(session: Session, rollouts: Sequence[Rollout]) -> dict[str, np.ndarray] | None:
    """What this run makes of them, on rank 0: a row a token, rollout by rollout."""
    config, context = session.config, session.context
    notes = TokenNotes(rollouts)
    rounds = rounds_as_trained(rollouts, config, context.layout)
    microbatches = session.teachers.microbatches(rounds)
    measure(session.token_loss, session.chunks, microbatches, context, notes)
    columns = notes.gather(context)
    if columns is None:
        return None
    order = np.lexsort((columns["token"], columns["response"]))
    return {name: values[order] for name, values in columns.items()}


def _settle(
    compared: Sequence[Compared],
    columns: dict[str, np.ndarray],
    session: Session,
    tokenizers: RunTokenizers,
) -> None:
    """Tells what agrees, and writes it down; or raises what does not."""
    config = session.config
    failures, agreed = [], remembered.read(config.run_dir)
    for number, each in enumerate(compared):
        precision = precision_of(each.section, config)
        own = columns["response"] == number
        ours = [columns[name][own] for name in ("teacher_logprob", "teacher_entropy")]
        verdict = judge(ours, each.opinion, precision)
        if verdict.agrees:
            session.log.line(_agreement(each, verdict, precision))
            agreed[each.section] = _identity(each.section, session, tokenizers)
        else:
            failures.append(_disagreement(each, verdict, precision, session))
    remembered.write(config.run_dir, agreed)
    if failures:
        raise TeacherError("\n".join(failures))


def precision_of(section: str, config: Config) -> str:
    """What the teacher computes in here. TransformerEngine multiplies float32 as TF32."""
    dtype = config.dtype_of(config.all_teachers[section])
    return "TF32" if dtype == "float32" and uses_transformer_engine(config.model) else dtype


def _agreement(each: Compared, verdict: Verdict, precision: str) -> str:
    return (
        f"[{each.section}] agrees with transformers: {verdict.num_tokens} tokens behind prompt "
        f"{each.rollout.prompt.index}, largest difference {verdict.largest:.1e} nats "
        f"({precision} may differ by {verdict.bounds.largest:g})"
    )


def _disagreement(each: Compared, verdict: Verdict, precision: str, session: Session) -> str:
    section, bounds = each.section, verdict.bounds
    path = session.config.all_teachers[section].hf_path
    token_id = each.rollout.response_ids[verdict.token]
    text = session.tokenizer.show([token_id])
    return (
        f"[{section}] {path} is not in this run what it is in transformers: of "
        f"{verdict.num_tokens} tokens behind prompt {each.rollout.prompt.index} they differ by "
        f"{verdict.mean:.3g} nats on average and by {verdict.largest:.3g} at most, where "
        f"{precision} may differ by {bounds.mean:g} and {bounds.largest:g}. Farthest apart is the "
        f"{verdict.quantity} at token {verdict.token} of the response, {text!r} (id {token_id}): "
        f"{verdict.ours:.6g} here, {verdict.theirs:.6g} in transformers. Usual causes: files that "
        f"changed while the run started, a key of config.json that the two read otherwise (rope, "
        f"norms, biases), kernels that are wrong on this device. docs/troubleshooting.md says how "
        f"to find out; {section}.check=never goes on without the comparison."
    )
