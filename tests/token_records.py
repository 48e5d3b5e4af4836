"""Recordings of tokens that nobody has sampled: known by heart, hostile, and of a real size."""

from dataclasses import replace

import numpy as np

from megatron_eopd.tokens.record import (
    SIGNALS,
    TOP,
    About,
    Piece,
    RecordedPrompt,
    RecordedResponse,
    TokenRecord,
)

THRESHOLD = 0.8
ABOUT = About(
    kind="training",
    iteration=120,
    task="",
    objective="eopd",
    threshold=THRESHOLD,
    gate="step",
    student="models/student",
    teachers={"teacher": "models/teacher"},
    temperature=1.0,
    payload="hidden",
    top_tokens="notable",
)
END = 1
WORDS = (
    *(" the", " sum", " of", " both", " is", " so", " we", " have", " then", " 12", " 7", " +"),
    *(" =", ".", ",", "\n", "\n\n", "  ", " Let", " x", " Therefore", " answer", "\t", " und"),
)
FIRST_WORD = 10
HOSTILE = (
    *(b"<script>alert(1)</script>", b"</script><script>alert(2)</script>", b"<img src=x"),
    *(b" onerror=alert(3)>", b"<!--", b"&lt;b&gt;", b"\x1b[31mred\x1b[0m", b"\x00\x07\r", b"\xff"),
    *(
        b"\xe4\xbd",
        b"\xa0",
        b"\xf0\x9f",
        b"\x98\x80",
        b"\xc0\xaf",
        b"\xed\xa0\x80",
        b"\xe2\x80\xae",
    ),
    *("שלום".encode(), "مرحبا".encode(), "\u2066\u200b\u0085\ufeff\u2028".encode(), b"{{script}}"),
    *(b"$&", b"\\u003cscript>", "\u202eevil\u202c".encode(), b"']\"`;"),
)


def pieces() -> dict[int, Piece]:
    known = {0: Piece(b"<|im_start|>", True), END: Piece(b"<|im_end|>", True)}
    known |= {FIRST_WORD + n: Piece(word.encode(), False) for n, word in enumerate(WORDS)}
    return known


def make_record(
    lengths: tuple[tuple[int, ...], ...] = ((12, 9), (15, 15)),
    seed: int = 0,
    vocabulary: int | None = None,
    shared: int = 4,
    **about: object,
) -> TokenRecord:
    """`lengths`: of the responses to each prompt; siblings have their first `shared` tokens alike;
    `vocabulary`: that many tokens instead of a few words."""
    draw = np.random.default_rng(seed)
    texts = pieces()
    if vocabulary:
        texts |= {
            n: Piece(b" " + n.to_bytes(3, "big").hex().encode(), False)
            for n in range(FIRST_WORD + len(WORDS), vocabulary)
        }
    words = max(texts) + 1 - FIRST_WORD
    responses, ids = [], []
    for prompt, own in enumerate(lengths):
        begin = FIRST_WORD + _drawn_words(draw, words, shared)
        for sample, length in enumerate(own):
            is_cut = sample % 2 == 1
            drawn = np.concatenate([begin, FIRST_WORD + _drawn_words(draw, words, length)])[:length]
            if not is_cut:
                drawn[-1] = END
            ids.append(drawn)
            reason = "length" if is_cut else "stop"
            responses.append(RecordedResponse(prompt, sample, length, reason, "sampled", 0, ""))
    prompts = tuple(
        RecordedPrompt(
            n, f"question {n}: add the numbers", (0, FIRST_WORD + n % 8, FIRST_WORD, END), "19", ""
        )
        for n in range(len(lengths))
    )
    about = replace(ABOUT, **about)
    return _with_signals(
        draw, np.concatenate(ids).astype(np.int32), prompts, tuple(responses), texts, about, words
    )


def _drawn_words(draw: np.random.Generator, words: int, count: int) -> np.ndarray:
    """As in language: few often, many seldom."""
    return np.minimum((words * draw.random(count) ** 3).astype(np.int64), words - 1)


def _with_signals(draw, ids_T, prompts, responses, texts, about, words) -> TokenRecord:
    count = len(ids_T)
    entropy_T = draw.gamma(0.6, 1.25, count)
    reverse_T, forward_T = draw.gamma(0.3, 0.5, count), draw.gamma(0.3, 0.6, count)
    gate_T = (entropy_T >= about.threshold).astype(np.float32)
    student_T, teacher_T = -draw.gamma(0.7, 1.0, count), -draw.gamma(0.8, 1.2, count)
    signals = {
        "teacher_entropy": entropy_T,
        "gate": gate_T,
        "reverse_kl": reverse_T,
        "forward_kl": forward_T,
        "student_entropy": np.abs(entropy_T + draw.normal(0, 0.3, count)),
        "engine_mismatch": draw.normal(0, 3e-3, count),
        "student_logprob": student_T,
        "teacher_logprob": teacher_T,
        "loss": reverse_T + gate_T * forward_T,
    }
    rows_G = np.flatnonzero(gate_T if about.top_tokens == "notable" else np.ones(count))
    tops = _tops(draw, ids_T[rows_G], words)
    return TokenRecord(
        about=about,
        prompts=prompts,
        responses=responses,
        ids_T=ids_T,
        signals={name: signals[name].astype(np.float32) for name in SIGNALS},
        student_rank_T=draw.geometric(0.7, count).astype(np.int32),
        teacher_rank_T=draw.geometric(0.6, count).astype(np.int32),
        top_rows_G=rows_G.astype(np.int32),
        top_ids_GK=tops[0],
        top_student_logprobs_GK=tops[1],
        top_teacher_logprobs_GK=tops[2],
        pieces=texts,
    )


