"""Chat templates: which one, and that every turn's text stands in what it renders."""

import json
from pathlib import Path

import pytest

from megatron_eopd.data.tokenizer import load_tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import Turn
from tests.tiny_tokenizers import CHATML, write

ASK = [Turn("user", "two plus two?")]
PARTS = (
    "Q:{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}A:"
)


def rendered(directory: Path, turns=ASK, **options) -> str:
    tokenizer = load_tokenizer(directory)
    return tokenizer.show(tokenizer.encode_chat(turns, **options))


# --- every turn's text --------------------------------------------------------------------------


def test_a_template_that_goes_through_parts_is_given_parts(tmp_path):
    """As of models that see images: of plain text it would render the frame alone."""
    path = write(tmp_path, chat_template=PARTS)
    assert rendered(path) == "Q:two plus two?A:"
    # These stand in the frame by themselves.
    assert rendered(path, [Turn("user", "A")]) == "Q:AA:"


def test_a_template_that_insists_on_parts_is_given_parts(tmp_path):
    path = write(
        tmp_path,
        chat_template="{% if messages[0].content is string %}{{ raise_exception('parts!') }}"
        "{% endif %}{{ messages[0].content[0].text }}",
    )
    assert rendered(path) == "two plus two?"


def test_a_template_that_takes_both_is_given_text(tmp_path):
    path = write(
        tmp_path,
        chat_template="{% for m in messages %}{% if m.content is string %}text {{ m.content }}"
        "{% else %}{% for c in m.content %}part {{ c.text }}{% endfor %}{% endif %}{% endfor %}",
    )
    assert rendered(path) == "text two plus two?"


@pytest.mark.parametrize(
    ("template", "turns", "role"),
    [
        ("Q: {{ messages[0].text }} A:", ASK, r"1 of 1 \(user\)"),
        ("Q: {{ messages[0].text }} A:", [Turn("user", "Q")], r"1 of 1 \(user\)"),
        ("{{ messages[-1].content }}", [Turn("system", "Be brief."), *ASK], r"1 of 2 \(system\)"),
        ("{{ messages[0].content[:20] }}", [Turn("user", "long " * 20)], r"1 of 1 \(user\)"),
    ],
)
def test_a_template_that_leaves_out_a_turn_is_refused(tmp_path, template, turns, role):
    path = write(tmp_path, chat_template=template)
    with pytest.raises(ConfigError, match=rf"config\.json: .* leaves out .* {role}.* It renders '"):
        rendered(path, turns)


def test_what_templates_do_to_a_text_is_allowed(tmp_path):
    """They strip white space, and take a reasoning model's earlier thoughts out."""
    path = write(
        tmp_path,
        chat_template="{% for m in messages %}[{{ m.content.split('</think>')[-1] | trim }}]"
        "{% endfor %}",
    )
    turns = [Turn("user", "  two? \n"), Turn("assistant", "<think>hm</think>\n\nfour"), *ASK]
    assert rendered(path, turns) == "[two?][four][two plus two?]"


def by_turn(expression: str) -> str:
    return "{% for m in messages %}[{{ " + expression + " }}]{% endfor %}"


@pytest.mark.parametrize(
    ("expression", "turns"),
    [
        ("m.content.replace('/no_think', '').replace('/think', '')", [Turn("user", "two? /think")]),
        ("m.content | replace('/no_think', '')", [Turn("system", "/no_think Be brief."), *ASK]),
        ("m | tojson", [Turn("user", 'say "x"\nor é, \\')]),
        ("m | tojson(ensure_ascii=True)", [Turn("user", "é\n")]),
        (r"m.content.replace('\r\n', '\n')", [Turn("user", "one\r\ntwo")]),
        ("m.content.split('</thought>')[-1]", [Turn("assistant", "hm</thought>four"), *ASK]),
        ("m.content.split('[/THINK]')[-1]", [Turn("assistant", "[THINK]hm[/THINK]four"), *ASK]),
        ("m.content.split('</seed:think>')[-1]", [Turn("assistant", "hm</seed:think>4"), *ASK]),
    ],
)
def test_what_templates_write_otherwise_is_there(tmp_path, expression, turns):
    assert "[" in rendered(write(tmp_path, chat_template=by_turn(expression)), turns)


@pytest.mark.parametrize("text", ["two /think three", 'two "x"\n', "one\r\ntwo"])
@pytest.mark.parametrize("and_then", ["", " | tojson"])
def test_and_what_is_cut_from_it_is_not(tmp_path, text, and_then):
    path = write(tmp_path, chat_template=by_turn("m.content.replace('two', '')" + and_then))
    with pytest.raises(ConfigError, match="leaves out the text of message 1"):
        rendered(path, [Turn("user", text)])


# --- errors of templates ------------------------------------------------------------------------


def test_a_template_s_own_words_are_quoted(tmp_path):
    path = write(
        tmp_path,
        chat_template="{% if effort is not defined %}{{ raise_exception('effort\nmust be set') }}"
        "{% endif %}{{ messages[0].content }}",
    )
    with pytest.raises(ConfigError, match=r"config\.json: .*effort must be set.*template_kwargs"):
        rendered(path)
    assert rendered(path, effort="low") == "two plus two?"


def test_a_template_that_takes_no_system_turn(tmp_path):
    """As Gemma's: the way out is another than a variable of the template."""
    refuse = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    )
    path = write(tmp_path, chat_template=refuse + "{% endif %}" + CHATML)
    with pytest.raises(ConfigError, match=r"System role.*data\.system_prompt.*--drop-system") as e:
        rendered(path, [Turn("system", "Be brief."), *ASK])
    assert "chat_template_kwargs" not in str(e.value)


