"""Options: one place, checked, overridable; a wrong one says its name, its value and the fix."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from megatron_eopd import evaluate, train
from megatron_eopd.config import (
    Config,
    Section,
    TeacherConfig,
    changed_options,
    describe_options,
    load_config,
)
from megatron_eopd.errors import ConfigError
from megatron_eopd.objectives import PRESETS
from tests.test_preflight import QUICKSTART

ROOT = Path(__file__).parents[1]


@pytest.fixture
def toml(tmp_path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('run_dir = "r"\n[student]\nhf_path = "s"\n[teacher]\nhf_path = "t"\n')
    return path


def test_overrides_win_over_the_file_and_keep_their_type(toml):
    config = load_config(
        toml,
        [
            "training.lr=3e-6",
            "parallel.tensor_model_parallel_size=2",
            "student.hf_path=/models/with space",
            "objective.name=opd",
            "evaluation.tasks=countdown",
            "rollout.replay=none",
        ],
    )
    assert config.training.lr == 3e-6
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.student.hf_path == Path("/models/with space")
    assert config.objective.name == "opd"
    assert config.evaluation.tasks == ("countdown",) and config.rollout.replay is None


def test_both_models_get_the_rollout_temperature_unless_told_otherwise(toml):
    """One temperature convention: two different ones are never a default."""
    config = load_config(toml, ["rollout.temperature=0.7"])
    assert config.student_temperature == config.teacher_temperature == 0.7
    config = load_config(toml, ["rollout.temperature=0.7", "objective.teacher_temperature=1.0"])
    assert (config.student_temperature, config.teacher_temperature) == (0.7, 1.0)


@pytest.mark.parametrize(
    "override,message",
    [
        ("objective.entropy_treshold=0.5", r"Did you mean objective\.entropy_threshold"),
        ("training.nonsense=1", r"training\.nonsense: unknown option.*training\.lr"),
        ("training.lr=fast", r"training\.lr='fast'"),
        ("training.train_iters=1.5", r"training\.train_iters=1\.5"),
        ("teacher.payload=smoke", r"teacher\.payload='smoke'.*'hidden'"),
        ("rollout.batch_size=100", r"global_batch_size=32.*Set rollout\.batch_size=128"),
        ("rollout.samples_per_prompt=3", r"Set rollout\.batch_size=129"),
        ("parallel.sequence_parallel=true", r"tensor_model_parallel_size > 1"),
        ("parallel.virtual_pipeline_model_parallel_size=2", r"pipeline_model_parallel_size is 1"),
        ("teacher.placement=separate", r"Set world_size to the number of ranks"),
        ("teacher.world_size=2", r"leave it out of a colocated one"),
        ("rollout.placement=separate", r"with world_size=None\. Set world_size to the number"),
        ("rollout.world_size=2", r"placement=colocated with world_size=2.*leave it out"),
        ("rollout={ num_engines = 2, min_engines = 3 }", r"min_engines=3 is above num_engines=2"),
        ("rollout.visible_devices=4", r"rollout\.visible_devices: unknown option"),
        ("weight_sync.port=1", r"weight_sync\.port: unknown option"),
        ("teacher.payload=topk", r"reverse_kl=full needs all of them.*eopd_paper"),
        ("training.overlap_param_gather=true", r"needs overlap_grad_reduce=true"),
        ("training.min_lr=1e-3", r"min_lr=0\.001 is above lr=1e-06.*Set min_lr=1e-06 or less"),
        ("teachers.teacher.hf_path=x", r"is the one of \[teacher\]"),
        ("teachers.other.payloud=topk", r"Did you mean teacher\.payload\?.*teacher\.offload"),
        ("training.lr_warmup_iters=1", r"Did you mean training\.lr_warmup_steps\?"),
        ('teachers={ a = { hf_path = "x", payload = "logits" } }', r"different payloads"),
        (
            'teachers={ a = { hf_path = "x", microbatches_per_exchange = 1 } }',
            r"Set teacher\.microbatches_per_exchange",
        ),
        ('logging.trackers=["tensorboard", "tensorboard"]', r"names a tracker twice"),
        *(
            (f"data.chat_template_kwargs.enable_thinking={word}", rf"={word!r} is a text")
            for word in ("True", "False", "FALSE", "None", "null")
        ),
        ('data.chat_template_kwargs={ x = "false" }', r"x='false' is a text.*Write false, with"),
        ("a.b=1", r"unknown option.*Known here: run_dir, seed, student, teacher"),
        ("run_dir", r"has no '='"),
        ("run_dir.x=1", r"'run_dir' is an option, not a section"),
    ],
)
def test_a_wrong_option_is_named_with_value_and_fix(toml, override, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config(toml, [override])


@pytest.mark.parametrize(
    "alone",
    [
        "rollout.engine=megatron",
        "rollout.replay=recorded",
        "rollout.reference_fraction=1 data.prompts=p.jsonl data.response_key=response",
    ],
)
def test_no_ranks_are_kept_for_engines_that_a_run_does_not_start(toml, alone):
    separate = ["rollout.placement=separate", "rollout.world_size=2"]
    assert load_config(toml, separate).wants_vllm
    with pytest.raises(
        ConfigError, match=r"world_size=2 keeps ranks for vLLM .*Set rollout\.placement=colocated"
    ):
        load_config(toml, [*separate, *alone.split()])
    assert not load_config(toml, alone.split()).wants_vllm


def float_options(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        types = [field.annotation, *get_args(field.annotation)]
        sections = [t for t in types if isinstance(t, type) and issubclass(t, Section)]
        if sections and field.annotation != dict[str, TeacherConfig]:
            yield from float_options(sections[0], f"{prefix}{name}.")
        elif float in types:
            yield prefix + name


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_every_number_is_finite(toml, value):
    """A comparison with NaN is false, so a bound alone would let it in."""
    options = list(float_options())
    assert len(options) > 30 and "training.clip_grad" in options
    for option in options:
        with pytest.raises(ConfigError, match=rf"{option}={value}: .*finite number"):
            load_config(toml, [f"{option}={value}"])


@pytest.mark.parametrize("payload", ["hidden", "topk", "logits"])
def test_a_quantile_of_a_step_needs_the_whole_step(toml, payload):
    """Of portions it would be another threshold, and another gradient, with every portion."""
    options = ["objective.name=eopd_paper", "objective.gate=quantile", f"teacher.payload={payload}"]
    portions = [*options, "teacher.microbatches_per_exchange=2"]
    with pytest.raises(
        ConfigError, match=r"gate=quantile .*microbatches_per_exchange=2 hands"
    ) as e:
        load_config(toml, portions)
    assert "Set teacher.payload=hidden or topk, and" in str(e.value)
    if payload == "logits":
        with pytest.raises(ConfigError, match=r"hands over a part of the step"):
            load_config(toml, options)
    else:
        load_config(toml, options)


def test_a_missing_option_and_a_broken_file_are_named(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('run_dir = "r"\n[teacher]\nhf_path = "t"\n')
    with pytest.raises(ConfigError, match="student: missing"):
        load_config(path)
    path.write_text("run_dir = [")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(path)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        load_config(tmp_path)


def test_a_file_is_utf8_with_a_byte_order_mark_or_without(toml):
    plain, text = load_config(toml), toml.read_text()
    toml.write_text(text, encoding="utf-8-sig")
    assert load_config(toml) == plain
    for content in (text.encode("utf-16"), (text + "# é").encode("latin-1")):
        toml.write_bytes(content)
        with pytest.raises(ConfigError, match=r"run\.toml: not UTF-8 text .*Save it as UTF-8"):
            load_config(toml)


def test_a_template_s_effort_may_be_none(toml):
    options = [f"data.{o}" for o in ("apply_chat_template=true", "chat_template_kwargs.x=none")]
    assert load_config(toml, options).data.chat_template_kwargs == {"x": "none"}


def test_changed_options_are_listed_with_both_values(toml):
    old, new = (
        load_config(toml, [override]).model_dump(mode="json")
        for override in ("training.lr=1e-6", "objective.name=opd")
    )
    assert changed_options(old, new) == ["objective.name: eopd → opd"]
    assert changed_options({"a": {"b": 1}}, {"a": {"b": 2}, "c": 3}) == [
        "a.b: 1 → 2",
        "c: None → 3",
    ]


def test_every_option_has_a_docstring():
    assert not [option.name for option in describe_options() if not option.text]


@pytest.mark.parametrize("command", [train, evaluate], ids=["train", "evaluate"])
def test_help_lists_every_option_with_its_default(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    for option in describe_options():
        assert f"  {option.name}={option.default}\n" in text
        assert all(value in text for value in option.values)
    assert "torchrun" in text


def test_what_help_says_is_what_the_configuration_does(toml):
    """Each default can be typed as it is shown, and changes nothing; each word can be chosen, or is
    refused for a reason that names another option."""
    plain = load_config(toml)
    options = list(describe_options())
    assert len({option.name for option in options}) == len(options) > 100
    assert not [o.name for o in options if o.name.startswith("teachers.")]
    for option in options:
        if option.default in ("required", "unset"):
            continue
        # One of the former gives it a table of its own; the latter has one here.
        gives_a_table = option.name.startswith(("teacher.parallel.", "teacher.prompt."))
        if not gives_a_table and option.name != "teacher":
            assert load_config(toml, [f"{option.name}={option.default}"]) == plain, option.name
        for value in option.values:
            try:
                typed = f'["{value}"]' if option.default.startswith("[") else value
                load_config(toml, [f"{option.name}={typed}"])
            except ConfigError as error:
                assert "Input should be" not in str(error), option.name


def test_every_preset_can_be_chosen(toml):
    for name in PRESETS:
        assert load_config(toml, [f"objective.name={name}"]).objective.name == name


def test_paths_of_a_file_may_be_relative_to_it(tmp_path, monkeypatch):
    """Beside the file if it is there, else from where the command runs; the command line always
    means the latter, and a path that is nowhere is refused with both places, but only when a run
    wants it."""
    here, elsewhere = tmp_path / "configs", tmp_path / "work"
    for directory in (here / "student", elsewhere / "teacher", elsewhere / "student"):
        directory.mkdir(parents=True)
    toml = here / "run.toml"
    toml.write_text(
        'run_dir = "run"\n[student]\nhf_path = "student"\n[teacher]\nhf_path = "teacher"\n'
        '[data]\nprompts = "prompts.jsonl"\n'
    )
    monkeypatch.chdir(elsewhere)
    config = load_config(toml)
    assert config.student.hf_path == here / "student"
    assert config.teacher.hf_path == Path("teacher") and config.run_dir == Path("run")
    with pytest.raises(ConfigError) as refused:
        config.check_inputs_exist()
    for place in (here, elsewhere):
        assert str(place / "prompts.jsonl") in str(refused.value)
    config = load_config(toml, ["data.prompts=countdown", "student.hf_path=student"])
    config.check_inputs_exist()
    assert config.student.hf_path == Path("student") and config.data.prompts == "countdown"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("none", ()),
        ("[]", ()),
        ("math500", ("math500",)),
        ("gsm8k=test.jsonl", ("gsm8k=test.jsonl",)),
        ("['math500', 'my.task:Mine=here=there']", ("math500", "my.task:Mine=here=there")),
    ],
)
def test_tasks_are_a_list_and_one_needs_no_brackets(value, expected):
    assert load_config(QUICKSTART, [f"evaluation.tasks={value}"]).evaluation.tasks == expected


def test_the_likeliest_answer_is_drawn_once():
    common = ["evaluation.temperature=0", "rollout.temperature=0.7"]
    with pytest.raises(ConfigError, match="writes the same response samples_per_problem=16 times"):
        load_config(QUICKSTART, common)
    config = load_config(QUICKSTART, [*common, "evaluation.samples_per_problem=1"])
    assert config.evaluation_temperature == 0
    assert load_config(QUICKSTART, common[1:]).evaluation_temperature == 0.7


@pytest.mark.parametrize(
    ("value", "said"), [("['a', 'a']", "names a task twice"), ("gsm8k=", "'gsm8k=' is no NAME")]
)
def test_tasks_have_names_of_their_own(value, said):
    with pytest.raises(ConfigError, match=said):
        load_config(QUICKSTART, [f"evaluation.tasks={value}"])


def test_a_tasks_file_is_looked_for_beside_the_configuration(tmp_path):
    """Like every other file that the configuration names."""
    (tmp_path / "mine.jsonl").touch()
    text = QUICKSTART.read_text().replace('["countdown"]', '["math=mine.jsonl", "gsm8k=far.jsonl"]')
    (tmp_path / "run.toml").write_text(text)
    tasks = load_config(tmp_path / "run.toml").evaluation.tasks
    assert tasks == (f"math={tmp_path / 'mine.jsonl'}", "gsm8k=far.jsonl")


def test_without_a_teacher_nothing_is_trained_and_no_other_teacher_stands_in(toml):
    """An evaluation needs none."""
    config = load_config(toml, ["teacher=none"])
    assert config.all_teachers == {}
    with pytest.raises(ConfigError, match=r"no \[teacher\]: a run needs one"):
        config.check_has_teacher()
    with pytest.raises(ConfigError, match=r"\[teachers.other\] without \[teacher\]"):
        load_config(toml, ["teacher=none", "teachers.other.hf_path=t"])