def _tops(draw, ids_G, words) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Five of the teacher's, and two that the student's list adds to them."""
    rows, added = len(ids_G), 2
    begin_G = (ids_G - FIRST_WORD).clip(0)
    # Another one in each column.
    offsets_GK = np.cumsum(draw.integers(1, 4, (rows, TOP + added)), axis=1) - 1
    top_ids_GK = np.full((rows, 2 * TOP), -1, np.int32)
    top_ids_GK[:, : TOP + added] = FIRST_WORD + (begin_G[:, None] + offsets_GK) % words
    teacher_GK = np.full((rows, 2 * TOP), np.nan, np.float32)
    teacher_GK[:, : TOP + added] = _falling(draw, rows, TOP + added)
    student_GK = np.full_like(teacher_GK, np.nan)
    student_GK[:, : TOP + added] = draw.permuted(_falling(draw, rows, TOP + added), axis=1)
    return top_ids_GK, student_GK, teacher_GK


def _falling(draw, rows: int, columns: int) -> np.ndarray:
    """Log-probabilities, the most probable first."""
    weights = draw.gamma(0.5, 1.0, (rows, columns)) + 1e-6
    logprobs = np.log(0.97 * weights / weights.sum(1, keepdims=True))
    return -np.sort(-logprobs, axis=1)


def big_record(responses: int = 128, length: int = 4096) -> TokenRecord:
    """Of a real run: eight samples of each prompt."""
    own = (length,) * 8
    return make_record((own,) * (responses // 8), vocabulary=60_000, shared=12)


def hostile_record() -> TokenRecord:
    """Whose tokens, prompts and names would do harm to a page or a terminal that took them as they
    are. The one response has each hostile token once, in order."""
    record = make_record(((len(HOSTILE),),), shared=0)
    text = "<script>alert(4)</script>\x1b[2J\u202e <img src=x onerror=alert(5)>"
    texts = record.pieces | {100 + n: Piece(content, False) for n, content in enumerate(HOSTILE)}
    name = "</title><script>alert(6)</script>\x1b[31m{{data}}"
    return replace(
        record,
        about=replace(record.about, student=name, teachers={name: name}),
        prompts=(record.prompts[0]._replace(text=text, ids=(7, 8), answer=text),),
        ids_T=np.arange(100, 100 + len(HOSTILE), dtype=np.int32),
        responses=(record.responses[0]._replace(verdict=text),),
        pieces=texts,
    )


def written_by_hand() -> TokenRecord:
    """Two responses of five and four tokens, of which every value is a round one."""
    record = make_record(((5, 4),), shared=0)
    w = FIRST_WORD
    ids_T = np.array([w, w + 1, w + 2, w + 3, END, w, w + 1, w + 4, w + 5], np.int32)
    count = len(ids_T)
    signals = {name: np.arange(count, dtype=np.float32) / 10 + n for n, name in enumerate(SIGNALS)}
    signals["teacher_entropy"] = np.array([0.1, 0.2, 1.5, 0.3, 0.0, 0.1, 0.2, 1.6, 2.0], np.float32)
    signals["gate"] = (signals["teacher_entropy"] >= THRESHOLD).astype(np.float32)
    signals["engine_mismatch"] = np.array([1e-5, -2e-3, *[0.0] * 6, np.nan], np.float32)
    top_ids_GK = np.full((3, 2 * TOP), -1, np.int32)
    student_GK = np.full((3, 2 * TOP), np.nan, np.float32)
    teacher_GK = np.full((3, 2 * TOP), np.nan, np.float32)
    top_ids_GK[:, :TOP] = w + np.arange(TOP)
    top_ids_GK[:, TOP] = w + 9
    teacher_GK[:, :TOP] = np.log([0.4, 0.3, 0.1, 0.1, 0.05])
    student_GK[:, :TOP] = np.log([0.1, 0.2, 0.05, 0.01, 0.04])
    teacher_GK[:, TOP], student_GK[:, TOP] = np.log(0.001), np.log(0.5)
    return replace(
        record,
        ids_T=ids_T,
        signals=signals,
        student_rank_T=np.arange(1, count + 1, dtype=np.int32),
        teacher_rank_T=np.array([*range(2, count + 1), 0], np.int32),
        top_rows_G=np.flatnonzero(signals["gate"]).astype(np.int32),
        top_ids_GK=top_ids_GK,
        top_student_logprobs_GK=student_GK,
        top_teacher_logprobs_GK=teacher_GK,
    )


def with_infinite_values() -> TokenRecord:
    """That of written_by_hand, whose second response begins with a token that the teacher cannot
    write, while the student's prediction of the token after it is not known at all."""
    record = written_by_hand()
    first, second = record.starts[1], record.starts[1] + 1
    for name in ("reverse_kl", "loss"):
        record.signals[name][first] = np.inf
    record.signals["teacher_logprob"][first] = -np.inf
    record.signals["engine_mismatch"][first] = -np.inf
    for name in ("reverse_kl", "forward_kl", "student_entropy", "loss"):
        record.signals[name][second] = np.nan
    record.top_teacher_logprobs_GK[0, TOP] = -np.inf
    record.top_student_logprobs_GK[0, 3:5] = -np.inf
    return record
