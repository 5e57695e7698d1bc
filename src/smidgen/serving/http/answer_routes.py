"""`/v1/predict` and `/v1/embeddings`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from smidgen.common.errors import DataError
from smidgen.inference.prediction import Prediction
from smidgen.serving.errors import ServingError
from smidgen.serving.http.asking import Asked, Asking
from smidgen.serving.http.errors import RESPONSES

router = APIRouter(tags=["answers"], responses=RESPONSES)
Name = Annotated[str, Field(min_length=1, max_length=200, description='name of a delta, or "base"')]
Message = dict[str, str]
Given = str | list[str] | list[Message]


class PredictRequest(BaseModel):
    """Inputs for one delta."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    model: Name
    inputs: Annotated[list[Given], Field(min_length=1, description="texts, words of each, messages, or files (data:)")]
    pairs: list[str] | None = Field(None, description="the second text of each, for tasks of two")
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 64


class Answered(BaseModel):
    """The answer to one input."""

    answer: str | float | list[str]
    probabilities: dict[str, float]


class PredictResponse(BaseModel):
    """Answers in the order of the inputs."""

    model: str
    answers: list[Answered]


@router.post("/v1/predict")
async def predict(body: PredictRequest, asked: Asking) -> PredictResponse:
    """What a delta's model says: labels with probabilities, numbers, tags, or a text."""
    asked.about(body.model, len(body.inputs))
    check_count(asked, body.inputs)
    check_size(asked, body.pairs or [])
    found = await asked.run(_predicted, asked, body)
    answers = [Answered(answer=one.answer, probabilities=dict(one.probabilities)) for one in found]  # type: ignore[arg-type]
    return PredictResponse(model=body.model, answers=answers)


def _predicted(asked: Asked, body: PredictRequest) -> list[Prediction]:
    """Predictions for texts, or for the content of files."""
    inputs: Sequence[object] = body.inputs
    if asked.server.reads_files(body.model):
        inputs = [file_content(given, i) for i, given in enumerate(body.inputs)]
    else:
        check_size(asked, body.inputs)
    timeout, tokens = asked.options.timeout, body.max_tokens
    return asked.server.predict(body.model, inputs, pairs=body.pairs, max_new_tokens=tokens, timeout=timeout)


class EmbeddingsRequest(BaseModel):
    """Texts for one delta, in OpenAI's form."""

    model_config = ConfigDict(extra="forbid")
    model: Name
    input: str | Annotated[list[str], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class Embedding(BaseModel):
    """One vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Counted tokens; 0 where none are counted."""

    prompt_tokens: int = 0
    total_tokens: int = 0


class EmbeddingsResponse(BaseModel):
    """Vectors in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage = Usage()


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingsRequest, asked: Asking) -> EmbeddingsResponse:
    """The mean of the last hidden states over each text's tokens, of length 1."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    check_size(asked, texts)
    asked.about(body.model, len(texts))
    found = await asked.run(asked.server.embed, body.model, texts, timeout=asked.options.timeout)
    vectors = found.numpy().astype(np.float32)
    if not np.isfinite(vectors).all():
        raise ServingError("the model's outputs are not finite (NaN): the delta, or the base, is damaged")
    coded = body.encoding_format == "base64"
    each = [base64.b64encode(v.tobytes()).decode() if coded else v.tolist() for v in vectors]
    return EmbeddingsResponse(data=[Embedding(index=i, embedding=v) for i, v in enumerate(each)], model=body.model)


def file_content(given: Given, number: int) -> bytes:
    """What an image or a sound is sent as; a path would be one of this machine.

    Raises:
        DataError: it is no such URL.
    """
    head, _, content = given.partition(",") if isinstance(given, str) else ("", "", "")
    try:
        if head.startswith("data:") and head.endswith(";base64"):
            return base64.b64decode(content, validate=True)
    except ValueError:
        pass
    raise DataError(f"input {number} is no file: send its content as data:;base64,CONTENT, in base64")


def check_count(asked: Asked, inputs: Sequence[Given]) -> None:
    """Raises DataError for more inputs than are allowed."""
    if len(inputs) > asked.options.inputs:
        raise DataError(f"{len(inputs)} inputs; at most {asked.options.inputs} in one request")


def check_size(asked: Asked, inputs: Sequence[Given]) -> None:
    """Raises DataError for more inputs, or longer ones, than are allowed."""
    check_count(asked, inputs)
    longest = max((length(one) for one in inputs), default=0)
    if longest > asked.options.characters:
        raise DataError(f"an input has {longest} characters; at most {asked.options.characters}")


def length(given: Given) -> int:
    """Characters of an input."""
    if isinstance(given, str):
        return len(given)
    return sum(len(part) if isinstance(part, str) else sum(map(len, part.values())) for part in given)
