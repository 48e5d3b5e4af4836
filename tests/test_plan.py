"""The planner: its sums, its list of layouts, and its command. tests/distributed/test_plan.py
compares the memory model with real models and optimizers."""

import json
import runpy
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from megatron_eopd.config import Config, ParallelSizes, load_config
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.parallel.worlds import student_layout
from megatron_eopd.planning.activations import Lengths, Platform, chunks_in_flight
from megatron_eopd.planning.memory import Setup, parameters_per_stage, plan_memory
from megatron_eopd.planning.search import HELPS, Request, explain, make_plan, search
from megatron_eopd.planning.shapes import Models, ModelShape

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "examples/quickstart/models"
GIB = 2**30
SHAPE = {
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def write_config(path: Path, config_class=Qwen3Config, **shape) -> Path:
    """A model directory with a config.json and nothing else."""
    architecture = config_class.__name__.replace("Config", "ForCausalLM")
    config_class(architectures=[architecture], **(SHAPE | shape)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Qwen3-8B, Qwen3-32B and Qwen3-30B-A3B, without weights."""
    path = tmp_path_factory.mktemp("models")
    eight = {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36}
    big = {"hidden_size": 5120, "intermediate_size": 25_600, "num_hidden_layers": 64}
    experts = {
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }
    return {
        "8b": write_config(path / "8b", num_attention_heads=32, **eight),
        "32b": write_config(path / "32b", num_attention_heads=64, **big),
        "moe": write_config(path / "moe", Qwen3MoeConfig, num_attention_heads=32, **experts),
    }


def make_config(student_path: Path, teacher_path: Path, **sections) -> Config:
    options: dict = {
        "run_dir": "unused",
        "student": {"hf_path": student_path},
        "teacher": {"hf_path": teacher_path},
        "model": {"dtype": "bfloat16"},
        "rollout": {"batch_size": 256, "tensor_model_parallel_size": 4},
        "training": {"global_batch_size": 64},
        "objective": {"head": "chunked"},
    }
    for name, section in sections.items():
        options[name] = options.get(name, {}) | section
    return Config.model_validate(options)


def make_request(config: Config, num_gpus: int, gib: float) -> Request:
    models = Models.of(config)
    return Request(config, models, num_gpus, int(gib * GIB), Lengths(512, 2048))


def memory_of(config: Config, num_gpus: int, platform: Platform | None = None):
    layout = student_layout(config, num_gpus)
    lengths = Lengths(512, 2048)
    return plan_memory(Setup.of(config, Models.of(config), layout, lengths, platform or Platform()))


# Parameters


@pytest.mark.parametrize("tp,pp,expected", [(1, 1, [113_088]), (2, 1, None), (2, 2, None)])
def test_parameters_per_rank_add_up(tp, pp, expected):
    """At TP 1 the model's own parameter count; cut, nothing is lost but padding."""
    layout = Layout(tp=tp, pp=pp, dp=1, rank=0)
    shape = ModelShape.of(read_hf_config(MODELS / "student"))
    stages = [stage.total for stage in parameters_per_stage(shape, layout, 112)]
    assert len(stages) == pp
    assert stages == (expected or stages)
    # Norms stand on every tensor-parallel rank.
    assert 113_088 <= tp * sum(stages) < 113_088 + tp * 1000


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_moe_mixed", "llama_tied_with_biases"])
def test_parameters_of_every_family_add_up(family, family_dirs):
    """Experts, dense layers among them and biases count: at TP 1 as transformers counts, and cut
    over EP nothing is lost."""
    config = read_hf_config(family_dirs[family])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    shape, whole = ModelShape.of(config), Layout(tp=1, pp=1, dp=1, rank=0)
    (stage,) = parameters_per_stage(shape, whole, config.vocab_size)
    assert stage.total == shape.num_parameters == total
    if shape.num_experts:
        cut = Layout(tp=1, pp=2, dp=4, rank=0, ep=4)
        experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        stages = parameters_per_stage(shape, cut, config.vocab_size)
        assert sum(s.total for s in stages) == total - experts + experts // 4


# Memory


@pytest.mark.parametrize("pp,vpp,num_microbatches", [(4, 1, 16), (4, 2, 16), (8, 3, 16)])
def test_microbatches_in_flight_follow_korthikanti(pp, vpp, num_microbatches):
    """The first stage keeps a whole model's layers of activations, and with interleaving
    1 + (p − 1)/(p · v) times as many (arXiv 2205.05198, section 4.2.3)."""
    layout = Layout(tp=1, pp=pp, dp=1, rank=0, vpp=vpp)
    in_flight = [chunks_in_flight(layout, stage, num_microbatches) for stage in range(pp)]
    extra = (pp - 1) / (pp * vpp) if vpp > 1 else 0
    assert in_flight[0] / (pp * vpp) == pytest.approx(1 + extra)
    assert in_flight == sorted(in_flight, reverse=True)
    assert chunks_in_flight(layout, 0, num_microbatches=1) == vpp, "never more than there are"


def test_recomputation_keeps_the_inputs_of_what_it_repeats(models):
    """Of 36 layers: one input each, with groups of four one per group, or, by blocks, the inputs of
    four layers and everything of the others; and what is at work comes back."""

    def activations(**model) -> int:
        parallel = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
        training = {"micro_batch_size": 1}
        config = make_config(
            models["8b"], models["8b"], parallel=parallel, model=model, training=training
        )
        return memory_of(config, 8).stages["student"][0].activations

    tokens = 2560 // 4  # of a sample, on one of four sequence-parallel ranks
    row = 2 * 4096 * tokens
    # Beside the layers: the last norm's input and row, and sines and cosines of the whole sample.
    last_norm = ((4 + 2) * 4096 + 4) * tokens
    rotation = 2 * 128 * 2560
    layer = (activations() - last_norm - rotation) // 36
    full = {"recompute_granularity": "full"}
    groups = full | {"recompute_num_layers": 4}
    assert activations(**full) == 36 * row + layer + last_norm
    assert activations(**groups) == 9 * row + 4 * layer + last_norm
    by_blocks = activations(recompute_method="block", **groups)
    kept = (36 * layer + rotation) * 32 // 36 + 4 * row
    assert by_blocks == kept + layer + last_norm


def test_payload_is_what_the_teacher_hands_over(models):
    """Bytes per token: 2·H, 2·V/tp, 12·k; logits come as many microbatches at a time as
    there are stages, all else for a whole optimizer step."""

    def payload(**teacher) -> int:
        parallel = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}
        objective = {"head": "chunked", "name": "eopd_paper", "top_k": 64}
        config = make_config(
            models["8b"],
            models["32b"],
            teacher=teacher,
            parallel=parallel,
            objective=objective,
        )
        stages = memory_of(config, 8).stages["student"]
        assert stages[0].payload == stages[0].logits == 0, "it comes to the last stage"
        return stages[1].payload

    tokens = 64 * 2048  # DP 1
    assert payload(payload="hidden") == tokens * 2 * 5120
    assert payload(payload="topk") == tokens * (12 * 64 + 12)
    assert payload(payload="logits") == 2 * 2048 * 2 * 152_064 // 4
    assert payload(payload="hidden", microbatches_per_exchange=8) == tokens * 2 * 5120 // 8


def test_a_teacher_is_where_it_was_put(models):
    """Colocated it weighs on the student's ranks; offloaded only while it scores; on ranks of its
    own not at all, and those have their own table."""

    def plan(num_gpus=8, **teacher):
        config = make_config(
            models["8b"],
            models["32b"],
            teacher=teacher,
            parallel={"tensor_model_parallel_size": 8},
        )
        return memory_of(config, num_gpus).stages

    (beside,) = plan()["student"]
    (offloaded,) = plan(offload=True)["student"]
    separate = plan(16, placement="separate", world_size=8)
    assert beside.teacher_weights == offloaded.offloaded_teacher > 0
    head = offloaded.teacher_head
    assert offloaded.while_training == beside.while_training - beside.teacher_weights + head
    assert separate["student"][0].teacher_weights == 0
    assert separate["student"][0].teacher_head == head > 0
    # Sent to the student, the head does not stay with the teacher.
    assert separate["teacher"][0].teacher_weights == beside.teacher_weights - head
    assert separate["teacher"][0].optimizer == 0


def test_a_teacher_of_other_sizes_weighs_most_where_its_biggest_stage_is(models):
    """Student PP 2, teacher PP 4 and PP 1: the student's stages hold two of the teacher's, or
    all."""
    for pp in (1, 4):
        sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": pp}
        config = make_config(
            models["8b"],
            models["32b"],
            teacher={"parallel": sizes, "payload": "logits"},
            parallel={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        )
        layout = Layout(tp=2, pp=pp, dp=8 // (2 * pp), rank=0)
        shape = ModelShape.of(read_hf_config(models["32b"]))
        own = [2 * s.total for s in parameters_per_stage(shape, layout, 152_064)]
        found = [s.teacher_weights for s in memory_of(config, 8).stages["student"]]
        assert found == ([own[0]] * 2 if pp == 1 else [max(own[:2]), max(own[2:])])


def test_engines_sit_on_all_ranks_or_on_the_first_ones_or_elsewhere(models):
    def engine(num_gpus=8, **rollout) -> list[int]:
        config = make_config(
            models["8b"],
            models["8b"],
            parallel={"pipeline_model_parallel_size": 4},
            rollout={"batch_size": 256, "kv_cache_gib": 3.0} | rollout,
        )
        return [stage.engine for stage in memory_of(config, num_gpus).stages["student"]]

    weights = 2 * ModelShape.of(read_hf_config(models["8b"])).num_parameters
    none = [0, 0, 0, 0]
    assert engine(tensor_model_parallel_size=4) == [weights // 4 + 3 * GIB] * 4
    assert engine(tensor_model_parallel_size=1) == [weights + 3 * GIB] * 4
    # Stages of two ranks: one engine of four GPUs reaches into the second, two of two as well.
    whole, half = weights + 3 * GIB, weights // 2 + 3 * GIB
    one = {"num_engines": 1}
    assert engine(**one, tensor_model_parallel_size=4) == [weights // 4 + 3 * GIB] * 2 + [0, 0]
    assert engine(**one, tensor_model_parallel_size=1) == [whole, 0, 0, 0]
    assert engine(num_engines=2, tensor_model_parallel_size=2) == [half, half, 0, 0]
    separate = {"placement": "separate", "world_size": 4}
    assert engine(12, **separate) == engine(engine="megatron") == none
    assert engine(replay="recorded") == none


def test_engines_have_memory_only_while_they_sample(models):
    """They let go of it while the student trains and teachers score, and the student of its
    activations while they sample: the larger sum is what a rank needs."""

    def student(gib: float):
        config = make_config(models["8b"], models["8b"], rollout={"kv_cache_gib": gib})
        return memory_of(config, 8).stages["student"]

    (small,), (large,) = student(1.0), student(40.0)
    for phase in ("training", "scoring"):
        assert large.during(phase) == small.during(phase) > 0
    assert large.during("sampling") == small.during("sampling") + 39 * GIB
    always = ("weights", "gradients", "optimizer", "teacher_weights", "teacher_head")
    sums = sum(large.parts[name] for name in (*always, "engine"))
    assert large.during("sampling") == sums
    assert (small.fullest_phase, large.fullest_phase) == ("training", "sampling")
    assert small.peak == small.while_training and large.peak == sums
    assert "engine" not in small.parts_of_peak and "activations" not in large.parts_of_peak


# Layouts


def sizes_of(layout: Layout) -> tuple[int, ...]:
    return layout.tp, layout.pp, layout.cp, layout.ep, layout.expert_tp


def possible_sizes(experts: bool) -> set[tuple[int, ...]]:
    """By hand, of 16 GPUs in nodes of eight: 8 key/value heads and 36 layers of the 8B model, or 4
    and 48 of the one with 128 experts; 64 samples are enough for every rank."""
    heads, num_layers = (4, 48) if experts else (8, 36)
    found = set()
    for tp, pp, cp in product((1, 2, 4, 8, 16), repeat=3):
        if heads % tp == 0 and num_layers % pp == 0 and 16 % (tp * pp * cp) == 0:
            found |= {(tp, pp, cp, 1, tp if experts else 1)}
            found |= {(tp, pp, cp, ep, 1) for ep in (2, 4, 8, 16) if experts and pp * ep <= 16}
    return found


@pytest.mark.parametrize("student,teacher", [("8b", "32b"), ("moe", "32b"), ("moe", "moe")])
def test_every_possible_layout_is_tried_and_the_least_cut_comes_first(models, student, teacher):
    plans = search(make_request(make_config(models[student], models[teacher]), 16, 70))
    sizes = [sizes_of(plan.layout) for plan in plans]
    assert len(set(sizes)) == len(sizes)
    assert set(sizes) == possible_sizes(experts=student == "moe")
    ranks = [
        sum(x.pp * max(x.tp * x.cp, x.ep * x.expert_tp) for x in layouts)
        for layouts in ((plan.layout, *plan.teachers.values()) for plan in plans)
    ]
    assert ranks == sorted(ranks)


def write_toml(path: Path, student: Path, teacher: Path) -> Path:
    path.write_text(
        f'run_dir = "x"\nstudent.hf_path = "{student}"\nteacher.hf_path = "{teacher}"\n'
        "rollout = {batch_size = 256, max_response_length = 2048, tensor_model_parallel_size = 4}\n"
        "training = {global_batch_size = 64, micro_batch_size = 2}\n"
    )
    return path


@pytest.mark.parametrize("student,teacher,gib", [("8b", "32b", 40), ("moe", "32b", 75)])
def test_what_is_listed_fits_and_nothing_else_would(models, student, teacher, gib, tmp_path):
    """By the trainer's own checks of the options that a layout prints. What is left out does not
    fit with any cut of the teacher either."""
    base = ["model.dtype=bfloat16", "objective.head=chunked"]
    toml = write_toml(tmp_path / "run.toml", models[student], models[teacher])
    request = make_request(load_config(toml, base), 16, gib)
    plans = search(request)
    assert 0 < sum(plan.fits for plan in plans) < len(plans)
    for plan in plans:
        again = make_plan(load_config(toml, base + plan.options), request)
        assert (again.layout, again.teachers) == (plan.layout, plan.teachers)
        peak = max(stage.peak for stages in again.memory.stages.values() for stage in stages)
        assert plan.fits == (peak <= gib * GIB)
        assert plan.headroom == gib * GIB - peak
    left_out = [plan for plan in plans if not plan.fits]
    for plan, tp, pp in product(left_out, (1, 2, 4, 8), (1, 2, 4, 8, 16)):
        if tp * pp <= 16:
            sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
            own = ParallelSizes(**sizes, sequence_parallel=tp > 1)
            teacher_options = plan.config.teacher.model_copy(update={"parallel": own})
            config = plan.config.model_copy(update={"teacher": teacher_options})
            assert not make_plan(config, request).fits, (plan.options, own)


def test_a_teacher_gets_sizes_of_its_own_only_where_it_needs_them(models):
    """A 32B teacher is too large beside a whole 8B student, and beside one that is cut over eight
    it is cut alike."""
    request = make_request(make_config(models["8b"], models["32b"]), 16, 75)
    teachers = {sizes_of(plan.layout)[:3]: plan.config.teacher for plan in search(request)}
    own = teachers[1, 1, 1].parallel
    assert own.tensor_model_parallel_size * own.pipeline_model_parallel_size > 1
    assert teachers[8, 1, 1].parallel is None


def test_what_context_parallelism_pads_must_fit_a_microbatch(models):
    """2,559 tokens are no multiple of 2 · CP, and a microbatch has room for these and no more."""
    config = make_config(models["8b"], models["8b"], training={"max_tokens_per_microbatch": 2559})
    request = Request(config, Models.of(config), 8, 80 * GIB, Lengths(511, 2048))
    assert {plan.layout.cp for plan in search(request)} == {1}


# Each with a part that it makes smaller, or, of the engines, moves to other GPUs.
REMEDIES = [
    ("model.recompute_granularity=full", "activations"),
    ("training.micro_batch_size=1", "activations"),
    ("rollout.max_response_length=1024", "activations"),
    ("objective.head=chunked", "logits"),
    ("teacher.offload=true", "teacher_weights"),
    ("teacher.microbatches_per_exchange=1", "payload"),
    ("rollout.kv_cache_gib=1", "engine"),
    ("rollout.tensor_model_parallel_size=8", "engine"),
    ("rollout.placement=separate rollout.world_size=4", "engine"),
    ("model.dtype=bfloat16", "weights"),
]


@pytest.mark.parametrize("remedy,part", REMEDIES)
def test_what_is_said_to_help_makes_that_part_smaller(models, remedy, part, tmp_path):
    assert all(option.partition("=")[0] in HELPS[part] for option in remedy.split())
    toml = write_toml(tmp_path / "run.toml", models["8b"], models["8b"])

    def size(*options: str) -> int:
        config = load_config(toml, options)
        lengths = Lengths(512, config.rollout.max_response_length)
        setup = Setup.of(config, Models.of(config), student_layout(config, 8), lengths, Platform())
        return plan_memory(setup).stages["student"][0].parts[part]

    assert size(*remedy.split()) < size()


def test_why_a_layout_does_not_fit_is_said_of_its_large_parts(models):
    """2 · 8.19 · 10⁹ bytes of the teacher's weights are 15.3 GiB."""
    config = make_config(models["8b"], models["8b"], training={"micro_batch_size": 1})
    plan = make_plan(config, make_request(config, 8, 20))
    assert not plan.fits
    text = explain(plan)
    assert "8 ranks = TP 1 × PP 1 × DP 8 needs" in text and "20.0 GiB may be used" in text
    assert "teacher weights 15.3" in text
    assert "\n  teacher weights: teacher.offload=true" in text
    assert "payload 0.125" in text and "\n  payload:" not in text, "it is small"


# The command


@pytest.fixture
def run_toml(tmp_path) -> Path:
    """The quick start, its models stripped of weights and tokenizer."""
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        shutil.copy(MODELS / name / "config.json", tmp_path / name)
    text = (ROOT / "examples/quickstart/eopd.toml").read_text()
    toml = tmp_path / "run.toml"
    toml.write_text(text.replace("examples/quickstart/models", str(tmp_path)))
    return toml


@pytest.fixture
def plan_command(monkeypatch, capsys):
    """Runs the command in this process; gives back its exit status and what it printed."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the tool sets it, and this takes it back

    def run(*arguments: str) -> tuple[int, str]:
        main = runpy.run_path(str(ROOT / "tools/plan.py"))["main"]
        status = main([*arguments])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def test_help_has_examples_and_answers_at_once():
    """That is, without importing torch."""
    code = "import runpy, sys; runpy.run_path('tools/plan.py')['main'](['--help'])"
    watched = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", watched], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("False\n"), done.stderr
    for text in ("examples:", "Exit status", "Time is not\npredicted", "an assumption"):
        assert text in done.stdout


TWO = ("--gpus", "2", "--gpu-memory-gib", "8")


def test_command_prints_the_configuration_and_the_layouts_that_fit(
    plan_command, run_toml, tmp_path
):
    """From config.json files alone; the JSON file has the same."""
    out = tmp_path / "plan.json"
    status, text = plan_command(str(run_toml), *TWO, "--json", str(out))
    assert status == 0, text
    assert "student: 2 ranks = TP 2 × PP 1 × DP 1" in text
    assert "teacher, colocated: 2 ranks" in text and "It fits:" in text
    plan = json.loads(out.read_text())
    assert plan["layouts"] == []
    (stage,) = plan["configuration"]["memory"]["student"]
    assert f"= while training{stage['peak'] / GIB:18.2f}" in text
    status, text = plan_command(str(run_toml), *TWO, "--search", "--json", str(out), "--top", "1")
    assert status == 0, text
    layouts = json.loads(out.read_text())["layouts"]
    assert len(layouts) > 1 and all(layout["fits"] for layout in layouts)
    shown = text[text.index(f"{len(layouts)} of {len(layouts)} layouts fit") :].splitlines()
    assert shown[1].split()[:2] == ["TP", "PP"] and shown[3] == "", "one layout, as asked for"
    assert "parallel.tensor_model_parallel_size=1" in text


def test_command_says_that_and_why_nothing_fits(plan_command, run_toml):
    no_room = (str(run_toml), *TWO, "--reserve-gib", "7.97")
    status, text = plan_command(*no_room, "rollout.kv_cache_gib=0.001")
    assert status == 1
    assert "It does NOT fit" in text and "--search lists the layouts that fit" in text
    status, text = plan_command(*no_room, "--search", "rollout.kv_cache_gib=0.001")
    assert status == 1
    assert "No layout of 2 GPUs fits. The closest:" in text
    assert "\n  engine:" not in text, "it is asleep when the rank is fullest"
    status, text = plan_command(*no_room, "--search", "rollout.kv_cache_gib=1")
    assert status == 1
    assert "\n  engine: a smaller rollout.kv_cache_gib" in text


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["rollout.tensor_model_parallel_size=4"], "an engine finds 2 GPUs on a machine"),
        (["training.max_tokens_per_microbatch=20"], "cannot hold a sample of"),
        (["student.hf_path=/nowhere"], "no config.json there"),
        (["no.such=1"], "unknown option"),
        (["parallel.pipeline_model_parallel_size=2"], "does not divide the world size 2"),
    ],
)
def test_command_refuses_what_the_trainer_would(plan_command, run_toml, arguments, message):
    run_toml.write_text(run_toml.read_text().replace("micro_batch_size = 128\n", ""))
    status, text = plan_command(str(run_toml), *TWO, *arguments)
    assert status == 2 and message in text, text


def test_a_configuration_that_is_not_possible_still_gets_its_list(plan_command, run_toml):
    impossible = "parallel.pipeline_model_parallel_size=2"
    status, text = plan_command(str(run_toml), *TWO, "--search", impossible)
    assert status == 0, text
    assert "does not divide the world size 2" in text and "layouts fit" in text


def test_gpus_that_no_layout_divides_are_said_to_be_so(plan_command, run_toml):
    """One sample for a step is too little for two ranks that can share neither the model's one head
    nor its one layer, nor two tokens, of which context parallelism makes four parts."""
    few = ("training.global_batch_size=1", "rollout.samples_per_prompt=1", "rollout.batch_size=1")
    short = ("--prompt-length", "1", "rollout.max_response_length=1")
    for name in ("student", "teacher"):
        path = run_toml.parent / name / "config.json"
        odd = {"num_key_value_heads": 1, "num_hidden_layers": 1, "layer_types": None}
        path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    status, text = plan_command(str(run_toml), *TWO, "--search", *short, *few)
    assert status == 1, text
    assert "No layout of 2 GPUs divides the models" in text
