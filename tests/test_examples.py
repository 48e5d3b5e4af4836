"""Every TOML under examples/ is one that the trainer takes, with the ranks that it names.

The large models are stand-ins: their real shapes, end tokens and tensor names, weight files that
are nothing but a header and a hole, and a small tokenizer.
"""

import re
import runpy
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from megatron_eopd import preflight
from megatron_eopd.config import Config, EvaluationConfig, load_config, task_parts
from megatron_eopd.models.hf_files import name_files, plan_files, write_index_and_config
from megatron_eopd.planning.activations import Lengths
from megatron_eopd.planning.search import Request, check_request, make_plan
from megatron_eopd.planning.shapes import Models
from megatron_eopd.rollout import choice
from megatron_eopd.train import main
from megatron_eopd.weight_sync.manifest import TensorSpec

ROOT = Path(__file__).parents[1]
TOMLS = sorted(path.relative_to(ROOT) for path in ROOT.glob("examples/**/*.toml"))
WITH_BASE_STUDENT = [toml for toml in TOMLS if load_config(ROOT / toml).teacher.eos_token_map]
CUT = [t for t in TOMLS if load_config(ROOT / t).parallel.tensor_model_parallel_size > 1]
LARGE = ["qwen3_8b_to_1.7b", "qwen3_32b_to_4b_multinode"]
PLANNED = [ROOT / "docs/planning.md", *(ROOT / f"examples/{name}/README.md" for name in LARGE)]
GPU_GIB, RESERVE_GIB = 80, 5  # tools/plan.py's reserve
MAX_FILE_BYTES = 2 * 10**9

END_OF_TEXT, IM_START, IM_END = 151_643, 151_644, 151_645
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


@dataclass(frozen=True)
class Shape:
    """What the models' own config.json and generation_config.json say."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    tie_word_embeddings: bool
    num_parameters: int
    is_base: bool = False

    @property
    def hf_config(self) -> Qwen3Config:
        return Qwen3Config(
            architectures=["Qwen3ForCausalLM"],
            dtype="bfloat16",
            vocab_size=151_936,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=32_768 if self.is_base else 40_960,
            tie_word_embeddings=self.tie_word_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            bos_token_id=END_OF_TEXT,
            eos_token_id=END_OF_TEXT if self.is_base else IM_END,
        )

    @property
    def stop_ids(self) -> int | list[int]:
        return END_OF_TEXT if self.is_base else [IM_END, END_OF_TEXT]


SHAPES = {
    "Qwen3-1.7B-Base": Shape(2048, 6144, 28, 16, True, 1_720_574_976, is_base=True),
    "Qwen3-4B-Base": Shape(2560, 9728, 36, 32, True, 4_022_468_096, is_base=True),
    "Qwen3-8B": Shape(4096, 12_288, 36, 32, False, 8_190_735_360),
    "Qwen3-32B": Shape(5120, 25_600, 64, 64, False, 32_762_123_264),
    # Of the example with a small model, which makes its own: any shape will do.
    "student": Shape(64, 128, 2, 8, True, 10_298_176),
    "teacher": Shape(64, 128, 3, 8, True, 10_585_280),
}


def make_stand_in(path: Path, shape: Shape) -> None:
    shape.hf_config.save_pretrained(path)
    GenerationConfig(eos_token_id=shape.stop_ids).save_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.hf_config)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters
    specs = [TensorSpec(n, "bfloat16", tuple(p.shape)) for n, p in model.named_parameters()]
    # In several files, because opening one takes address space of its size.
    files = name_files(plan_files([[spec] for spec in specs], MAX_FILE_BYTES))
    for planned in files:
        with (path / planned.name).open("wb") as file:
            file.write(planned.header)
            file.truncate(planned.num_bytes)  # a hole: no disk is used
    write_index_and_config(path, files)
    make_tokenizer("<|endoftext|>" if shape.is_base else "<|im_end|>").save_pretrained(path)


def make_tokenizer(eos: str) -> PreTrainedTokenizerFast:
    """Bytes, Qwen3's special tokens at their ids, and nothing between."""
    special = {"<|endoftext|>": END_OF_TEXT, "<|im_start|>": IM_START, "<|im_end|>": IM_END}
    vocabulary = {token: n for n, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocabulary | special, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def models_of(config: Config) -> list[Path]:
    return [config.student.hf_path, *(t.hf_path for t in config.all_teachers.values())]


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory) -> Path:
    """A working directory as the READMEs make it: examples/, models/, data/."""
    path = tmp_path_factory.mktemp("work")
    (path / "examples").symlink_to(ROOT / "examples")
    for config in (load_config(ROOT / toml) for toml in TOMLS):
        for model in models_of(config):
            if not (path / model).exists():
                make_stand_in(path / model, SHAPES[model.name])
        for prompts in (config.data.prompts, *files_of(config.evaluation)):
            if prompts.endswith(".jsonl"):
                (path / prompts).parent.mkdir(exist_ok=True)
                (path / prompts).write_text(
                    '{"prompt": "What is 2 + 3?", "answer": "5", "response": "It is 5.", '
                    '"solution": "2 + 3 = 5"}\n'
                )
    return path


