"""What README.md, docs/ and the examples' READMEs say exists: links, files, options, commands.

The examples' own commands, and what the planner prints in three pages, are in test_examples.py.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from megatron_eopd.config import Config, describe_options, load_config
from megatron_eopd.rollout import choice
from megatron_eopd.rollout.placement import assumed_nodes, places_of
from megatron_eopd.teacher.placement import rank_table
from megatron_eopd.train import main

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
OPTIONS = {option.name for option in describe_options()}
SECTIONS = {name.partition(".")[0] for name in OPTIONS if "." in name}

# Where a path in the text may begin.
PATH_ROOTS = [ROOT, ROOT / "megatron_eopd"]
# What a run, or its user, makes: not in the repository.
MADE_BY_USERS = re.compile(
    r"(RUN|RUN_DIR|OUT_DIR|runs|hf|tensorboard|rollouts|checkpoints|nonfinite|spikes|log|run\.toml)\b"
    r"|(view|report|wandb|mlflow)/"
)
DOTTED_BUT_NO_OPTIONS = {
    # libraries
    "torch.distributed.checkpoint",
    "shutil.copytree",
    "torch.compile",
    "np.load",
    "dist_checkpointing.save",
    # columns of data sets
    "reward_model.ground_truth",
    # files
    "model.safetensors",
    "report.html",
}
MINIMAL = {"run_dir": "runs/x", "student": {"hf_path": "s"}, "teacher": {"hf_path": "t"}}

each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(ROOT).with_suffix(""))
)


def blocks_of(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, without the indentation of a list they may stand in."""
    found = re.findall(
        rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE
    )
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def prose_of(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def quoted_in(page: Path) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", prose_of(page))


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def commands_of(page: Path) -> list[list[str]]:
    """Every command of its bash blocks, in words."""
    lines = "".join(blocks_of(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def program_in(words: list[str]) -> tuple[tuple[str, ...], list[str]] | None:
    """What of this repository a command runs, as Python is told it, and its arguments."""
    for n, word in enumerate(words):
        if word == "-m" and words[n + 1].startswith("megatron_eopd."):
            return ("-m", words[n + 1]), words[n + 2 :]
        if re.fullmatch(r"(tools|benchmarks|examples/\w+)/\w+\.py", word):
            return (word,), words[n + 1 :]
    return None


PROGRAMS = [
    (page, *found)
    for page in PAGES
    for words in commands_of(page)
    if (found := program_in(words)) is not None
]


@each_page
def test_links_lead_somewhere(page):
    dead = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            dead.append(target)
    assert not dead


@each_page
def test_files_that_are_named_exist(page):
    roots = [*PATH_ROOTS, page.parent]
    missing = []
    for words in map(str.split, quoted_in(page)):
        is_path = re.fullmatch(r"[\w./-]+(\.(py|cpp|toml|cff)|/)", words[0]) if words else None
        if not is_path or MADE_BY_USERS.match(words[0]):
            continue
        if not any((root / words[0]).exists() for root in roots):
            missing.append(words[0])
    assert not missing


@each_page
def test_options_that_are_named_exist(page):
    unknown = []
    section = ""
    for quoted in quoted_in(page):
        name = quoted.partition("=")[0].strip()
        if re.fullmatch(r"\.[a-z_]+", name):  # a neighbour of the one before
            name = section + name
        if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name) or name.endswith((".py", ".cpp")):
            continue
        section = name.rpartition(".")[0]
        if not (is_option(name) or name in DOTTED_BUT_NO_OPTIONS or is_path_or_module(name)):
            unknown.append(name)
    assert not unknown


def is_option(name: str) -> bool:
    """An option, a table of options, or an entry of an option that is a table."""
    return any(
        name == option or option.startswith(f"{name}.") or name.startswith(f"{option}.")
        for option in OPTIONS
    )


def is_path_or_module(name: str) -> bool:
    is_file = re.search(r"\.(json|jsonl|txt|toml|md|model|ipynb|patch|cff)$", name)
    return bool(is_file) or name.startswith("megatron_eopd.")


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p, "toml")], ids=lambda p: p.stem)
def test_toml_in_the_text_is_a_configuration(page):
    for block in blocks_of(page, "toml"):
        Config.model_validate(merged(MINIMAL, tomllib.loads(block)))


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = base | over
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict):
            both[key] = merged(base[key], over[key])
    return both


def test_the_configuration_of_the_readme_has_a_place_for_eight_ranks():
    (block,) = blocks_of(ROOT / "README.md", "toml")
    table = rank_table(Config.model_validate(tomllib.loads(block)), 8)
    assert [line.split()[0] for line in table.splitlines()[1:]] == [str(n) for n in range(8)]


def test_the_rank_table_of_the_parallelism_page_is_the_one_of_its_configuration():
    """The quick start with two pipeline stages and two engines of two workers each."""
    sizes = ["parallel.pipeline_model_parallel_size=2", "rollout.tensor_model_parallel_size=2"]
    quickstart = ROOT / "examples/quickstart/eopd.toml"
    config = load_config(quickstart, [*sizes, "rollout.num_engines=none"])
    engines = places_of(config, assumed_nodes(4)).describe()
    table = rank_table(config, 4, engines=engines)
    assert f"```\n{table}\n```\n" in (ROOT / "docs/parallelism.md").read_text()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p, "bash")], ids=lambda p: p.stem)
def test_shell_blocks_are_shell(page):
    for block in blocks_of(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", sorted({p for _, p, _ in PROGRAMS}), ids=lambda p: p[-1])
def test_commands_in_the_text_have_the_options_that_they_are_shown_with(program):
    """--help of the command answers, and names each --option; what is set as section.key=value is
    an option of the configuration."""
    done = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    help_text = done.stdout
    subcommands = re.search(r"\{([\w,-]+)\}", help_text)
    for name in subcommands[1].split(",") if subcommands else ():
        sub = [sys.executable, *program, name, "--help"]
        help_text += subprocess.run(sub, cwd=ROOT, capture_output=True, text=True).stdout
    unknown = []
    for page, _, arguments in (use for use in PROGRAMS if use[1] == program):
        for word in arguments:
            flag, name = re.match(r"--[\w-]+", word), re.match(r"([a-z_]+(\.[a-z_]+)+)=", word)
            if flag and not re.search(rf"{flag[0]}\b", help_text):
                unknown.append((page.name, word))
            if name and name[1].partition(".")[0] in SECTIONS and not is_option(name[1]):
                unknown.append((page.name, word))
    assert not unknown


def test_make_targets_in_the_text_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        commands = [*map(str.split, quoted_in(page)), *commands_of(page)]
        named = {words[1] for words in commands if words[:1] == ["make"] and len(words) > 1}
        assert named <= targets, page


def test_the_dry_run_of_the_quick_start_page_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(choice, "vllm_available", lambda: True)
    (words,) = (w for w in commands_of(ROOT / "docs/quickstart.md") if "--dry-run" in w)
    assert main(program_in(words)[1]) == 0
    assert "optimizer steps: 4 / iteration × 260 = 1040" in capsys.readouterr().out


def test_the_citation_has_the_version_of_the_package():
    version = re.search(r'version="([^"]+)"', (ROOT / "setup.py").read_text())[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
