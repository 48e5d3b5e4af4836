"""The Countdown task: its enumeration, its split, its verifier and its tokenizer."""

import random
from itertools import permutations
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_eopd.tasks import countdown
from megatron_eopd.tasks.countdown import Problem

PROBLEMS = list(countdown.all_problems())

# deadline=None below: the first example of a session pays for caches, and CPUs may be shared.


def sample_problems(count: int) -> list[Problem]:
    return random.Random(0).sample(PROBLEMS, count)


@st.composite
def solved_problems(draw: st.DrawFn) -> tuple[Problem, str]:
    problem = draw(st.sampled_from(PROBLEMS))
    return problem, draw(st.sampled_from(countdown.all_problems()[problem]))


# --- enumeration --------------------------------------------------------------------------------


def test_enumeration_has_the_known_counts():
    """14,081 solvable problems over all 495 multisets, 103,099 traces, median 4 per problem."""
    traces = countdown.all_problems()
    counts = [len(problem_traces) for problem_traces in traces.values()]
    assert len(traces) == 14_081
    assert len({problem.numbers for problem in traces}) == 495
    assert sum(counts) == 103_099
    assert median(counts) == 4
    assert sum(count == 1 for count in counts) / len(counts) == pytest.approx(0.160, abs=5e-4)


def brute_force_traces(problem: Problem) -> set[str]:
    """Every ordered pair of positions under every operator, three times; a set drops repeats."""
    states = {((), problem.numbers)}
    for _ in range(3):
        states = {
            ((*steps, f"{a} {op} {b} = {result}"), (*rest, result))
            for steps, pool in states
            for (i, a), (j, b) in permutations(enumerate(pool), 2)
            for rest in [tuple(pool[k] for k in range(len(pool)) if k not in (i, j))]
            for op, result in [("+", a + b), ("-", a - b), ("*", a * b)]
            if a >= b and result <= 99
        }
    return {" ; ".join(steps) for steps, pool in states if pool == (problem.target,)}


def test_enumeration_agrees_with_brute_force():
    """The recursive enumeration misses nothing and repeats nothing."""
    for problem in sample_problems(60):
        traces = countdown.all_problems()[problem]
        assert len(set(traces)) == len(traces) == countdown.num_valid_traces(problem)
        assert set(traces) == brute_force_traces(problem), problem


def test_problem_without_solution_has_no_valid_trace():
    """1 1 1 1 cannot give 50, and asking is no error."""
    assert countdown.num_valid_traces(Problem((1, 1, 1, 1), 50)) == 0


# --- problems and split -------------------------------------------------------------------------


def test_problem_travels_as_answer_text():
    """Every problem survives the trip through the "answer" field of a prompt record."""
    assert Problem((3, 5, 7, 8), 24).answer_text() == "3 5 7 8 -> 24"
    assert all(Problem.from_answer(problem.answer_text()) == problem for problem in PROBLEMS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3 5 7 8",
        "3 5 7 8 -> 24 :",
        "3  5 7 8 -> 24",
        "3 5 7 -> 24",
        "3 5 7 8 -> 0",
        "3 5 7 8 -> 51",
        "0 5 7 8 -> 24",
        "3 5 7 10 -> 24",
        "8 5 7 3 -> 24",
        "3 5 7 8 -> 024",
    ],
)
def test_malformed_answer_text_is_refused(text):
    """A wrong answer column fails at once instead of grading every response as wrong."""
    with pytest.raises(ValueError, match=r"no Countdown problem|out of range|must ascend"):
        Problem.from_answer(text)


def test_split_holds_out_whole_multisets():
    """No test problem shares its numbers with a training problem, and nothing is lost."""
    train, test = countdown.split("train"), countdown.split("test")
    train_multisets = {problem.numbers for problem in train}
    test_multisets = {problem.numbers for problem in test}
    assert not train_multisets & test_multisets
    assert len(test_multisets) == 50
    assert len(test) == 1_559
    assert sorted(train + test, key=Problem.answer_text) == sorted(
        PROBLEMS, key=Problem.answer_text
    )


