"""report.md and report.html, what runs have come to. In: run folders. Out: both files, and the
pictures in report/ beside them.

The same for one run, at its end or while it goes on, and for several side by side.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from megatron_eopd.config import Config
from megatron_eopd.reporting.document import (
    Bullets,
    Code,
    Document,
    Part,
    Picture,
    Section,
    table_markdown,
    to_html,
    to_markdown,
)
from megatron_eopd.reporting.facts import (
    chosen_options,
    differing_options,
    duration,
    run_table,
    versions,
)
from megatron_eopd.reporting.held_out import before_after, paired_parts, side_by_side
from megatron_eopd.reporting.run_records import RunRecord, read_runs

PICTURES = "report"
"""The folder of the pictures, beside report.md."""
MOST_WARNINGS = 50
NO_EVALUATION = "No evaluation was configured (evaluation.tasks)."


def before_after_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: every evaluation figure at the first and at the last evaluation of the run."""
    evaluations = [row for row in rows if any(name.startswith("eval/") for name in row)]
    return table_markdown(before_after(evaluations)) if evaluations else NO_EVALUATION


class Pictures(NamedTuple):
    training: tuple[Picture, ...]
    by_task: dict[str, tuple[Picture, ...]]


NO_PICTURES = Pictures((), {})


def write_reports(runs: Sequence[RunRecord], output: Path, title: str | None = None) -> list[Path]:
    """Both files and their pictures; returns the paths of report.md and report.html."""
    output.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before it is drawn
    return _write(document_of(runs, paired_tests(runs), draw(runs), title), output)


def finish_report(config: Config, hf_dir: Path | None, minutes: float) -> str:
    """Of a run that has ended, in its run_dir. Returns what the terminal is told.

    What goes wrong here is a warning: training, checkpoints and export are whole.
    """
    run_dir = config.run_dir
    told = [
        f"- run: {run_dir} ({config.training.train_iters} iterations; this command took "
        f"{minutes:.1f} min from its start)",
        f"- Hugging Face export: {hf_dir or 'none (checkpoint.export_hf=false)'}",
    ]
    undone = "the report could not be written"
    try:
        runs = read_runs([run_dir])
        table = before_after_table(runs[0].evaluation_rows)
        told = [f"# {default_title(runs)}", "", table, "", *told]
        told += [f"- TensorBoard: {command}" for command in tensorboard_commands(runs)]
        told.append(f"- every token, by both models: {module_command('view', quote(str(run_dir)))}")
        # First without pictures, so that something stays whatever happens to them.
        tests = paired_tests(runs)
        without = document_of(runs, tests, NO_PICTURES, minutes=minutes)
        (run_dir / "report.md").write_text(to_markdown(without, Path(PICTURES)))
        undone = "the report's pictures could not be drawn, so report.md has none"
        _, page = _write(document_of(runs, tests, draw(runs), minutes=minutes), run_dir)
        told.append(f"- report with pictures: {page}")
    except Exception as error:
        again = module_command("report", quote(str(run_dir)))
        told.append(f"WARNING: {undone}: {error!r}. {again} tries again.")
    return "\n".join(told) + "\n"


def _write(document: Document, output: Path) -> list[Path]:
    folder = output / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    for picture in document.pictures:
        (folder / f"{picture.name}.svg").write_text(picture.svg)
    markdown, html = output / "report.md", output / "report.html"
    markdown.write_text(to_markdown(document, Path(PICTURES)))
    html.write_text(to_html(document))
    return [markdown, html]


# --- pictures -----------------------------------------------------------------------------------


def tasks_of(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(task for run in runs for task in run.evaluations))


def draw(runs: Sequence[RunRecord]) -> Pictures:
    # Here alone: drawing takes a second to import, and training can do without.
    from megatron_eopd.reporting.curves import Drawn
    from megatron_eopd.reporting.drawing import to_svg
    from megatron_eopd.reporting.held_out_pictures import task_pictures
    from megatron_eopd.reporting.training_pictures import training_pictures

    def saved(drawn: Iterable[Drawn]) -> tuple[Picture, ...]:
        return tuple(Picture(each.name, each.caption, to_svg(each.figure)) for each in drawn)

    names = file_names(tasks_of(runs))
    by_task = {task: saved(task_pictures(task, name, runs)) for task, name in names.items()}
    return Pictures(saved(training_pictures(runs)), by_task)


def file_names(tasks: Sequence[str]) -> dict[str, str]:
    """Task → what its files are called, each another one."""
    found = {}
    for n, task in enumerate(tasks):
        name = re.sub(r"[^\w.-]", "_", task)
        found[task] = name if name == task else f"{name}_{n}"
    return found


# --- text ---------------------------------------------------------------------------------------


def document_of(
    runs: Sequence[RunRecord],
    tests: Mapping[str, Sequence[Part]],
    pictures: Pictures,
    title: str | None = None,
    minutes: float | None = None,
) -> Document:
    """`tests`: of each task. `minutes`: that the command took which has trained, where it asks."""
    sections = [
        Section("Before and after", (*_held_out_parts(runs),)),
        *(
            Section(f"Task {task}", (*tests[task], *pictures.by_task.get(task, ())))
            for task in tasks_of(runs)
        ),
        Section("Training", pictures.training),
        Section("What it was" if len(runs) == 1 else "What they were", (*_facts(runs, minutes),)),
        Section("Warnings", (*_warnings(runs),)),
        Section("What is missing", (*_missing(runs),)),
        Section("To look further", (Code("\n".join(_commands(runs))),)),
    ]
    kept = tuple(section for section in sections if section.parts)
    return Document(title or default_title(runs), kept)


