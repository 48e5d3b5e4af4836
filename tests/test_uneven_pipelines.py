"""Pipeline stages with numbers of layers of their own: the numbering is Megatron's, and what it
would refuse, or get wrong, is refused before. tests/distributed runs them."""

import re
from itertools import product
from pathlib import Path

import pytest
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from transformers import PretrainedConfig, Qwen3Config

from megatron_eopd.config import Config, ModelConfig, load_config
from megatron_eopd.errors import ConfigError
from megatron_eopd.models.fit import check_divides, check_student
from megatron_eopd.models.megatron_config import transformer_config
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.parallel.worlds import student_layout, teacher_layout
from megatron_eopd.planning.activations import Lengths
from megatron_eopd.planning.memory import parameters_per_stage
from megatron_eopd.planning.search import Request, make_plan, search
from megatron_eopd.planning.shapes import Models, ModelShape, layers_of_stage
from megatron_eopd.train import main

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples/quickstart/eopd.toml"
PP = "parallel.pipeline_model_parallel_size"
FIRST = "parallel.decoder_first_pipeline_num_layers"
LAST = "parallel.decoder_last_pipeline_num_layers"


def model_of(num_layers: int) -> PretrainedConfig:
    return Qwen3Config(num_hidden_layers=num_layers, num_key_value_heads=4, num_attention_heads=4)


def layout_of(pp: int, vpp: int = 1, first: int | None = None, last: int | None = None) -> Layout:
    ends = {"first_stage_layers": first, "last_stage_layers": last}
    return Layout(tp=1, pp=pp, dp=1, rank=0, vpp=vpp, **ends)


def megatron_stages(config, pp: int, vpp: int) -> tuple[int, ...]:
    """The stage of every layer, by what Megatron builds on each."""
    stages: list[int | None] = [None] * config.num_layers
    for stage, chunk in product(range(pp), range(vpp) if vpp > 1 else [None]):
        begin = get_transformer_layer_offset(config, chunk, stage)
        for layer in range(begin, begin + get_num_layers_to_build(config, chunk, stage)):
            assert stages[layer] is None, "one stage has it"
            stages[layer] = stage
    return tuple(stages)


def test_every_cut_that_is_taken_has_megatrons_numbering():
    """Of 6 and 12 layers over 2 to 4 stages in 1 to 3 chunks; both ends of two stages, too."""
    taken = 0
    for num_layers, pp, vpp in product((6, 12), (2, 3, 4), (1, 2, 3)):
        hf_config = model_of(num_layers)
        for first, last in product((None, 1, 2, 3, 4, 6), repeat=2):
            layout = layout_of(pp, vpp, first, last)
            try:
                check_divides(hf_config, layout, "student")
            except ConfigError:
                continue
            config = transformer_config(hf_config, ModelConfig(), layout)
            expected = layout.stages_of_layers(num_layers)
            assert megatron_stages(config, pp, vpp) == expected, layout
            taken += 1
    assert taken > 100


