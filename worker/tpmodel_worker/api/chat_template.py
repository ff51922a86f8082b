"""Chat templates of checkpoints: jinja2, in a sandbox, with the names that template authors rely on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Never

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tpmodel_worker.api.errors import invalid
from tpmodel_worker.models.config import ConfigError

# What a template raises on messages that it was not written for.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str | list[str]]) -> None:
        """Compiles; raises ConfigError when the template cannot be.

        Args:
            source: jinja2 text.
            special_tokens: what templates see as bos_token, eos_token and so on.
        """
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template, line {error.lineno}: {error}") from error
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(
        cls, folder: str | Path, config: Mapping[str, Any], special_tokens: Mapping[str, str | list[str]]
    ) -> ChatTemplate | None:
        """The template of a checkpoint folder: chat_template.jinja, else tokenizer_config.json's; None: it has none.

        Args:
            folder: the checkpoint.
            config: its tokenizer_config.json.
            special_tokens: what templates see as bos_token, eos_token and so on.

        Raises:
            ConfigError: there is one and it cannot be used.
        """
        path = Path(folder) / "chat_template.jinja"
        try:
            source = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            source = _from_config(config.get("chat_template"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
        return None if source is None else cls(source, special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: objects with at least role and content.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: further names for the template, such as enable_thinking.

        Raises:
            ApiError: INVALID_ARGUMENT, with the template's own words where it refuses the messages.
        """
        names = self._special_tokens | dict(variables or {})
        names |= {"messages": list(messages), "tools": None, "documents": None}
        try:
            return self._template.render(names | {"add_generation_prompt": add_generation_prompt})
        except _TEMPLATE_ERRORS as error:
            raise invalid("messages", f"the chat template refuses them: {error}") from error


def _from_config(value: object) -> str | None:
    """One template, or a list of named ones, of which "default" is the one for plain conversations."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
        template = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
        if isinstance(template, str):
            return template
        raise ConfigError(
            f"tokenizer_config.json: chat_template has no template 'default' among {sorted(map(str, named))}"
        )
    raise ConfigError("tokenizer_config.json: chat_template is neither a string nor a list of named templates")


class _GenerationBlock(jinja2.ext.Extension):
    """Accepts {% generation %} blocks, with which templates mark the assistant's words for training."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The block's content, unmarked."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which no template for a model wants.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> Never:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - templates may pass it by this name
    return datetime.now().strftime(format)