def default_title(runs: Sequence[RunRecord]) -> str:
    if len(runs) > 1:
        return " against ".join(run.label for run in runs)
    run = runs[0]
    names = ("objective.name", "teacher.hf_path", "student.hf_path")
    objective, teacher, student = (run.option(name) for name in names)
    known = None not in (objective, teacher, student)
    return f"{objective}: {teacher} → {student}" if known else run.label


def _held_out_parts(runs: Sequence[RunRecord]) -> list[Part]:
    evaluated = [run for run in runs if run.evaluation_rows]
    if not evaluated:
        return [NO_EVALUATION if any(run.config for run in runs) else "No evaluation was found."]
    parts: list[Part] = []
    if len(runs) == 1:
        parts.append(before_after(runs[0].evaluation_rows))
        if len(runs[0].evaluation_rows) == 1:
            parts.append("There is one evaluation so far, so before and after are the same.")
    else:
        parts.append(side_by_side(evaluated))
        absent = [run.label for run in runs if run not in evaluated]
        parts += [f"Without an evaluation: {', '.join(absent)}."] if absent else []
        parts += _no_common_task(evaluated)
    return parts


def _no_common_task(runs: Sequence[RunRecord]) -> list[Part]:
    """A sentence where there is none."""
    if len(runs) < 2 or set.intersection(*(set(run.evaluations) for run in runs)):
        return []
    own = "; ".join(f"{run.label} has {', '.join(run.evaluations) or 'none'}" for run in runs)
    return [f"No task has a report in all of these runs: {own}."]


def paired_tests(runs: Sequence[RunRecord]) -> dict[str, list[Part]]:
    """Of each task. The only part that takes time: seconds with a thousand problems."""
    return {task: _paired(runs, task) for task in tasks_of(runs)}


def _paired(runs: Sequence[RunRecord], task: str) -> list[Part]:
    """Each run's last evaluation against the first run's, then against its own first one."""
    own = [run for run in runs if task in run.evaluations]
    parts: list[Part] = []
    for other in own[1:]:
        (n, a), (m, b) = own[0].evaluations[task][-1], other.evaluations[task][-1]
        parts += paired_parts(
            f"{own[0].label}, iteration {n}", a, f"{other.label}, iteration {m}", b
        )
    for run in own:
        (before, a), (after, b) = run.evaluations[task][0], run.evaluations[task][-1]
        if before != after:
            of = f"{run.label}, " if len(runs) > 1 else ""
            parts += paired_parts(f"{of}iteration {before}", a, f"{of}iteration {after}", b)
    return parts


def _facts(runs: Sequence[RunRecord], minutes: float | None) -> list[Part]:
    parts: list[Part] = [run_table(runs)]
    if minutes is not None:
        parts.append(f"The command took {duration(60 * minutes)} from its start.")
    known = [run for run in runs if run.config]
    if len(known) > 1:
        differing = differing_options(known)
        same = "The options of these runs are the same."
        parts += ["Options that differ:", differing] if differing.rows else [same]
    if known:
        what = f"Options{' of all of them' if len(known) > 1 else ''} that are not the default:"
        parts += [what, chosen_options(known)]
    parts.append(f"Versions where this report was made: {versions()}.")
    return parts


def _warnings(runs: Sequence[RunRecord]) -> list[Part]:
    told = [
        f"{run.label}: {text}" if len(runs) > 1 else text for run in runs for text in run.warnings
    ]
    shown = [*told[:MOST_WARNINGS]]
    if len(told) > len(shown):
        shown.append(f"… and {len(told) - len(shown)} more, in log/rank0.txt")
    return [Bullets(tuple(shown))] if shown else []


def _missing(runs: Sequence[RunRecord]) -> list[Part]:
    told = [
        f"{run.label}: {text}" if len(runs) > 1 else text for run in runs for text in run.missing
    ]
    return [Bullets(tuple(told))] if told else []


def _commands(runs: Sequence[RunRecord]) -> list[str]:
    paths = [quote(str(run.path)) for run in runs]
    return [
        *tensorboard_commands(runs),
        *(module_command("view", path) for path in paths),
        module_command("report", *paths),
    ]


def module_command(name: str, *arguments: str) -> str:
    """With the path of its Python: the environment need not be activated."""
    return " ".join([quote(sys.executable), "-m", f"megatron_eopd.{name}", *arguments])


def tensorboard_commands(runs: Sequence[RunRecord]) -> list[str]:
    """With its path: the environment need not be activated."""
    command = Path(sys.executable).with_name("tensorboard")
    folders = [run.path / "tensorboard" for run in runs if (run.path / "tensorboard").is_dir()]
    return [f"{quote(str(command))} --logdir {quote(str(folder))}" for folder in folders]
