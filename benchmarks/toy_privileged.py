"""What a teacher that is shown a solution does to its student, on Countdown, over several seeds.

In: nothing. Out: OUTPUT/table.md and table.json. Makes models that can be shown a solution
(tools/make_toy_models.py), measures how unsure the teacher is with a solution and without, on the
same responses, and trains the quick start's student with each kind of teacher. The two kinds are
one model: they differ by what it reads. Two more arms have a student teach itself that can be shown
a solution: as it was at the start, and as the average of its past. Stopped at any point, the same
command goes on; what is done is not done again.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from math import log, sqrt
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit
from tqdm import tqdm
from transformers import Qwen3ForCausalLM

from megatron_eopd.cli import positive
from megatron_eopd.evaluation.estimators import highest, per_problem
from megatron_eopd.evaluation.intervals import paired
from megatron_eopd.evaluation.report_text import number, table
from megatron_eopd.evaluation.reports import Report, read_report
from megatron_eopd.tasks import countdown

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

import make_toy_models as toy  # noqa: E402  tools/ is no package

# Shapes: P problems, N samples of each, B = P·N responses, R tokens of a response, V vocabulary.

EXAMPLES = """examples:
  python benchmarks/toy_privileged.py
      5 seeds of four arms, about 40 minutes on two cores
  python benchmarks/toy_privileged.py --arms plain shown --seeds 2 --iterations 3 --problems 20 \\
      --steps-scale 0.01 --output /tmp/trial
      a trial of the script, whose numbers say nothing