def files_of(evaluation: EvaluationConfig) -> list[str]:
    """Those of its tasks: named, or where one of that name is looked for."""
    parts = [task_parts(task) for task in evaluation.tasks]
    return [source or str(evaluation.data_dir / f"{word}.jsonl") for word, source in parts]


@pytest.fixture
def in_work_dir(work_dir, monkeypatch) -> None:
    """There, on a machine that has vLLM."""
    monkeypatch.chdir(work_dir)
    monkeypatch.setattr(choice, "vllm_available", lambda: True)


@pytest.fixture
def dry_run(in_work_dir, capsys):
    """Runs the command's --dry-run in this process; gives back its status and what it printed."""

    def run(toml: Path, world_size: int, *overrides: str) -> tuple[int, str]:
        capsys.readouterr()
        status = main([str(toml), *overrides, "--dry-run", "--world-size", str(world_size)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def world_size_of(toml: Path) -> int:
    """Of the first line, `# world size: 8`."""
    first = (ROOT / toml).read_text().splitlines()[0]
    match = re.fullmatch(r"# world size: (\d+)", first)
    assert match, f"{toml} begins with {first!r}, not with its world size"
    return int(match[1])


def commands_in(readme: Path) -> list[list[str]]:
    """Every command of its bash blocks, in words."""
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def torchrun_commands(toml: Path) -> list[tuple[int, list[str]]]:
    """(ranks, overrides) of every torchrun command that the README beside the TOML gives for it."""
    found = []
    for words in commands_in((ROOT / toml).with_name("README.md")):
        if words[:1] == ["torchrun"] and str(toml) in words:
            options = dict(word.split("=") for word in words if re.match(r"--n\w+=", word))
            ranks = int(options.get("--nnodes", 1)) * int(options["--nproc_per_node"])
            module = words.index("-m")
            assert words[module + 1 : module + 3] == ["megatron_eopd.train", str(toml)]
            found.append((ranks, words[module + 3 :]))
    return found


each_example = pytest.mark.parametrize("toml", TOMLS, ids=lambda toml: toml.parent.name)


@each_example
def test_a_dry_run_takes_it_and_places_every_rank(dry_run, toml):
    ranks = world_size_of(toml)
    status, printed = dry_run(toml, ranks)
    assert status == 0, printed
    table = printed[printed.index("\nrank ") :].splitlines()[1:]
    assert table[0].split() == ["rank", "student", "teacher", "engines"]
    assert table[1].endswith("engine 0")
    assert [line.split()[0] for line in table[1:]] == [str(rank) for rank in range(ranks)]


@pytest.mark.parametrize("toml", CUT, ids=lambda toml: toml.parent.name)
def test_another_world_size_names_the_options(dry_run, toml):
    status, printed = dry_run(toml, world_size_of(toml) + 1)
    assert status == 1
    assert "parallel.tensor_model_parallel_size=2" in printed
    assert "does not divide" in printed


def test_a_world_without_room_for_the_student_names_the_option(dry_run):
    toml = Path("examples/qwen3_32b_to_4b_multinode/eopd.toml")
    status, printed = dry_run(toml, 16)
    assert status == 1
    assert "teacher.world_size=16 leaves no rank to the student" in printed


@each_example
def test_its_longest_samples_fit_the_gpus(in_work_dir, toml):
    """Every kind of rank has room for what docs/planning.md counts, and for the reserve."""
    config = load_config(toml)
    lengths = Lengths(config.data.max_prompt_length, config.rollout.max_response_length)
    memory = (GPU_GIB - RESERVE_GIB) * 2**30
    models, ranks = Models.of(config), world_size_of(toml)
    request = Request(config, models, ranks, memory, lengths)
    check_request(request)
    plan = make_plan(config, request)
    assert plan.fits, plan.memory.worst
    # Not because something was left out: its parts are there, and the teacher's.
    _, _, fullest = plan.memory.worst
    assert fullest.weights and fullest.gradients and fullest.optimizer and fullest.activations
    separate = {name for name, t in config.all_teachers.items() if t.placement == "separate"}
    assert set(plan.memory.stages) == {"student", *separate}


@pytest.mark.parametrize("page", PLANNED, ids=lambda page: page.parent.name)
def test_what_a_page_shows_of_the_planner_is_what_it_prints(in_work_dir, monkeypatch, capsys, page):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the tool sets it, and this takes it back
    (command,) = (words for words in commands_in(page) if words[1:2] == ["tools/plan.py"])
    capsys.readouterr()
    assert runpy.run_path(str(ROOT / "tools/plan.py"))["main"](command[2:]) == 0
    assert f"```\n{capsys.readouterr().out}```\n" in page.read_text()


@each_example
def test_the_commands_of_its_readme_work(dry_run, toml):
    """Each torchrun command passes a dry run with its ranks and overrides; the first one is what
    the TOML is meant for, and so is the dry run that the README shows."""
    commands = torchrun_commands(toml)
    assert commands, "no torchrun command in the README"
    assert commands[0] == (world_size_of(toml), [])
    for ranks, overrides in commands:
        status, printed = dry_run(toml, ranks, *overrides)
        assert status == 0, printed
    shown = f"python -m megatron_eopd.train {toml} --dry-run --world-size {world_size_of(toml)}"
    assert shlex.split(shown) in commands_in((ROOT / toml).with_name("README.md"))


@pytest.mark.parametrize("toml", WITH_BASE_STUDENT, ids=lambda toml: toml.parent.name)
def test_a_base_student_learns_to_end_with_its_own_token(dry_run, toml):
    """The map is what makes the two models agree; either token ends a response."""
    inputs = preflight.check(load_config(toml), world_size_of(toml))
    assert inputs.tokenizers.swaps == {"teacher": [(END_OF_TEXT, IM_END)]}
    assert set(inputs.tokenizers.student.stop_ids) == {END_OF_TEXT, IM_END}
    status, printed = dry_run(toml, world_size_of(toml), "rollout.stop_token_ids=[]")
    assert status == 0, printed
    unmapped = ("rollout.stop_token_ids=[]", "teacher.eos_token_map={}")
    status, printed = dry_run(toml, world_size_of(toml), *unmapped)
    assert status == 1 and "Set teacher.eos_token_map" in printed


@pytest.mark.parametrize("toml", WITH_BASE_STUDENT, ids=lambda toml: toml.parent.name)
def test_prompts_ask_for_a_boxed_answer_without_thinking(in_work_dir, toml):
    inputs = preflight.check(load_config(toml), world_size_of(toml))
    (prompt,) = inputs.prompts.batch(0, 1)
    assert inputs.tokenizers.student.decode(prompt.prompt_ids) == (
        "user\nWhat is 2 + 3? Please reason step by step, and put your final answer within "
        "\\boxed{}.\nassistant\n<think>\n\n</think>\n\n"
    )
