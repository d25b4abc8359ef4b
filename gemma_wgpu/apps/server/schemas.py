"""The bodies of HTTP requests and responses, as OpenAI's API has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from gemma_wgpu.options import RANGES

MOST_CHOICES = 64  # texts of one HTTP request

# These are options of OpenAI's. The first ones do not change the text. The others ask with these values for what is
# done anyway.
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
    """Refuses options that it does not know, unless their values ask for nothing: null, 0, false, and empty ones."""

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
    """The options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


# What these must be is described here, and checked where it is needed.
_StopString = Annotated[str, Field(json_schema_extra={"minLength": 1})]
_ContentPart = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "oneOf": [
                {
                    "title": "TextPart",
                    "type": "object",
                    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                    "required": ["type", "text"],
                },
                {
                    "title": "ImagePart",
                    "type": "object",
                    "properties": {
                        "type": {"const": "image_url"},
                        "image_url": {
                            "type": "object",
                            "properties": {
                                "url": {"type": "string", "description": "The image's data, as a data: URI."},
                                "detail": {"enum": ["auto", "low", "high"]},
                            },
                            "required": ["url"],
                        },
                    },
                    "required": ["type", "image_url"],
                },
                {
                    "title": "AudioPart",
                    "type": "object",
                    "properties": {
                        "type": {"const": "input_audio"},
                        "input_audio": {
                            "type": "object",
                            "properties": {
                                "data": {"type": "string", "description": "The sound's file, in base64."},
                                "format": {"type": "string", "description": "It is not needed."},
                            },
                            "required": ["data"],
                        },
                    },
                    "required": ["type", "input_audio"],
                },
            ]
        }
    ),
]


def _described(name: str) -> WithJsonSchema:
    """Describe the range of an option that OpenAI does not have. `gemma_wgpu.Options` checks it."""
    range_ = RANGES[name]
    return WithJsonSchema(
        {"type": "integer" if range_.whole else "number", "minimum": range_.low, "maximum": range_.high}
    )


class Body(_Checked):
    """The options of both kinds of completion. If one is left out, it is what Gemma's authors recommend."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, _described("top_k")] | None = None
    min_p: Annotated[float, _described("min_p")] | None = None
    repetition_penalty: Annotated[float, _described("repetition_penalty")] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: int | None = None
    stop: _StopString | Annotated[list[_StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Say whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _check_stream_options(self) -> Body:
        if self.stream_options and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream", {"name": "stream_options"})
        return self


class Message(_Checked):
    """A turn of a chat. Models that think may be sent what they thought, which they need no longer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_ContentPart]
    reasoning_content: str | None = None


class TemplateOptions(_Checked):
    """The options of the chat's template, as other servers have them."""

    enable_thinking: bool = False


class ChatBody(Body):
    """The body of an HTTP request to /v1/chat/completions."""

    messages: Annotated[list[Message], Field(json_schema_extra={"minItems": 1})]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    include_reasoning: bool = True
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def thinking(self) -> str:
        """Return what `Gemma.chat` calls `thinking`. An effort is no more than a wish to think."""
        asked = self.reasoning_effort not in (None, "none", "minimal")
        if asked or (self.chat_template_kwargs and self.chat_template_kwargs.enable_thinking):
            return "show" if self.include_reasoning else "hide"
        return "off"

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs", {"name": "top_logprobs"})
        return self


class CompletionBody(Body):
    """The body of an HTTP request to /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class PromptDetails(BaseModel):
    """How many of the prompt's tokens were in the cache."""

    cached_tokens: int


class Usage(BaseModel):
    """How many tokens were read and generated; the token that ends a text counts, too."""

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
    """The log-probabilities of the tokens of a reply."""

    content: list[TokenLogprob]
    refusal: None = None

    @classmethod
    def of(cls, tokens: list[TokenLogprob] | None) -> ChatLogprobs | None:
        """Return them, or None if they were not asked for."""
        return None if tokens is None else cls(content=tokens)


def _is_none(value: object) -> bool:
    return value is None


_Thought = Annotated[str | None, Field(exclude_if=_is_none)]  # what the model thought before its answer


class Reply(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    reasoning_content: _Thought = None
    refusal: None = None


class Delta(BaseModel):
    """What the assistant's message has gained."""

    role: Annotated[Literal["assistant"] | None, Field(exclude_if=_is_none)] = None
    content: Annotated[str | None, Field(exclude_if=_is_none)] = None
    reasoning_content: _Thought = None


FinishReason = Literal["stop", "length"]


class ChatChoice(BaseModel):
    """One of the replies."""

    index: int
    message: Reply
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatDelta(BaseModel):
    """What one of the replies has gained."""

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
    """What the replies to a chat have gained."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatDelta]
    usage: Usage | None = None


class TextLogprobs(BaseModel):
    """The log-probabilities of the tokens of a text; each begins at its `text_offset`, in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One of the texts, or what it has gained."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(_Response):
    """The texts that go on from the prompts, or what they have gained."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that is served. An image is `image_tokens` tokens for it; they are null if it reads text only."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    context_length: int
    image_tokens: int | None


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Error(BaseModel):
    """A description of what went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of a response if something went wrong."""

    error: Error


class Health(BaseModel):
    """The state of the server."""

    status: Literal["ok", "failing"]
    detail: str | None
    running: int
    waiting: int
