"""`/v1/completions` and `/v1/chat/completions` in OpenAI's form, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from smidgen.serving.decoding import Completion, Generation
from smidgen.serving.http.answer_routes import Name, check_size
from smidgen.serving.http.asking import Asked, Asking
from smidgen.serving.http.errors import RESPONSES, told
from smidgen.serving.sampling import Sampling

router = APIRouter(tags=["OpenAI"], responses=RESPONSES)

Stop = Annotated[str, Field(min_length=1)]
Nothing = Annotated[float, Field(ge=0, le=0)]


class StreamOptions(BaseModel):
    """What else a stream tells."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class TextFormat(BaseModel):
    """Answers are text."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]


class WritingRequest(BaseModel):
    """What both kinds of request have in common. Options that are not heeded may be given as they are by default."""

    model_config = ConfigDict(extra="forbid")
    model: Name
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False, 0] | None = None
    frequency_penalty: Nothing | None = None
    presence_penalty: Nothing | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    def sampling(self, max_tokens: int | None) -> Sampling:
        """As the engine takes it; OpenAI's defaults: temperature 1, 16 tokens of a completion."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(max_tokens or 16, temperature, self.top_p or 1.0, 0, stop, self.seed)


class CompletionRequest(WritingRequest):
    """A prompt to go on with."""

    prompt: Annotated[str, Field(min_length=1)]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=32768)] | None = None


class ChatMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid")
    role: Annotated[str, Field(max_length=64)]
    content: str
    name: str | None = None


class ChatRequest(WritingRequest):
    """A conversation to go on with."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=32768)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=32768)] | None = None
    tools: Annotated[list[dict[str, object]], Field(max_length=0)] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    safety_identifier: str | None = None


class Form:
    """How one of the two tells a text."""

    def __init__(self, model: str, chat: bool) -> None:
        self.chat, start = chat, "chatcmpl" if chat else "cmpl"
        self.head = {"id": f"{start}-{uuid.uuid4().hex[:24]}", "created": int(time.time()), "model": model}

    def whole(self, done: Completion) -> dict[str, object]:
        """A text at once."""
        said = {"message": {"role": "assistant", "content": done.text}} if self.chat else {"text": done.text}
        choice = {"index": 0, "finish_reason": done.reason, "logprobs": None, **said}
        name = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": name, "choices": [choice], "usage": usage(done)}

    def piece(self, text: str | None, reason: str | None = None, first: bool = False) -> dict[str, object]:
        """A part of a stream."""
        delta = ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})
        said: dict[str, object] = {"delta": delta} if self.chat else {"text": text or ""}
        choice = {"index": 0, "finish_reason": reason, "logprobs": None, **said}
        return {**self.head, "object": self.streamed, "choices": [choice]}

    def counted(self, done: Completion) -> dict[str, object]:
        """The last part, of counts alone."""
        return {**self.head, "object": self.streamed, "choices": [], "usage": usage(done)}

    @property
    def streamed(self) -> str:
        """What a part is called."""
        return "chat.completion.chunk" if self.chat else "text_completion"


def usage(done: Completion) -> dict[str, int]:
    """Counts of tokens."""
    total = done.prompt_tokens + done.tokens
    return {"prompt_tokens": done.prompt_tokens, "completion_tokens": done.tokens, "total_tokens": total}


@router.post("/v1/completions", response_model=None)
async def complete(body: CompletionRequest, asked: Asking) -> dict[str, object] | StreamingResponse:
    """Go on with a prompt."""
    check_size(asked, [body.prompt])
    return await _written(asked, body, body.prompt, body.sampling(body.max_tokens), Form(body.model, chat=False))


@router.post("/v1/chat/completions", response_model=None)
async def chat(body: ChatRequest, asked: Asking) -> dict[str, object] | StreamingResponse:
    """Go on with a conversation, written by the model's own template."""
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    check_size(asked, [messages])
    sampling = body.sampling(body.max_completion_tokens or body.max_tokens or 256)
    return await _written(asked, body, messages, sampling, Form(body.model, chat=True))


async def _written(
    asked: Asked, body: WritingRequest, prompt: str | list[dict[str, str]], sampling: Sampling, form: Form
) -> dict[str, object] | StreamingResponse:
    """A text, or the stream of it."""
    asked.about(body.model, 1)
    pieces = LoopQueue(asyncio.get_running_loop())
    begin: Callable[..., Generation] = asked.server.begin
    text = await asked.run(begin, body.model, prompt, sampling, pieces=pieces)
    if body.stream:
        counted = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(_events(text, pieces, form, counted), media_type="text/event-stream")
    try:
        done: Completion = await asked.result(text.future)
    finally:
        text.abandoned = True  # its row is free for others, whatever ended the wait
    return form.whole(done)


async def _events(text: Generation, pieces: LoopQueue, form: Form, counted: bool) -> AsyncIterator[str]:
    """Server-sent events of a text, up to [DONE]."""
    try:
        if form.chat:
            yield _event(form.piece("", first=True))
        while (piece := await pieces.get()) is not None:
            yield _event(form.piece(piece))
        try:
            done = text.future.result()
        except Exception as error:  # told in the stream: its status is gone already
            _, code, message = told(error)
            yield _event({"error": {"message": message, "type": "server_error", "code": code}})
            return
        yield _event(form.piece(None, done.reason))
        if counted:
            yield _event(form.counted(done))
        yield "data: [DONE]\n\n"
    finally:
        text.abandoned = True


def _event(content: dict[str, object]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class LoopQueue:
    """Pieces from the engine's thread to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop, self.queue = loop, asyncio.Queue[str | None]()

    def put(self, piece: str | None, /) -> None:
        """From any thread; a loop that has ended takes nothing."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.queue.put_nowait, piece)

    async def get(self) -> str | None:
        """The next piece."""
        return await self.queue.get()