@pytest.mark.parametrize(
    "num_layers,cut,message",
    [
        (
            36,
            {"pp": 8},
            f"{PP}=8 does not divide .*, or {LAST} must be one of \\[1, 8, 15, 22, 29\\]",
        ),
        (36, {"pp": 4, "last": 5}, f"{LAST}=5 and {PP}=4 do not deal out .*=36.*one of .*6, 9, 12"),
        (4, {"pp": 2, "last": 4}, r"positive multiple of 1, .* to one of \[1, 2, 3\]"),
        (4, {"pp": 2, "first": 1, "last": 2}, rf"{FIRST}=1, {LAST}=2 .*to one of \[3\]"),
        (12, {"pp": 2, "vpp": 2, "last": 3}, r"positive multiple of 2.*one of \[2, 4, 6, 8, 10\]"),
        (12, {"pp": 2, "first": 12}, f"Set another {FIRST}"),
    ],
)
def test_layers_that_cannot_be_dealt_out_so(num_layers, cut, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        check_divides(model_of(num_layers), layout_of(**cut), "student")


def test_a_teacher_in_the_students_sizes_is_not_offered_numbers_of_layers():
    with pytest.raises(ConfigError, match=r"must come to one of \[1, 2, 3, 4, 6\]\.$"):
        check_divides(model_of(36), layout_of(8), "teacher")


def test_recomputed_groups_divide_the_layers_of_every_stage():
    """Twelve layers as 8 + 4: groups of 4 do, of 8 do not."""
    recompute = {"recompute_granularity": "full"}
    for group, refused in ((4, False), (8, True)):
        model = recompute | {"recompute_num_layers": group}
        config = config_of({"pipeline_model_parallel_size": 2}, model=model)
        if refused:
            with pytest.raises(ConfigError, match="=8 does not divide the 4 layers of a model"):
                check_student(config, model_of(12), layout_of(2, last=4))
        else:
            check_student(config, model_of(12), layout_of(2, last=4))


def config_of(parallel: dict, **sections) -> Config:
    models = ROOT / "examples/quickstart/models"
    options = {
        "run_dir": "unused",
        "student": {"hf_path": models / "student"},
        "teacher": {"hf_path": models / "teacher"},
        "parallel": parallel,
    }
    return Config.model_validate(options | sections)


@pytest.mark.parametrize("section", ["", "teacher."])
def test_one_stage_has_no_first_and_last(section):
    option = f"{section}{LAST}=1"
    with pytest.raises(ConfigError, match=f"{re.escape(option)} is of one pipeline stage among"):
        load_config(QUICKSTART, [option, f"{section}{PP}=1"])


def test_a_teacher_takes_over_sizes_and_no_numbers_of_layers():
    """On the student's ranks, or its own, without sizes of its own; with them they are its own."""
    parallel = {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 1}
    config = config_of(parallel)
    student = student_layout(config, 2)
    assert student.last_stage_layers == 1
    separate = config.teacher.model_copy(update={"placement": "separate", "world_size": 2})
    for teacher in (config.teacher, separate):
        layout = teacher_layout(teacher, "teacher", config, student)
        assert (layout.pp, layout.is_uneven) == (2, False)
    own = config.parallel.for_other_model().model_copy(
        update={"decoder_first_pipeline_num_layers": 3}
    )
    teacher = config.teacher.model_copy(update={"parallel": own})
    assert teacher_layout(teacher, "teacher", config, student).first_stage_layers == 3


def test_the_planner_counts_the_layers_of_every_stage():
    """Ten layers as 2 + 3 + 3 + 2, and interleaved as 4 + 6."""
    shape = ModelShape.of(model_of(10))
    for layout, expected in (
        (layout_of(4, first=2, last=2), [2, 3, 3, 2]),
        (layout_of(2, vpp=2, last=6), [4, 6]),
    ):
        counts = [sum(layers_of_stage(shape, layout, n).values()) for n in range(layout.pp)]
        assert counts == expected == list(layout.layers_per_stage(10))
        stages = parameters_per_stage(shape, layout, shape.vocab_size)
        assert sum(stage.total for stage in stages) == shape.num_parameters


def test_a_search_keeps_numbers_of_layers_where_it_keeps_the_stages(tmp_path):
    """Ten layers on four stages, which do not divide them; on two all are alike."""
    path = tmp_path / "model"
    model_of(10).save_pretrained(path)
    parallel = {"pipeline_model_parallel_size": 4, "decoder_last_pipeline_num_layers": 1}
    model = {"hf_path": path}
    own = {"pipeline_model_parallel_size": 2}
    config = config_of(parallel, student=model, teacher=model | {"parallel": own})
    request = Request(config, Models.of(config), 4, 80 * 2**30, Lengths(8, 8))
    plans = {(plan.layout.pp, plan.layout.last_stage_layers): plan for plan in search(request)}
    assert set(plans) == {(1, None), (2, None), (4, 1)}
    assert f"{LAST}=none" in plans[2, None].options
    assert plans[4, 1].options == []
    assert "PP 4 (1 layers last)" in make_plan(config, request).layout.describe()


def test_a_dry_run_tells_the_layers_of_every_stage(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    options = [f"run_dir={tmp_path / 'run'}", f"{PP}=2", f"{FIRST}=1", "rollout.engine=megatron"]
    teacher = ["teacher.parallel.pipeline_model_parallel_size=2"]
    assert main([str(QUICKSTART), *options, *teacher, "--dry-run", "--world-size", "4"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"layout: .* PP 2 \(1 layers first\)", printed)
    assert re.search(r"layers / stage: student 1 \+ \d+\n", printed)
