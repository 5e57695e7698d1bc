"""The terminal of `smidgen chat`: lines of a person or of a pipe, and answers as they are written."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import closing, suppress

from smidgen.cli.views import results
from smidgen.serving.chat_session import ChatSession
from smidgen.serving.errors import ServingError

HELP = {
    "/reset": "forgets what was said",
    "/base": "changes between the delta and its base",
    "/help": "says this",
    "/exit": "leaves, as Ctrl-D does",
}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed
INTRO = "/help lists commands; Ctrl-C stops an answer, Ctrl-D leaves"


class Terminal:
    """A conversation on stdin and stdout.

    Args:
        delta: name of the delta on the session's server; None if there is the base alone.
        label: what answers of the delta are headed with.
        silent: nothing is written but notes and errors.
    """

    def __init__(self, session: ChatSession, delta: str | None, label: str, *, silent: bool = False) -> None:
        self.session, self.delta, self.label, self.silent = session, delta, label, silent
        self.person = sys.stdin.isatty()

    def run(self) -> None:
        """Until the lines end, or one of them is /exit."""
        if self.person:
            with suppress(ImportError):  # lines can be edited and found again where the system has it
                import readline  # noqa: F401
            results.note(f"{self._answering}: {INTRO}")
        for line in self._lines():
            text = line.strip()
            if text == "/exit":
                return
            if text.startswith("/"):
                self._command(text)
            elif text:
                self._answer(text)

    @property
    def _answering(self) -> str:
        return "base" if self.session.delta is None else self.label

    def _lines(self) -> Iterator[str]:
        """Turns; a person's Ctrl-C at an empty line is told how to leave."""
        if not self.person:
            yield from sys.stdin
            return
        while True:
            try:
                yield input("you> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                results.note("Ctrl-D or /exit leaves")

    def _command(self, text: str) -> None:
        """A line that begins with a slash."""
        if text == "/reset":
            self.session.reset()
            results.note("what was said is forgotten")
        elif text == "/base" and self.delta is not None:
            self.session.delta = self.delta if self.session.delta is None else None
            results.note(f"{self._answering} answers from here on")
        elif text == "/base":
            results.note("there is the base alone; begin with --delta to compare")
        elif text == "/help":
            for name, what in HELP.items():
                results.note(f"{name}: {what}")
        else:
            results.error(f"no command is called {text.split()[0]!r}; there are {', '.join(HELP)}")

    def _answer(self, text: str) -> None:
        """What is written, as it comes; a person's Ctrl-C stops it, an error leaves the conversation as it was."""
        if self.person:
            self._write(f"{self._answering}> ")
        try:
            with closing(self.session.say(text)) as pieces:
                for piece in pieces:
                    self._write(piece)
            self._write("\n")
            done = self.session.done
            if done is not None and done.reason == "length":
                results.note(f"the answer was cut at {done.tokens} tokens; max_new_tokens= allows more")
        except KeyboardInterrupt:
            self._write("\n")
            if not self.person:
                raise
            results.note("stopped")
        except ServingError as error:
            self._write("\n")
            if not self.person:
                raise
            results.error(error)

    def _write(self, text: str) -> None:
        """Text as it is, but that a person's terminal gets no control sequences of what a model writes."""
        if not self.silent:
            sys.stdout.write(CONTROL.sub("\ufffd", text) if self.person else text)
            sys.stdout.flush()
