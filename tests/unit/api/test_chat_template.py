"""Chat templates render as transformers renders them, and cannot reach out of their sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from support.text_checkpoint import TEMPLATE, write_text_checkpoint
from tpmodel_worker.api.chat_template import ChatTemplate
from tpmodel_worker.api.errors import ApiError
from tpmodel_worker.api.tokenizer import read_tokenizer_config
from tpmodel_worker.models.config import ConfigError

MESSAGES = [
    {"role": "system", "content": "Be brief & <exact>."},
    {"role": "user", "content": "Grüße 你好"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": ""},
]
SPECIAL: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "plain": TEMPLATE,
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}",
    "loop controls": (
        "{% for m in messages %}\n    {% if m.role == 'assistant' %}{% break %}{% endif %}\n"
        "{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index }} {{ m.content | trim }}\n{% endfor %}"
    ),
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "generation block": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "tools": "{% if tools %}tools{% else %}none{% endif %}{{ documents is none }}",
    "namespace": (
        "{% set ns = namespace(last='') %}{% for m in messages[::-1] %}{% set ns.last = ns.last + m.role[0] %}"
        "{% endfor %}{{ ns.last }}{% if add_generation_prompt %}!{% endif %}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_renders_as_transformers_does(name: str, add_generation_prompt: bool) -> None:
    expected, _ = render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=add_generation_prompt, **SPECIAL
    )
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    assert template.render(MESSAGES, add_generation_prompt=add_generation_prompt) == expected[0]


def test_variables_reach_the_template_but_do_not_replace_the_messages() -> None:
    template = ChatTemplate("{{ enable_thinking }} {{ messages | length }}", {})
    variables = {"enable_thinking": False, "messages": []}
    assert template.render(MESSAGES, add_generation_prompt=True, variables=variables) == "False 4"


def test_the_templates_own_refusal_reaches_the_client() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ApiError, match="messages: the chat template refuses them: roles must alternate"):
        template.render(MESSAGES, add_generation_prompt=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_what_the_sandbox_forbids_is_a_refusal(source: str) -> None:
    with pytest.raises(ApiError, match="messages"):
        ChatTemplate(source, {}).render(MESSAGES, add_generation_prompt=True)


def test_a_broken_template_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="chat template, line 1"):
        ChatTemplate("{% for %}", {})


def load(folder: Path) -> ChatTemplate | None:
    return ChatTemplate.load(folder, read_tokenizer_config(folder), {})


def rendered(template: ChatTemplate | None) -> str:
    assert template is not None
    return template.render(MESSAGES, add_generation_prompt=False)


def test_the_template_file_wins_over_the_tokenizers_configuration(tmp_path: Path) -> None:
    write_text_checkpoint(tmp_path)
    assert rendered(load(tmp_path)).startswith("<|start|>system\n")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert rendered(load(tmp_path)) == "file"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert rendered(load(tmp_path)) == "plain"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [*named[:1], {"name": "rag"}]}))
    with pytest.raises(ConfigError, match="no template 'default'"):
        load(tmp_path)


def test_a_checkpoint_without_template_has_none(tmp_path: Path) -> None:
    assert load(tmp_path) is None