def test_split_is_the_same_every_time_and_cannot_be_spoilt():
    """Two calls agree, also after a caller has reordered its own list."""
    first = countdown.split("test")
    expected = list(first)
    first.reverse()
    assert countdown.split("test") == expected
    with pytest.raises(ValueError, match=r"does not exist.*train.*test"):
        countdown.split("validation")


# --- verifier -----------------------------------------------------------------------------------


def test_verifier_accepts_every_enumerated_trace_and_canonical_keeps_it():
    """All 103,099 traces are right and already in canonical spelling."""
    for problem, traces in countdown.all_problems().items():
        for trace in traces:
            assert countdown.verify(problem, trace), (problem, trace)
            assert countdown.canonical(trace) == trace


@settings(deadline=None)
@given(solved_problems(), st.lists(st.booleans(), min_size=3, max_size=3))
def test_operands_of_plus_and_times_may_be_swapped(solved, swaps):
    """3 + 8 is as right as 8 + 3, and counts as the same trace; 8 - 3 may not be swapped."""
    problem, trace = solved
    steps = [step.split(" ") for step in trace.split(" ; ")]
    swapped = [
        [b, op, a, equals, result] if swap and op != "-" else [a, op, b, equals, result]
        for (a, op, b, equals, result), swap in zip(steps, swaps, strict=True)
    ]
    text = " ; ".join(" ".join(step) for step in swapped)
    assert countdown.verify(problem, text)
    assert countdown.canonical(text) == trace


WORDS = [*map(str, range(100)), "+", "-", "*", "=", ";", "->", ":"]


@settings(max_examples=200, deadline=None)
@given(solved_problems(), st.integers(0, 16), st.sampled_from(WORDS))
def test_verifier_accepts_a_mutation_only_if_it_is_another_solution(solved, position, word):
    """After any one-token change, right means: its canonical spelling is an enumerated trace."""
    problem, trace = solved
    words = trace.split(" ")
    words[position] = word
    text = " ".join(words)
    is_solution = countdown.canonical(text) in countdown.all_problems()[problem]
    assert countdown.verify(problem, text) == is_solution
    if position % 6 == 4 and text != trace:  # a result: exactly one value of it is right
        assert not countdown.verify(problem, text)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PROBLEMS), st.data())
def test_verifier_agrees_with_the_enumeration_on_arbitrary_steps(problem, data):
    """Whatever three grammatical steps say, they are right iff the enumeration holds them."""
    number = st.sampled_from([*problem.numbers, problem.target]) | st.integers(0, 99)
    steps = [
        f"{data.draw(number)} {data.draw(st.sampled_from('+-*'))} {data.draw(number)}"
        f" = {data.draw(number)}"
        for _ in range(3)
    ]
    text = " ; ".join(steps)
    is_solution = countdown.canonical(text) in countdown.all_problems()[problem]
    assert countdown.verify(problem, text) == is_solution


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        ("", "empty"),
        ("8 * 3 = 24", "one step, two numbers unused"),
        ("8 * 3 = 24 ; 7 - 5 = 2 ; 24 + 2 = 26 ; 26 - 2 = 24", "four steps"),
        ("8 * 3 = 24 ; 8 * 3 = 24 ; 24 + 0 = 24", "numbers used twice"),
        ("7 + 5 = 12 ; 8 - 3 = 5 ; 12 + 5 = 24", "wrong sum"),
        ("7 + 5 = 12 ; 8 - 3 = 5 ; 12 + 5 = 17", "another target"),
        ("5 - 7 = -2 ; 8 * 3 = 24 ; 24 + -2 = 22", "negative result"),
        ("8 / 3 = 2 ; 7 - 5 = 2 ; 2 * 2 = 4", "unknown operator"),
        ("7 - 5 = 2 ; 8 * 3 = 24 ; 24 - 0 = 24", "a number from nowhere"),
        ("7 ** 5 = 12 ; 8 - 3 = 5 ; 12 + 5 = 24", "an operator of another language"),
    ],
)
def test_verifier_rejects_wrong_responses(text, flaw):
    """Every flaw a model shows counts as wrong and raises nothing."""
    assert not countdown.verify(Problem((3, 5, 7, 8), 24), text), flaw


