"""`/v1/models` and `/v1/deltas`: what there is, adding and taking away."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Query, Response, UploadFile
from fastapi import Path as InPath
from pydantic import BaseModel

from smidgen.common.errors import DeltaError
from smidgen.delta.delta import META, TENSORS, Delta
from smidgen.serving.delta_store import BASE, check_name
from smidgen.serving.errors import UnknownDeltaError
from smidgen.serving.http.asking import Asking
from smidgen.serving.http.errors import RESPONSES
from smidgen.serving.server import Server

router = APIRouter(tags=["deltas"], responses=RESPONSES)
Name = Annotated[str, InPath(max_length=300)]


class ModelCard(BaseModel):
    """A name that `model` takes."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "smidgen"


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class DeltaCard(BaseModel):
    """What is known of a delta."""

    name: str
    recipe: str
    kind: str | None
    labels: list[str]
    pairs: bool
    trained: int
    head: int
    metrics: dict[str, float]
    loaded: bool
    bytes: int


class DeltaList(BaseModel):
    """Some of the deltas, by name; `next` is what to give as `after` for more."""

    data: list[DeltaCard]
    total: int
    next: str | None


def card(server: Server, name: str) -> DeltaCard:
    """A delta's card; from its JSON if it is not in memory."""
    profile, tenant = server.describe(name), server.bank.peek(name)
    size = tenant.nbytes if tenant is not None else 4 * (profile.trained + profile.head)
    metrics = {key: value for key, value in profile.metrics.items() if value == value}  # JSON has no NaN
    return DeltaCard(
        name=name, recipe=profile.recipe, kind=profile.task.kind, labels=list(profile.labels),
        pairs=profile.task.asked == 2,
        trained=profile.trained, head=profile.head, metrics=metrics, loaded=tenant is not None, bytes=size,
    )  # fmt: skip


@router.get("/v1/models")
async def models(asked: Asking) -> ModelList:
    """Names that `model` takes: the base, and each delta."""
    names = await asked.run(asked.server.bank.names)
    return ModelList(data=[ModelCard(id=name) for name in (BASE, *names)])


@router.get("/v1/models/{name}")
async def model(name: Name, asked: Asking) -> ModelCard:
    """One of them."""
    if name != BASE:
        await asked.run(asked.server.describe, name)
    return ModelCard(id=name)


@router.get("/v1/deltas")
async def deltas(
    asked: Asking,
    after: Annotated[str, Query(max_length=300)] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> DeltaList:
    """Deltas behind a name, in the order of names."""
    known = await asked.run(asked.server.bank.names)
    names = [name for name in known if name > after]
    cards = await asked.run(_cards, asked.server, names[:limit])
    return DeltaList(data=cards, total=len(known), next=names[limit - 1] if len(names) > limit else None)


def _cards(server: Server, names: list[str]) -> list[DeltaCard]:
    """Cards of those that are still there."""
    found = []
    for name in names:
        try:
            found.append(card(server, name))
        except (DeltaError, UnknownDeltaError):
            store = server.bank.store
            if name in server.bank and store is not None and store.has(name):
                raise
    return found


@router.get("/v1/deltas/{name}")
async def delta(name: Name, asked: Asking) -> DeltaCard:
    """One delta."""
    asked.about(name)
    return await asked.run(card, asked.server, name)


@router.put("/v1/deltas/{name}", status_code=201)
async def put(
    name: Name,
    asked: Asking,
    meta: Annotated[UploadFile, File(alias=META)],
    values: Annotated[UploadFile, File(alias=TENSORS)],
) -> DeltaCard:
    """Add a delta, or put it in the place of another; the old one stays if the new one is refused."""
    check_name(name)
    asked.about(name)
    return await asked.run(_added, asked.server, name, {META: meta.file, TENSORS: values.file})


def _added(server: Server, name: str, files: dict[str, Any]) -> DeltaCard:
    """Read the two files as a delta, and add it."""
    with tempfile.TemporaryDirectory() as folder:
        for file, source in files.items():
            with Path(folder, file).open("wb") as target:
                shutil.copyfileobj(source, target)
        server.add(name, _renamed(folder, name))
    return card(server, name)


def _renamed(folder: str, name: str) -> Delta:
    """Read a delta; errors name it, not the folder of a moment."""
    try:
        return Delta.load(folder)
    except DeltaError as error:
        raise DeltaError(str(error).replace(f"{folder}/", "").replace(folder, name)) from None


@router.delete("/v1/deltas/{name}", status_code=204, response_class=Response)
async def remove(name: Name, asked: Asking) -> Response:
    """Take a delta away, with its file."""
    asked.about(name)
    await asked.run(asked.server.remove, name)
    return Response(status_code=204)
