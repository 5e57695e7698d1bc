"""`smidgen chat`: a conversation with a delta, or with its base, in the terminal."""

from __future__ import annotations

from typing import Annotated

import smidgen as sm
from smidgen.cli.options import AnyDelta, Base, Json, Option, OwnDtype, open_base_or_delta
from smidgen.cli.views import results

NAME = "delta"


def run_chat(
    delta: AnyDelta = None,
    model: Base = None,
    system: Annotated[str | None, Option(help="what the conversation begins with")] = None,
    base_only: Annotated[bool, Option("--base-only", help="the delta's base without it, to compare")] = False,
    temperature: Annotated[float, Option(min=0, help="0 takes the most probable token")] = 0.7,
    top_p: Annotated[float, Option(help="smallest set of tokens with this probability; 1 for all")] = 0.95,
    top_k: Annotated[int, Option(min=0, help="so many of the most probable; 0 for all")] = 0,
    max_new_tokens: Annotated[int, Option("--max-new-tokens", min=1, help="of an answer")] = 256,
    seed: Annotated[int | None, Option(help="of the draw; default: another one each time")] = None,
    dtype: OwnDtype = None,
    as_json: Json = False,
) -> None:
    """Talk with a delta in the terminal, answers come as they are written; lines of a pipe are turns too."""
    from smidgen.cli.chat_terminal import Terminal
    from smidgen.serving.chat_session import ChatSession

    sampling = sm.Sampling(max_new_tokens, temperature, top_p, top_k, (), seed)
    trained, network, processor = open_base_or_delta(delta, model, dtype)
    label = "base" if trained is None else str(trained.recipe)
    with sm.Server(network, processor=processor) as server:
        if trained is not None:
            server.add(NAME, trained)
        name = None if trained is None else NAME
        session = ChatSession(server, None if base_only else name, sampling, system)
        Terminal(session, name, label, silent=as_json).run()
    if as_json:
        results.show({"delta": delta, "base_only": base_only, "turns": session.turns}, "", as_json)
