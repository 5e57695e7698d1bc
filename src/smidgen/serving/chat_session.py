"""A conversation with one model: what has been said, and the next answer piece by piece."""

from __future__ import annotations

from collections.abc import Generator

from smidgen.serving.decoding import Completion
from smidgen.serving.sampling import Sampling
from smidgen.serving.server import Server


class ChatSession:
    """Turns of a user and of a delta, or of the untouched base; which of the two answers may change at any turn.

    Args:
        server: which has the delta.
        delta: its name there; None for the base.
        system: what the conversation begins with.

    Attributes:
        turns: {role, content} each, those that were answered.
        done: of the last answer that came to its end: tokens, and why it ended; None after one that was stopped.

    Raises:
        ServingError: the model writes no texts, or its tokenizer has no chat template.
    """

    def __init__(
        self, server: Server, delta: str | None = None, sampling: Sampling | None = None, system: str | None = None
    ) -> None:
        self.server, self.delta, self.sampling = server, delta, sampling or Sampling()
        self.system = system
        self.done: Completion | None = None
        self.turns = list[dict[str, str]]()
        server.check_chat(delta)
        self.reset()

    def reset(self) -> None:
        """Forget what was said, the system message apart."""
        self.turns = [] if self.system is None else [{"role": "system", "content": self.system}]

    def say(self, text: str) -> Generator[str]:
        """The answer to a turn of the user, piece by piece. Closed early, what was written until then is the answer.

        Raises:
            ServingError: the model has no chat template, or no room for the conversation, which stays as it was.
        """
        asked = {"role": "user", "content": text}
        writing = self.server.begin(self.delta, [*self.turns, asked], self.sampling)
        said, self.done = "", None
        try:
            for piece in writing.stream():
                said += piece
                yield piece
            self.done = writing.future.result()
        finally:
            writing.abandoned = True
            if said:
                self.turns += [asked, {"role": "assistant", "content": said}]