@pytest.mark.parametrize(
    "spoil",
    [
        lambda trace: trace + " ;",
        lambda trace: trace + "\n",
        lambda trace: " " + trace,
        lambda trace: trace.replace(" ; ", ";"),
        lambda trace: trace.replace(" ", "  "),
        lambda trace: trace.replace("8", "08"),
        lambda trace: trace.replace("8", "٨"),  # a digit to int() and to \d
        lambda trace: trace + " ; 24 + 0 = 24",
    ],
)
def test_verifier_rejects_text_outside_the_grammar(spoil):
    """A right trace in a spelling that the tokenizer cannot produce is no answer."""
    problem = Problem((3, 5, 7, 8), 24)
    trace = next(trace for trace in countdown.all_problems()[problem] if "8" in trace)
    assert countdown.verify(problem, trace)
    assert not countdown.verify(problem, spoil(trace))
    assert countdown.canonical(spoil(trace)) == spoil(trace)


def as_expression(numbers: tuple[int, ...], trace: str) -> str:
    """The three steps as one bracketed expression over the given numbers."""
    pool = [(number, str(number)) for number in numbers]
    for step in trace.split(" ; "):
        a, op, b, _, result = step.split(" ")
        operands = []
        for operand in (int(a), int(b)):
            index = next(i for i, (value, _) in enumerate(pool) if value == operand)
            operands.append(pool.pop(index)[1])
        pool.append((int(result), f"({operands[0]} {op} {operands[1]})"))
    (_, expression) = pool[0]
    return expression


def test_verifier_agrees_with_reasoning_gym():
    """Their scorer gives 1.0 to the trace's expression for its own target, and only for that."""
    countdown_game = pytest.importorskip(
        "reasoning_gym.games.countdown",
        reason="reasoning-gym, the independent scorer of this check, is not installed",
    )
    scorer = countdown_game.CountdownDataset(countdown_game.CountdownConfig(size=1))
    rng = random.Random(0)
    for problem in sample_problems(100):
        trace = rng.choice(countdown.all_problems()[problem])
        expression = as_expression(problem.numbers, trace)
        for target in (problem.target, problem.target % 50 + 1):
            entry = {"metadata": {"numbers": list(problem.numbers), "target": target}}
            # Partial credit of 0.01 and 0.05 goes to wrong answers: only 1.0 means right.
            is_right = scorer.score_answer(expression, entry) == 1.0
            assert is_right == countdown.verify(Problem(problem.numbers, target), trace)


# --- tokenizer ----------------------------------------------------------------------------------


def test_every_sequence_is_7_prompt_and_18_response_tokens():
    """One token per word for all problems and traces, none of them unknown."""
    tokenizer = countdown.build_tokenizer()
    for problem, traces in countdown.all_problems().items():
        prompt_ids = tokenizer.encode(problem.prompt_text())
        response_ids = tokenizer.encode(f"{traces[0]} {tokenizer.eos_token}")
        assert len(prompt_ids) == countdown.PROMPT_LENGTH == 7
        assert len(response_ids) == countdown.RESPONSE_LENGTH == 18
        assert response_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in prompt_ids + response_ids


def test_tokenizer_round_trips_and_loads_offline(tmp_path, monkeypatch):
    """AutoTokenizer reads what save_pretrained wrote, without a network, to the same ids."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = countdown.build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(loaded) == countdown.VOCAB_SIZE == 112
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(loaded, name) == getattr(tokenizer, name) is not None
    for problem in sample_problems(50):
        for trace in countdown.all_problems()[problem]:
            ids = loaded.encode(trace)
            assert ids == tokenizer.encode(trace)
            text = loaded.decode([*ids, loaded.eos_token_id], skip_special_tokens=True)
            assert text == trace


def test_number_tokens_have_the_numbers_as_ids():
    """The number n is token n, so dumps of ids can be read."""
    assert countdown.build_tokenizer().encode("0 7 42 99") == [0, 7, 42, 99]