"""
QUICKSTART = "examples/quickstart/eopd.toml"
LONGEST = 24
"""Tokens of a response, as in the quick start."""
STEP_LENGTH = 6
"""Tokens of `a op b = c ;`: the first three are chosen, the fifth follows from them."""
KINDS = {"choices": (0, 1, 2), "results": (4,), "= and ;": (3, 5)}
KS = (1, 4, 8, 16)
PER_PROBLEM = ("pass@1", "pass@4", "pass@8", "pass@16", "distinct_correct@16", "coverage")
"""pass@1 is also avg@16."""
OVER_TOKENS = ("KL to the teacher without", "KL to the teacher with", "student entropy")
MOST_ENTROPY = log(countdown.VOCAB_SIZE)
SEED = 0xC0DE
"""Of bootstrap draws."""


@dataclass(frozen=True)
class Arm:
    """Who teaches whom; models are directories under OUTPUT/models or of the quick start."""

    student: str
    teacher: str
    overrides: tuple[str, ...] = ()


EMA = "teacher.ema_decay=0.9"
SHOWN = (f"data.teacher_prompt_template={json.dumps(toy.SHOWN_TEMPLATE)}",)
ARMS = {
    "plain": Arm("student", "privileged_teacher"),
    "shown": Arm("student", "privileged_teacher", SHOWN),
    "self": Arm("privileged_student", "privileged_student", (*SHOWN, "teacher.source=student")),
}
ARMS["self_ema"] = replace(ARMS["self"], overrides=(*ARMS["self"].overrides, EMA))


# --- models and runs ----------------------------------------------------------------------------


def model_path(output: Path, name: str) -> Path:
    return toy.SHIPPED / name if name == "student" else output / "models" / name


def make_models(output: Path, arms: Sequence[str], steps_scale: float) -> None:
    for name in dict.fromkeys(ARMS[arm].teacher for arm in arms):
        if not model_path(output, name).exists():
            command = [sys.executable, "tools/make_toy_models.py", "--which", name]
            command += ["--output", str(output / "models"), "--steps-scale", str(steps_scale)]
            subprocess.run(command, cwd=ROOT, check=True, env=environment())


def environment() -> dict[str, str]:
    # One thread for each process: more cost more than they give on models this small.
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Run:
    arm: str
    seed: int
    options: argparse.Namespace

    @property
    def directory(self) -> Path:
        return self.options.output / "runs" / f"{self.arm}-{self.seed}"

    @property
    def is_done(self) -> bool:
        """The export is the last thing that a run writes of what is read here."""
        return (self.directory / "hf" / "config.json").is_file() and self.path(after=True).is_file()

    def path(self, *, after: bool) -> Path:
        iteration = self.options.iterations if after else 0
        return self.directory / "evaluations" / f"{iteration:06}" / "countdown.json"

    def report(self, *, after: bool) -> Report:
        return read_report(self.path(after=after))

    def model(self, *, after: bool) -> Path:
        """Of the student."""
        return (
            self.directory / "hf"
            if after
            else model_path(self.options.output, ARMS[self.arm].student)
        )

    def train(self) -> None:
        """
        Raises:
            RuntimeError: it failed, with the end of what it printed.
        """
        arm, options = ARMS[self.arm], self.options
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"),
            *("-m", "megatron_eopd.train", QUICKSTART, f"run_dir={self.directory}"),
            f"student.hf_path={model_path(options.output, arm.student)}",
            f"teacher.hf_path={model_path(options.output, arm.teacher)}",
            *arm.overrides,
            *(f"seed={self.seed}", f"training.train_iters={options.iterations}"),
            # Half the quick start's samples in steps of half the size: it is four steps, too.
            *("rollout.batch_size=256", "training.global_batch_size=64"),
            *("training.micro_batch_size=64", "parallel.tensor_model_parallel_size=1"),
            *("rollout.engine=megatron", f"evaluation.num_problems={options.problems}"),
            *("checkpoint.save_interval=20", "checkpoint.keep_last=1", "logging.trackers=[]"),
        ]
        log = self.directory.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=file, stderr=file)
        if done.returncode != 0:
            end = "\n".join(log.read_text().splitlines()[-15:])
            raise RuntimeError(f"{self.directory.name} failed, see {log}:\n{end}")


def train_all(runs: Sequence[Run], jobs: int) -> None:
    missing = [run for run in runs if not run.is_done]
    with (
        tqdm(total=len(missing), desc="training", unit="run", smoothing=0) as progress,
        ThreadPoolExecutor(jobs) as pool,
    ):
        try:
            for future in as_completed([pool.submit(run.train) for run in missing]):
                future.result()
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# --- what the models say of the same responses --------------------------------------------------


@dataclass(frozen=True)
class Responses:
    """Of one evaluation, sample by sample; those of a problem stand together."""

    ids_BR: torch.Tensor
    """Padded on the right."""
    mask_BR: torch.Tensor
    is_whole_B: torch.Tensor
    """Three steps by the grammar, so that a token's place says what it is."""
    num_samples: int

    @classmethod
    def read(cls, report_path: Path) -> "Responses":
        lines = report_path.with_name("countdown.samples.jsonl").read_text().splitlines()[1:]
        # Problems stand in the file in the order in which they were finished.
        rows = sorted(map(json.loads, lines), key=lambda row: (row["problem"], row["sample"]))
        num_problems = rows[-1]["problem"] + 1
        ids_BR = torch.zeros(len(rows), LONGEST, dtype=torch.long)
        mask_BR = torch.zeros(len(rows), LONGEST, dtype=torch.bool)
        for b, row in enumerate(rows):
            length = len(row["response_ids"])
            ids_BR[b, :length] = torch.tensor(row["response_ids"])
            mask_BR[b, :length] = True
        is_whole_B = torch.tensor([row["verdict"] in ("right", "wrong") for row in rows])
        return cls(ids_BR, mask_BR, is_whole_B, len(rows) // num_problems)


@cache
def prompts_of(num_problems: int, *, shown: bool) -> tuple[str, ...]:
    problems = list(countdown.Countdown().problems())[:num_problems]
    template = toy.SHOWN_TEMPLATE if shown else "{prompt}"
    return tuple(template.format(prompt=p.text, **p.columns) for p in problems)


@torch.inference_mode()
def logprobs_of(
    model: Qwen3ForCausalLM, responses: Responses, *, shown: bool, at_once: int = 400
) -> torch.Tensor:
    """log-probabilities [B, R, V] at temperature 1, which is the runs' own."""
    num_problems = len(responses.ids_BR) // responses.num_samples
    prompts = prompts_of(num_problems, shown=shown)
    prompt_ids_PS = countdown.build_tokenizer()(list(prompts), return_tensors="pt")["input_ids"]
    prompt_ids_BS = prompt_ids_PS.repeat_interleave(responses.num_samples, dim=0)
    input_ids = torch.cat([prompt_ids_BS, responses.ids_BR], dim=1)[:, :-1]
    logits = [
        model(chunk, logits_to_keep=LONGEST, use_cache=False).logits
        for chunk in input_ids.split(at_once)
    ]
    return torch.cat(logits).log_softmax(-1)


def entropy_of(logprobs_BRV: torch.Tensor) -> torch.Tensor:
    return -(logprobs_BRV.exp() * logprobs_BRV).sum(-1)


def by_problem(values_BR: torch.Tensor, mask_BR: torch.Tensor, num_samples: int) -> np.ndarray:
    """Mean over each problem's tokens under the mask, NaN where there is none."""
    sums_P = (values_BR * mask_BR).sum(-1).view(-1, num_samples).sum(-1)
    counts_P = mask_BR.sum(-1).view(-1, num_samples).sum(-1)
    return (sums_P.double() / counts_P).numpy()


def teacher_rows(run: Run) -> list[tuple[str, ...]]:
    """The teacher with a solution and without: its entropy on the student's responses before
    distillation, and what it answers itself."""
    teacher = toy.load_model(model_path(run.options.output, ARMS[run.arm].teacher)).eval()
    responses = Responses.read(run.path(after=False))
    place_R = torch.arange(LONGEST) % STEP_LENGTH
    whole_BR = responses.mask_BR & responses.is_whole_B[:, None]
    without, with_it = (
        entropy_of(logprobs_of(teacher, responses, shown=shown)) for shown in (False, True)
    )
    masks = {
        kind: whole_BR & torch.isin(place_R, torch.tensor(places)) for kind, places in KINDS.items()
    }
    follows_BR = follows_solution(responses)
    masks["choices, as in the solution so far"] = masks["choices"] & follows_BR
    masks["choices, otherwise than it so far"] = masks["choices"] & ~follows_BR
    rows = []
    for kind, mask_BR in masks.items():
        pair = [by_problem(h, mask_BR, responses.num_samples) for h in (without, with_it)]
        rows.append(difference_row(f"entropy at {kind}, nats", *pair, largest=MOST_ENTROPY))
    gates = [(h >= 0.8).float() for h in (without, with_it)]
    pair = [by_problem(gate, whole_BR, responses.num_samples) for gate in gates]
    rows.append(difference_row("tokens at 0.8 nats or above", *pair))
    num_problems = len(responses.ids_BR) // responses.num_samples
    answers = [
        toy.evaluate(
            teacher,
            countdown.split("test")[:num_problems],
            num_samples=16,
            seed=SEED,
            prompts=list(prompts_of(num_problems, shown=shown)),
        )
        for shown in (False, True)
    ]
    for name in ("pass@1", "pass@16", "distinct_correct@16", "coverage"):
        a, b = (figures[name] for figures in answers)
        rows.append((f"its own answers: {name}", number(a), number(b), number(b - a, sign=True)))
    return rows


def follows_solution(responses: Responses) -> torch.Tensor:
    """[B, R]: whether the tokens before this one are those of the solution that was shown."""
    num_problems = len(responses.ids_BR) // responses.num_samples
    texts = [p.columns["solution"] for p in countdown.Countdown().problems()]
    ids_PR = countdown.build_tokenizer()(texts[:num_problems], return_tensors="pt")["input_ids"]
    ids_BR = ids_PR.repeat_interleave(responses.num_samples, dim=0)
    is_same_BR = responses.ids_BR[:, : ids_BR.shape[1]] == ids_BR
    follows_BR = torch.zeros_like(responses.mask_BR)
    follows_BR[:, 0] = True
    follows_BR[:, 1 : ids_BR.shape[1] + 1] = is_same_BR.cumprod(dim=1).bool()
    return follows_BR


def difference_row(
    name: str, a_P: np.ndarray, b_P: np.ndarray, *, largest: float = 1.0
) -> tuple[str, ...]:
    pair = paired(a_P, b_P, SEED, highest=largest)
    change = f"{number(pair.difference, sign=True)} {interval(pair.low, pair.high)}"
    return (name, number(float(np.nanmean(a_P))), number(float(np.nanmean(b_P))), change)


# --- what became of the students ----------------------------------------------------------------


@dataclass(frozen=True)
class Student:
    """Of one seed, before or after distillation."""

    figures: Mapping[str, float]
    values_P: Mapping[str, np.ndarray]
    """Figure → its value for each problem, where there is one."""


def measure(run: Run, *, after: bool) -> Student:
    report = run.report(after=after)
    ks = [k for k in KS if k <= report.settings.num_samples]
    found = per_problem(report.outcomes, ks)
    found["pass@1"] = found[f"avg@{report.settings.num_samples}"]
    values_P = {name: found[name] for name in PER_PROBLEM}
    over_tokens = measure_tokens(run, after=after)
    check_against_report(run, over_tokens, report, after=after)
    return Student({name: float(v.mean()) for name, v in values_P.items()} | over_tokens, values_P)


def measure_tokens(run: Run, *, after: bool) -> dict[str, float]:
    """Means over the tokens of its own answers to held-out problems: exact KL(student ‖ teacher) to
    the teacher as it began, without a solution and with one, and the student's entropy."""
    responses = Responses.read(run.path(after=after))
    student = toy.load_model(run.model(after=after)).eval()
    teacher = toy.load_model(model_path(run.options.output, ARMS[run.arm].teacher)).eval()
    student_BRV = logprobs_of(student, responses, shown=False)
    values = [
        (student_BRV.exp() * (student_BRV - logprobs_of(teacher, responses, shown=shown))).sum(-1)
        for shown in (False, True)
    ]
    values.append(entropy_of(student_BRV))
    means = [float(value_BR[responses.mask_BR].double().mean()) for value_BR in values]
    return dict(zip(OVER_TOKENS, means, strict=True))


def check_against_report(
    run: Run, found: Mapping[str, float], report: Report, *, after: bool
) -> None:
    """What transformers finds here is what the run's own evaluation found, the teacher's prompt
    included."""
    pairs = {"student_entropy": found[OVER_TOKENS[2]]}
    if EMA not in ARMS[run.arm].overrides or not after:  # there it has followed the student
        pairs["reverse_kl"] = found[OVER_TOKENS[run.arm != "plain"]]
    for name, value in pairs.items():
        own = report.figures[name]
        assert abs(own - value) < 1e-3, f"{run.directory}: {name} {own} in the run, {value} here"


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean by Student's t."""
    half = float(stdtrit(len(values) - 1, 0.975)) * values.std(ddof=1) / sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def interval(low: float, high: float) -> str:
    return f"[{number(low, sign=True)}, {number(high, sign=True)}]"


def mean_over_seeds(students: Sequence[Student], name: str) -> str:
    values = np.array([student.figures[name] for student in students])
    if np.ptp(values) < 1e-9:  # before distillation all seeds are one model
        return number(float(values.mean()))
    low, high = t_interval(values)
    return f"{number(float(values.mean()))} ± {number((high - low) / 2)}"


def change_over_seeds(a: Sequence[Student], b: Sequence[Student], name: str) -> str:
    changes = np.array([y.figures[name] - x.figures[name] for x, y in zip(a, b, strict=True)])
    return f"{number(float(changes.mean()), sign=True)} {interval(*t_interval(changes))}"


def change_over_problems(a: Sequence[Student], b: Sequence[Student], name: str) -> str:
    """Of the means over seeds; bootstrap over problems."""
    if name not in PER_PROBLEM:
        return ""
    a_P, b_P = (np.mean([each.values_P[name] for each in side], axis=0) for side in (a, b))
    pair = paired(a_P, b_P, SEED, highest=highest(name, LONGEST))
    return interval(pair.low, pair.high)


def students_table(columns: Mapping[str, Sequence[Student]]) -> str:
    """The last two columns are compared, seed by seed."""
    (name_a, a), (name_b, b) = list(columns.items())[-2:]
    header = ("held out", *columns, f"{name_b} − {name_a}, over seeds", "over problems")
    return table(
        header,
        [
            (
                name,
                *(mean_over_seeds(students, name) for students in columns.values()),
                change_over_seeds(a, b, name),
                change_over_problems(a, b, name),
            )
            for name in (*PER_PROBLEM, *OVER_TOKENS)
        ],
    )


# --- command ------------------------------------------------------------------------------------


def tables_of(runs: Mapping[str, Sequence[Run]]) -> str:
    """Markdown, and all figures as JSON beside it."""
    measured = {
        (arm, after): [measure(run, after=after) for run in own]
        for arm, own in tqdm(runs.items(), desc="measuring", unit="arm")
        for after in (False, True)
    }
    options = next(iter(runs.values()))[0].options
    figures = {
        f"{arm}, {'after' if after else 'before'}": [dict(s.figures) for s in students]
        for (arm, after), students in measured.items()
    }
    (options.output / "table.json").write_text(json.dumps(figures, indent=1) + "\n")
    texts = [
        f"{options.seeds} seeds, {options.iterations} iterations, {options.problems} held-out "
        f"problems, 16 samples of each. ±, [ ]: 95 %; over seeds: Student's t of the seeds; over "
        f"problems: BCa bootstrap of the seeds' means."
    ]
    header = ("teacher, held-out problems", "without", "with a solution", "difference")
    for arm in ("shown", "self"):
        if arm in runs:
            texts += [f"### {ARMS[arm].teacher}", table(header, teacher_rows(runs[arm][0]))]
    if {"plain", "shown"} <= runs.keys():
        columns = {"before": measured["plain", False]}
        columns |= {arm: measured[arm, True] for arm in ("plain", "shown")}
        texts += ["### plain and shown", students_table(columns)]
    for arm in ("self", "self_ema"):
        if arm in runs:
            columns = {"before": measured[arm, False], "after": measured[arm, True]}
            texts += [f"### {arm}", students_table(columns)]
    return "\n\n".join(texts) + "\n"


def check_options(options: argparse.Namespace) -> None:
    """What is there was made with the same options.

    Raises:
        SystemExit: it was not.
    """
    path = options.output / "options.json"
    own = {name: getattr(options, name) for name in ("iterations", "problems", "steps_scale")}
    if path.is_file() and (there := json.loads(path.read_text())) != own:
        sys.exit(f"error: {options.output} was made with {there}, not {own}. Set another --output.")
    options.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(own) + "\n")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=positive, default=5, help="2 at least (default 5)")
    parser.add_argument("--iterations", type=positive, default=60, help="default 60")
    parser.add_argument("--problems", type=positive, default=200, help="held out (default 200)")
    parser.add_argument("--jobs", type=positive, default=2, help="runs at a time (default 2)")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="as make_toy_models.py")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "toy_privileged")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: an interval over seeds needs 2 at least")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    options.output = options.output.resolve()
    check_options(options)
    make_models(options.output, options.arms, options.steps_scale)
    torch.set_num_threads(1)
    seeds = range(1, options.seeds + 1)
    runs = {arm: [Run(arm, seed, options) for seed in seeds] for arm in options.arms}
    # Seed by seed, so that a run that is stopped has whole pairs.
    train_all([run for group in zip(*runs.values(), strict=True) for run in group], options.jobs)
    text = tables_of(runs)
    (options.output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
