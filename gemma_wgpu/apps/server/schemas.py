"""What requests and responses consist of, as OpenAI's API has it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MOST_CHOICES = 64  # of a request

# Options of OpenAI's that change nothing of the text; and of others, the values that ask for what is done anyway.
_IGNORED = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
}
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
}


class _Checked(BaseModel):
    """Refuses what it does not know, but for values that ask for nothing: null, 0, false, and what is empty."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra={"additionalProperties": False}, strict=True, allow_inf_nan=False
    )

    @model_validator(mode="after")
    def _refuse_unknown(self) -> _Checked:
        for name, value in (self.model_extra or {}).items():
            if value and name not in _IGNORED and value not in _NEUTRAL.get(name, ()):
                raise PydanticCustomError("unsupported", "{name} is not supported by this server", {"name": name})
        return self


class StreamOptions(_Checked):
    """Of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Options(_Checked):
    """What both kinds of completion take. Where an option is left out, it is what Gemma's authors recommend."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 24)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check_stream_options(self) -> Options:
        if self.stream_options and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream", {"name": "stream_options"})
        return self


class Message(_Checked):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]


class ChatRequest(Options):
    """The body of /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs", {"name": "top_logprobs"})
        return self


class CompletionRequest(Options):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class PromptDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens that were read and made; the token that ends a text is one."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Rival(BaseModel):
    """A token, and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Rival):
    """A token of the text, and the likeliest ones at its place."""

    top_logprobs: list[Rival]


class ChatLogprobs(BaseModel):
    """Of the tokens of a reply."""

    content: list[TokenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, tokens: list[TokenLogprob] | None) -> ChatLogprobs | None:
        """None where they were not asked for."""
        return None if tokens is None else cls(content=tokens)


class Reply(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


def _is_none(value: object) -> bool:
    return value is None


class Delta(BaseModel):
    """What is new of the assistant's message."""

    role: Annotated[Literal["assistant"] | None, Field(exclude_if=_is_none)] = None
    content: Annotated[str | None, Field(exclude_if=_is_none)] = None


FinishReason = Literal["stop", "length"]


class ChatChoice(BaseModel):
    """One of the replies."""

    index: int
    message: Reply
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatDelta(BaseModel):
    """What is new of one of the replies."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class _Response(BaseModel):
    id: str
    created: int
    model: str


class ChatCompletion(_Response):
    """The replies to a chat."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(_Response):
    """A part of the replies to a chat."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatDelta]
    usage: Usage | None = None


class TextLogprobs(BaseModel):
    """Of the tokens of a text; `text_offset` is where each begins, in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One of the texts, or what is new of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(_Response):
    """The texts that go on from the prompts, or a part of them."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    context_length: int


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body where something went wrong."""

    error: Error


class Health(BaseModel):
    """How the server is."""

    status: Literal["ok", "failing"]
    detail: str | None
    running: int
    waiting: int
