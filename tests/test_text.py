"""Text to tokens and back, by a folder's tokenizer and chat template."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from dmoe_ops.models import TextCodec

tokenizers = pytest.importorskip("tokenizers")
WORDS = ["?", "<s>", "<user>", "<bot>", "block", "expert"]


@pytest.fixture
def folder(tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def config(folder, **values):
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
 {%- if message['role'] == 'user' %} <user> {{ message['content'] }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %} <bot>{% endif %}"""


def test_without_a_template_the_tokenizer_has_its_way(folder):
    codec = TextCodec(folder)
    assert codec.template is None and codec.why_no_text is None
    assert codec.encode("expert block") == [1, 5, 4] and codec.decode([4, 5]) == "block expert"
    ids, lengths = codec.batch(["expert", "block expert block"])
    assert ids.tolist() == [[1, 5, 0, 0], [1, 4, 5, 4]] and lengths.tolist() == [2, 4]
    assert ids.dtype == lengths.dtype == torch.int64


@pytest.mark.parametrize("bos", ["<s>", dict(content="<s>", special=True)])
@pytest.mark.parametrize("form", ["key", "named", "file"])
def test_a_prompt_becomes_the_turn_of_a_user(form, bos, folder):
    if form == "file":
        config(folder, bos_token=bos, chat_template="{{ raise_exception('the file wins') }}")
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    elif form == "named":
        templates = [dict(name="tools", template="?"), dict(name="default", template=TEMPLATE)]
        config(folder, bos_token=bos, chat_template=templates)
    else:
        config(folder, bos_token=bos, chat_template=TEMPLATE)
    codec = TextCodec(folder)
    assert codec.chat_of("block") == "<s> <user> block <bot>"
    assert codec.encode("block") == [1, 2, 4, 3]  # and no second <s> before it
    assert codec.batch(["block", "block expert"])[0].tolist() == [[1, 2, 4, 3, 0], [1, 2, 4, 5, 3]]
    assert TextCodec(folder, chat=False).encode("block") == [1, 4]


def test_the_template_is_rendered_as_transformers_does(folder):
    transformers = pytest.importorskip("transformers")
    template = """{%- for m in messages -%}
    {{ m | tojson }} {{ strftime_now('%Y') }}
    {% if loop.first %}
        {% continue %}
    {% endif %}
{% endfor %}"""
    for source in (TEMPLATE, template):
        config(folder, bos_token="<s>", chat_template=source)
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>")
        message = [dict(role="user", content="é <b> expert")]
        text = theirs.apply_chat_template(message, chat_template=source, tokenize=False, add_generation_prompt=True)
        assert TextCodec(folder).chat_of("é <b> expert") == text


@pytest.mark.parametrize(
    "template, says",
    [
        ("{{ raise_exception('no\\nsystem') }}", "TemplateError: no system"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages[3]['content'] }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
    ],
)
def test_a_template_that_fails_is_one_line(template, says, folder):
    config(folder, chat_template=template)
    with pytest.raises(ValueError) as error:
        TextCodec(folder).encode("block")
    assert "the chat template fails: " in str(error.value) and says in str(error.value)
    assert "\n" not in str(error.value)


def test_strange_folders(folder, tmp_path, monkeypatch):
    config(folder, chat_template=7)
    with pytest.raises(ValueError, match="chat_template must be a string or a list of named ones, got int"):
        TextCodec(folder)
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        TextCodec(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    codec = TextCodec(empty)
    assert codec.decode([1, 2, 999]) == "1 2 999"
    with pytest.raises(ValueError, match=r"prompts must be token ids: tokenizer\.json is missing in"):
        codec.encode("text")
    config(folder)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"tokenizers is not installed: pip install 'dmoe-ops\[text\]'"):
        TextCodec(folder).encode("text")


def test_jinja_is_asked_for_by_name(folder, monkeypatch):
    config(folder, chat_template=TEMPLATE)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match=r"takes the package jinja2: pip install 'dmoe-ops\[text\]'"):
        TextCodec(folder).encode("block")
