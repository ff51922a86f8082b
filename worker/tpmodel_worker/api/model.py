"""The served model as this process knows it: its shape, its tokenizer, its template. No weights."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from tpmodel_worker.api.chat_template import ChatTemplate
from tpmodel_worker.api.errors import ApiError
from tpmodel_worker.api.sampling import SamplingLimits
from tpmodel_worker.api.tls import ServerCertificate
from tpmodel_worker.api.tokenizer import Tokenizer, read_tokenizer_config
from tpmodel_worker.models.config import ModelConfig, read_model_config
from tpmodel_worker.settings import ServeSettings

# Longer texts are tokenized in a thread, so that other streams go on meanwhile.
_INLINE_CHARACTERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What requests are checked against and translated with."""

    settings: ServeSettings
    config: ModelConfig
    limits: SamplingLimits
    tokenizer: Tokenizer | None
    """None: the checkpoint has none, so that prompts must be ids and chunks carry ids only."""
    template: ChatTemplate | None
    certificate: ServerCertificate | None = None
    """For TLS towards clients; None: plain text."""

    @classmethod
    def load(cls, settings: ServeSettings) -> ServedModel:
        """Reads the checkpoint folder; raises ConfigError."""
        folder = settings.model_path
        config = read_model_config(
            folder,
            world_size=settings.world_size,
            max_model_len=settings.max_model_len,
            expert_parallel=settings.expert_parallel,
        )
        tokenizer = Tokenizer.load(folder)
        template = None
        if tokenizer is not None:
            template = ChatTemplate.load(folder, read_tokenizer_config(folder), tokenizer.special_tokens)
        return cls(
            settings=settings,
            config=config,
            limits=SamplingLimits.of(config, settings.max_model_len),
            tokenizer=tokenizer,
            template=template,
            certificate=ServerCertificate(settings.tls_dir) if settings.tls_dir else None,
        )

    def require_tokenizer(self, purpose: str) -> Tokenizer:
        """The tokenizer; FAILED_PRECONDITION where the checkpoint has none."""
        if self.tokenizer is None:
            message = f"{purpose} needs a tokenizer, and the checkpoint has no tokenizer.json: use token ids"
            raise ApiError(grpc.StatusCode.FAILED_PRECONDITION, message)
        return self.tokenizer

    def render_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation; ApiError where the template refuses it or there is none."""
        if self.template is None:
            message = "the checkpoint has no chat template: send the whole prompt as text or token ids"
            raise ApiError(grpc.StatusCode.FAILED_PRECONDITION, message, field="messages")
        return self.template.render(messages, add_generation_prompt=add_generation_prompt, variables=variables)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text. A chat template's output has its special tokens already."""
        tokenizer = self.require_tokenizer("a text")
        if len(text) <= _INLINE_CHARACTERS:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