@pytest.mark.parametrize(
    "name", ["bos_token", "messages", "add_generation_prompt", "continue_final_message"]
)
def test_variables_that_the_run_sets_are_no_options(tmp_path, name):
    path = write(tmp_path, chat_template="{{ bos_token }}" + CHATML)
    with pytest.raises(ConfigError, match=rf"_kwargs\.{name}: the run itself sets this variable"):
        rendered(path, **{name: "x"})


@pytest.mark.parametrize("text", [CHATML, CHATML + "{{ chat_template }}"])
def test_a_template_is_no_variable_of_one(tmp_path, text):
    with pytest.raises(ConfigError, match=r"kwargs\.chat_template: .*data\.chat_template_file"):
        rendered(write(tmp_path, chat_template=text), chat_template="x")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].content }}\n{% if x %}\n{% endfor %}", r"Line 3 of it.*endfor"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[0].content.a.b }}", "has no attribute 'a'"),
    ],
)
def test_a_template_that_is_wrong_is_named_with_what_is_wrong(tmp_path, template, said):
    path = write(tmp_path, chat_template=template)
    with pytest.raises(ConfigError, match=rf"config\.json: the chat template.*{said}") as raised:
        rendered(path)
    assert "\n" not in str(raised.value)


def test_templates_have_the_functions_of_transformers(tmp_path):
    path = write(
        tmp_path,
        chat_template="{{ strftime_now('%Y')[:1] }}{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}"
        "{% endfor %}{{ eos_token }}",
    )
    assert rendered(path) == "2two plus two?<eos>"
    assert '"name": "add"' in rendered(path, tools=[{"name": "add"}])


# --- which one ----------------------------------------------------------------------------------


@pytest.fixture
def named(tmp_path) -> Path:
    """Templates in all the places that there are for them."""
    path = write(
        tmp_path / "named",
        chat_template=[
            {"name": "rag", "template": "rag {{ messages[0].content }}"},
            {"name": "default", "template": "config {{ messages[0].content }}"},
        ],
    )
    (path / "chat_template.json").write_text('{"chat_template": "json {{ messages[0].content }}"}')
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates/tool_use.jinja").write_text("tool {{ messages[0].content }}")
    return path


def test_templates_are_chosen_by_name_or_file(named, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("mine {{ messages[0].content }}")
    tokenizer = load_tokenizer(named)
    for name, path, word in (
        (None, None, "config"),
        ("default", None, "config"),
        ("rag", None, "rag"),
        ("tool_use", None, "tool"),
        (None, file, "mine"),
    ):
        chosen = tokenizer.with_template(name, path)
        assert chosen.render_chat(ASK) == f"{word} two plus two?"
    assert tokenizer.render_chat(ASK) == "config two plus two?", "the others left it as it was"


def test_files_come_before_the_configuration_and_that_before_a_processor_s(named):
    (named / "chat_template.jinja").write_text("jinja {{ messages[0].content }}")
    assert rendered(named) == "jinja two plus two?"
    (named / "chat_template.jinja").unlink()
    (named / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    assert rendered(named) == "json two plus two?"


def test_a_choice_that_is_none_names_those_that_there_are(named, tmp_path):
    tokenizer = load_tokenizer(named)
    with pytest.raises(ConfigError, match=r"name=rga: .* It has default, rag, tool_use\."):
        tokenizer.with_template("rga", None)
    with pytest.raises(ConfigError, match=r"chat_template_file=.*none\.jinja: no such file"):
        tokenizer.with_template(None, tmp_path / "none.jinja")
    with pytest.raises(ConfigError, match="Set one of them"):
        tokenizer.with_template("rag", tmp_path / "mine.jinja")


def test_several_templates_and_no_default_one(tmp_path):
    path = write(tmp_path, chat_template=[{"name": n, "template": CHATML} for n in ("a", "b")])
    tokenizer = load_tokenizer(path)
    with pytest.raises(ConfigError, match=r"data\.chat_template_name to one of a, b"):
        tokenizer.encode_chat(ASK)
    assert tokenizer.with_template("b", None).encode_chat(ASK)


def test_no_template_at_all(tmp_path):
    with pytest.raises(ConfigError, match=r"no chat template. Set data\.apply_chat_template=false"):
        rendered(write(tmp_path))


@pytest.mark.parametrize("value", [5, ["a"], [{"name": "a"}]])
def test_templates_in_no_known_form(tmp_path, value):
    with pytest.raises(ConfigError, match=r"config\.json: chat_template is neither"):
        rendered(write(tmp_path, chat_template=value))


# --- tokenizers that are code -------------------------------------------------------------------


@pytest.fixture
def questions(monkeypatch) -> list[str]:
    """What would have been asked on the terminal."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "n")
    return asked


@pytest.mark.parametrize("has_json", [True, False])
@pytest.mark.parametrize("as_list", [True, False])
def test_a_tokenizer_that_is_code_is_refused_without_a_question(
    tmp_path, questions, has_json, as_list
):
    code = ["tokenization_x.XTokenizer", None]
    auto_map = code if as_list else {"AutoTokenizer": code}
    path = write(tmp_path, tokenizer_class="XTokenizer", auto_map=auto_map)
    if not has_json:
        (path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenization_x.*never run here.*student\.tokenizer"):
        load_tokenizer(path)
    assert not questions


@pytest.mark.parametrize("tokenizer_class", [None, "XTokenizer"])
def test_a_model_that_is_code_asks_nothing_for_its_tokenizer(tmp_path, questions, tokenizer_class):
    path = write(tmp_path, tokenizer_class=tokenizer_class)
    (path / "tokenization_x.py").write_text("raise SystemExit('ran')")
    config = {"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.XConfig"}}
    (path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(path).encode("two")
    (path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"Copy tokenizer\.json"):
        load_tokenizer(path)
    assert not questions
