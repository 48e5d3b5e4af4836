"""The planner: its sums, its ranking, and its command. tests/distributed/test_plan.py compares the
memory model with real models and optimizers."""

import json
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from megatron_eopd.config import Config, load_config
from megatron_eopd.models.build import read_hf_config
from megatron_eopd.models.fit import check_divides, check_teacher
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.parallel.worlds import student_layout
from megatron_eopd.planning.activations import Lengths, Platform, chunks_in_flight
from megatron_eopd.planning.calibration import MeasuredRun, calibrate
from megatron_eopd.planning.memory import Setup, parameters_per_stage, plan_memory
from megatron_eopd.planning.search import Request, make_plan, search
from megatron_eopd.planning.shapes import Models, ModelShape
from megatron_eopd.planning.time import pipelined

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


def make_request(config: Config, num_gpus: int, gib: float, **changes) -> Request:
    lengths = Lengths(512, 2048)
    request = Request(config, Models.of(config), num_gpus, int(gib * GIB), lengths, lengths)
    return replace(request, **changes)


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


def test_interleaving_and_context_parallelism_move_parameters_and_lose_none(family_dirs):
    for family in ("qwen3", "qwen3_moe_mixed"):
        shape = ModelShape.of(read_hf_config(family_dirs[family]))
        plain = Layout(tp=2, pp=2, dp=4, rank=0)
        expected = sum(s.total for s in parameters_per_stage(shape, plain, 256))
        for changed in (replace(plain, vpp=2), replace(plain, cp=2, dp=2)):
            stages = parameters_per_stage(shape, changed, 256)
            assert sum(s.total for s in stages) == expected


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


def test_recomputation_and_sequence_parallelism_save_activations(models):
    """Full recomputation keeps a layer's input of each; sequence parallelism cuts what lies between
    the parallel layers."""

    def activations(parallel, **model) -> int:
        config = make_config(models["8b"], models["8b"], parallel=parallel, model=model)
        return memory_of(config, 8).stages["student"][0].activations

    plain = {"tensor_model_parallel_size": 4}
    sharded = plain | {"sequence_parallel": True}
    assert activations(sharded) < 0.8 * activations(plain)
    grouped = {"recompute_granularity": "full", "recompute_num_layers": 4}
    sizes = [
        activations(sharded),
        activations(sharded, recompute_method="block", **grouped),
        activations(sharded, **grouped),
        activations(sharded, recompute_granularity="full"),
    ]
    assert sizes == sorted(sizes, reverse=True)


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


