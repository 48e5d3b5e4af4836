"""Which responses are recorded and when, and that a recording never costs the run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_eopd.config import Config
from megatron_eopd.losses.token_details import TokenDetails
from megatron_eopd.records import Prompt, ResponseTokens, Rollout
from megatron_eopd.rollout.recording import read_rollouts, write_rollouts
from megatron_eopd.token_recorder import TokenRecorder
from megatron_eopd.tokens import notes as notes_module
from megatron_eopd.tokens.file import read_tokens, training_file
from megatron_eopd.tokens.notes import SIBLINGS, TokenNotes, choose
from megatron_eopd.tokens.record import SIGNALS, TOP


def rollouts_of(num_prompts: int, samples: int, length: int = 3) -> list[Rollout]:
    prompts = [Prompt(n, f"p{n}", "", (n, 7)) for n in range(num_prompts)]
    return [
        Rollout(p, k, tuple(range(length)), (-1.0,) * length, "stop", 0)
        for p in prompts
        for k in range(samples)
    ]


@pytest.mark.parametrize(
    "samples,count,expected",
    [
        (1, 3, [(0, 0), (1, 0), (2, 0)]),
        (2, 3, [(0, 0), (0, 1), (1, 0)]),
        (6, 8, [(p, k) for p in (0, 1) for k in range(SIBLINGS)]),
        (6, 99, [(p, k) for p in range(3) for k in range(6)]),
        (6, 13, [(0, k) for k in range(5)] + [(p, k) for p in (1, 2) for k in range(4)]),
        (6, 0, []),
    ],
)
def test_siblings_are_recorded_together_and_not_too_many_of_them(samples, count, expected):
    chosen = choose(rollouts_of(3, samples), count)
    assert [(r.prompt.index, r.sample_index) for r in chosen] == expected


def details_of(part: slice) -> TokenDetails:
    size = part.stop - part.start
    ids = torch.arange(size).unsqueeze(-1).expand(-1, 2 * TOP)
    logprobs = torch.full((size, 2 * TOP), -2.0)
    ranks = torch.ones(size, dtype=torch.int32)
    return TokenDetails(ranks, ranks, ids, logprobs, logprobs)


def columns_of(first: int, size: int) -> dict[str, torch.Tensor]:
    columns = {name: torch.arange(first, first + size).float() for name in SIGNALS}
    columns["reverse_kl"] = torch.zeros(size)
    # It moves with every six tokens, a step of two responses.
    return columns | {"threshold": torch.full((size,), 0.8 + first, dtype=torch.float64)}


def test_of_each_chunk_what_is_wanted_is_taken_in_whole_pieces():
    """Neighbours are one piece, so that nobody looks at the device once for every response."""
    rollouts = rollouts_of(4, 1)
    notes = TokenNotes([rollouts[0], rollouts[1], rollouts[3]])
    batch = SimpleNamespace(responses=tuple(ResponseTokens(r, range(3)) for r in rollouts))
    pieces = []
    for rows in (slice(0, 5), slice(5, 99)):
        size = min(rows.stop, 12) - rows.start
        asked = lambda part: (pieces.append(part), details_of(part))[1]  # noqa: E731
        notes.take(batch, rows, columns_of(rows.start, size), asked)
    assert pieces == [slice(0, 5), slice(0, 1), slice(4, 7)]
    kept = [x for piece in notes._kept for x in piece["loss"].tolist()]
    assert kept == [0, 1, 2, 3, 4, 5, 9, 10, 11]


def session_of(run_dir, **logging) -> tuple[SimpleNamespace, list[str]]:
    told: list[str] = []
    config = Config.model_validate(
        {
            "run_dir": run_dir,
            "student": {"hf_path": "s"},
            "teacher": {"hf_path": "t"},
            "rollout": {"batch_size": 4},
            "training": {"global_batch_size": 2},
            "logging": {"record_tokens_interval": 5} | logging,
        }
    )
    session = SimpleNamespace(
        config=config,
        context=SimpleNamespace(),
        tokenizer=SimpleNamespace(piece=lambda i: (b"%d" % i, False)),
        log=SimpleNamespace(line=told.append),
    )
    return session, told


@pytest.fixture
def alone(monkeypatch):
    """Of one rank."""

    def gather(self, _):
        names = self._kept[0]
        return {name: notes_module._joined([kept[name] for kept in self._kept]) for name in names}

    monkeypatch.setattr(TokenNotes, "gather", gather)


def train_on(recorder: TokenRecorder, rollouts: list[Rollout]) -> None:
    """Two steps of two responses each."""
    for step in range(2):
        own = rollouts[2 * step : 2 * step + 2]
        batch = SimpleNamespace(responses=tuple(ResponseTokens(r, range(3)) for r in own))
        if (notes := recorder.notes(step)) is not None:
            notes.take(batch, slice(0, 6), columns_of(6 * step, 6), details_of)
        recorder.finish_step(step)


@pytest.mark.parametrize("samples,steps", [(2, [0, 0]), (3, [0, 0, 1]), (8, [0, 0, 1, 1])])
def test_a_recording_is_whole_once_its_last_response_was_trained_on(
    alone, tmp_path, samples, steps
):
    session, told = session_of(tmp_path, record_tokens_samples=samples)
    rollouts = rollouts_of(4, 1)
    train_on(TokenRecorder(session, 10, rollouts, 0), rollouts)
    record = read_tokens(training_file(tmp_path, 10))
    assert [r.step for r in record.responses] == steps and not told
    count = 3 * len(steps)
    assert record.signals["loss"].tolist() == list(range(count))
    # Alternatives are where the teacher's entropy reaches the threshold of the token's own step.
    assert record.top_rows_G.tolist() == [t for t in range(count) if t not in (0, 6)]
    assert [piece.content for piece in record.pieces.values()][:3] == [b"0", b"1", b"2"]


@pytest.mark.parametrize(
    "logging,iteration,first_step",
    [
        ({"record_tokens_interval": 0}, 0, 0),
        ({}, 4, 0),
        ({"record_tokens_samples": 0}, 5, 0),
        ({}, 5, 1),  # signals of the first step went with the start that took it
    ],
)
def test_nothing_is_recorded_where_nothing_is_due(alone, tmp_path, logging, iteration, first_step):
    session, _ = session_of(tmp_path, **logging)
    rollouts = rollouts_of(4, 1)
    recorder = TokenRecorder(session, iteration, rollouts, first_step)
    assert [recorder.notes(step) for step in range(2)] == [None, None]
    train_on(recorder, rollouts)
    assert not (tmp_path / "tokens").exists()


def test_a_disk_that_is_full_is_told_and_costs_a_recording(alone, tmp_path):
    session, told = session_of(tmp_path)
    (tmp_path / "tokens").write_text("")  # no folder can be made there
    rollouts = rollouts_of(4, 1)
    train_on(TokenRecorder(session, 0, rollouts, 0), rollouts)
    assert len(told) == 1 and "000000.npz could not be written" in told[0]


def test_every_token_is_there_or_nothing_is_written(alone, tmp_path):
    session, told = session_of(tmp_path)
    rollouts = rollouts_of(4, 1)
    recorder = TokenRecorder(session, 0, rollouts, 0)
    half = SimpleNamespace(responses=(ResponseTokens(rollouts[0], range(2)),))
    recorder.notes(0).take(half, slice(0, 2), columns_of(0, 2), details_of)
    recorder.finish_step(1)
    assert len(told) == 1 and "AssertionError: 10 missing" in told[0]
    assert not [*tmp_path.glob("tokens/*")]


def test_a_half_written_recording_is_taken_away(alone, tmp_path, monkeypatch):
    """It would keep a full disk full."""

    def fill_the_disk(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fill_the_disk)
    session, told = session_of(tmp_path)
    rollouts = rollouts_of(4, 1)
    train_on(TokenRecorder(session, 0, rollouts, 0), rollouts)
    assert len(told) == 1 and "No space left" in told[0]
    assert not [*tmp_path.glob("tokens/*")]


def test_recorded_rollouts_are_chosen_as_they_were(tmp_path):
    """Read back each has a prompt object of its own."""
    rollouts = rollouts_of(4, 8)
    tokenizer = SimpleNamespace(decode=lambda ids: "")
    write_rollouts(tmp_path / "r.jsonl", rollouts, tokenizer)
    again = [rollout for _, rollout in read_rollouts(tmp_path / "r.jsonl")]
    assert choose(again, 8) == choose(rollouts, 8)