def test_the_engine_sits_on_the_first_ranks_or_elsewhere(models):
    def engine(**rollout) -> list[int]:
        config = make_config(
            models["8b"],
            models["8b"],
            parallel={"pipeline_model_parallel_size": 4},
            rollout={"batch_size": 256, "kv_cache_gib": 3.0} | rollout,
        )
        return [stage.engine for stage in memory_of(config, 8).stages["student"]]

    weights = 2 * ModelShape.of(read_hf_config(models["8b"])).num_parameters
    # Stages of two ranks: four GPUs reach into the second.
    assert engine(tensor_model_parallel_size=4) == [weights // 4 + 3 * GIB] * 2 + [0, 0]
    assert engine(tensor_model_parallel_size=1) == [weights + 3 * GIB, 0, 0, 0]
    assert engine(visible_devices="8") == engine(engine="megatron") == [0, 0, 0, 0]


# Search


@pytest.mark.parametrize("student,teacher", [("8b", "32b"), ("moe", "32b"), ("moe", "moe")])
def test_what_is_ranked_is_sorted_and_taken_by_the_trainer(models, student, teacher, tmp_path):
    """Every layout passes the trainer's own checks, for student and teacher; the options printed
    for the best one give it back."""
    config = make_config(models[student], models[teacher])
    found = search(make_request(config, 16, 70))
    keys = [(plan.time.total, -plan.headroom) for plan in found.plans]
    assert keys == sorted(keys) and len(found.plans) > 10
    configs = {path: read_hf_config(path) for path in models.values()}
    for plan in found.plans:
        assert plan.layout == Layout.from_config(plan.config.parallel, 16, 0)
        check_divides(configs[models[student]], plan.layout, "student")
        options, layout = plan.config.teacher, plan.teachers["teacher"]
        check_teacher(options, "teacher", configs[models[teacher]], layout)
        assert plan.layout.tp <= 8 and plan.headroom >= 0
        assert plan.memory.worst[2].peak <= 70 * GIB
    toml = tmp_path / "run.toml"
    toml.write_text(
        f'run_dir = "x"\n[student]\nhf_path = "{models[student]}"\n'
        f'[teacher]\nhf_path = "{models[teacher]}"\n'
    )
    best = found.plans[0]
    again = load_config(toml, best.options)
    assert again.parallel == best.config.parallel
    assert again.teacher.parallel == best.config.teacher.parallel
    assert again.model.recompute_granularity == best.config.model.recompute_granularity


def test_more_memory_never_takes_a_layout_away(models):
    def feasible(gib) -> set:
        request = make_request(make_config(models["8b"], models["32b"]), 8, gib)
        return {
            (plan.layout, plan.config.model.recompute_granularity) for plan in search(request).plans
        }

    small, middle, large = (feasible(gib) for gib in (35, 60, 100))
    assert small < middle < large


def test_a_teacher_that_does_not_fit_as_the_student_gets_sizes_of_its_own(models):
    """Beside an unsharded 8B student a 32B teacher needs tensor parallelism of its own."""
    request = make_request(make_config(models["8b"], models["32b"]), 16, 75)
    plans = [p for p in search(request).plans if p.layout.tp == 1 and p.layout.pp == 1]
    assert plans
    assert all(plan.teachers["teacher"].tp > 1 for plan in plans)
    assert any("teacher.parallel.tensor_model_parallel_size" in o for o in plans[0].options)


def test_sixty_four_gpus_are_searched_in_seconds(models):
    """Seconds of a busy core; every process that this test shares it with counts."""
    begin = time.process_time()
    for student, teacher in (("8b", "32b"), ("moe", "32b")):
        search(make_request(make_config(models[student], models[teacher]), 64, 75))
    assert time.process_time() - begin < 30


# Time


def test_a_pipeline_waits_for_its_slowest_stage():
    """m · t + (p − 1) · t with equal stages; interleaving shortens the second part."""
    assert pipelined([2.0] * 4, 8, 1) == 8 * 2 + 3 * 2
    assert pipelined([2.0] * 4, 8, 3) == 8 * 2 + 3 * 2 / 3
    assert pipelined([1.0, 3.0], 8, 1) == 8 * 3 + 1


def measured_run(path: Path, config: Config, world_size: int, **metrics) -> Path:
    path.mkdir()
    (path / "config.json").write_text(config.model_dump_json())
    (path / "ranks.txt").write_text("rank  student\n" + "0     tp0\n" * world_size)
    rows = [{"iteration": 0, "eval/x": 1.0}]
    for iteration, factor in enumerate((10.0, 1.0, 1.0, 1.0), start=1):  # the first warms up
        times = {f"time/{name}": factor * x for name, x in metrics["seconds"].items()}
        own = {"iteration": iteration, "rollout/length_mean": 700.0, "time/total": 9.0}
        rows.append(own | times | metrics.get("other", {}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_calibration_gives_back_what_was_measured(models, tmp_path):
    """The run's own configuration is estimated at what it took, and its memory at what it used;
    another layout in proportion."""
    parallel = {"tensor_model_parallel_size": 4}
    rollout = {"max_response_length": 2048}
    config = make_config(models["8b"], models["8b"], parallel=parallel, rollout=rollout)
    seconds = {"rollout": 50.0, "score": 3.0, "train": 20.0, "sync": 2.0}
    peak = {"memory/cuda_peak_gib": 65.0}
    run = MeasuredRun.read(measured_run(tmp_path / "run", config, 8, seconds=seconds, other=peak))
    assert run.world_size == 8 and run.response_length == 700
    request = make_request(config, 8, 70, mean=Lengths(512, 700))
    calibration = calibrate(run, request)
    calibrated = replace(request, calibration=calibration)
    plan = make_plan(config, calibrated)
    assert plan.time.stages == pytest.approx(seconds)
    (stage,) = plan.memory.stages["student"]
    assert stage.peak - stage.engine == pytest.approx(65 * GIB, rel=1e-6)
    other = make_config(models["8b"], models["8b"], parallel={"tensor_model_parallel_size": 8})
    plain, scaled = (make_plan(other, r).time for r in (request, calibrated))
    assert scaled.train / plain.train == pytest.approx(calibration.seconds["train"])


def test_a_run_that_cannot_calibrate_says_why(models, tmp_path):
    config = make_config(models["8b"], models["8b"])
    path = measured_run(tmp_path / "run", config, 8, seconds={"rollout": 1.0})
    (path / "metrics.jsonl").write_text('{"iteration": 0, "eval/x": 1.0}\n')
    with pytest.raises(ValueError, match="no finished iteration"):
        MeasuredRun.read(path)
    (path / "ranks.txt").unlink()
    with pytest.raises(ValueError, match=r"ranks.txt: no such file"):
        MeasuredRun.read(path)


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


def test_help_names_every_assumption_and_answers_at_once():
    """That is, without importing torch."""
    code = "import runpy, sys; runpy.run_path('tools/plan.py')['main'](['--help'])"
    watched = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", watched], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("False\n"), done.stderr
    for text in ("--mfu", "--decode-bandwidth", "examples:", "Exit status", "none was measured"):
        assert text in done.stdout


TWO = ("--gpus", "2", "--gpu-memory-gib", "8")


def test_command_prints_a_table_and_valid_json(plan_command, run_toml, tmp_path):
    """From config.json files alone."""
    out = tmp_path / "plan.json"
    options = ("--json", str(out), "--top", "3", "training.micro_batch_size=4")
    status, text = plan_command(str(run_toml), *TWO, *options)
    assert status == 0, text
    assert "2 ranks = TP 2 × PP 1 × DP 1" in text and "layouts fit" in text
    plan = json.loads(out.read_text())
    assert plan["configuration"]["layout"]["tp"] == 2
    assert len(plan["plans"]) > 3
    for entry in plan["plans"]:
        assert entry["fits"] and entry["seconds"]["total"] > 0
        assert entry["memory"]["student"][0]["weights"] > 0


def test_command_says_that_and_why_nothing_fits(plan_command, run_toml):
    status, text = plan_command(str(run_toml), *TWO, "--reserve-gib", "7.95")
    assert status == 1
    assert "It does NOT fit" in text and "No layout of 2 GPUs fits.\nThe closest:" in text
    assert "rollout.kv_cache_gib" in text


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["rollout.tensor_model_parallel_size=4"], "vLLM finds 2 GPUs"),
        (["training.max_tokens_per_microbatch=20"], "cannot hold a sample of"),
        (["student.hf_path=/nowhere"], "no config.json there"),
        (["no.such=1"], "unknown option"),
        (["--calibrate", "/nowhere"], "no such file"),
    ],
)
def test_command_refuses_what_no_layout_can_mend(plan_command, run_toml, arguments, message):
    run_toml.write_text(run_toml.read_text().replace("micro_batch_size = 128\n", ""))
    status, text = plan_command(str(run_toml), *TWO, *arguments)
    assert status == 2 and message in text, text


def test_a_configuration_that_is_not_possible_still_gets_its_list(plan_command, run_toml):
    status, text = plan_command(str(run_toml), *TWO, "parallel.pipeline_model_parallel_size=2")
    assert status == 0, text
    assert "does not divide the world size 2" in text and "layouts fit" in text
