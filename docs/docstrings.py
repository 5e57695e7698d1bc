"""What a method's docstring says, part by part."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

from smidgen.methods.base import Method


@dataclass(frozen=True)
class Docstring:
    """The parts of a method's docstring."""

    summary: str
    paper: str
    formula: str
    sections: dict[str, str]

    @classmethod
    def of(cls, method: type[Method]) -> Docstring:
        """Paragraphs apart: indented ones are the formula, those that begin with `Name:` are sections."""
        summary, *paragraphs = inspect.cleandoc(method.__doc__ or "").split("\n\n")
        paper, formula, sections = [], [], {}
        for text in paragraphs:
            # one paragraph may hold several sections
            for part in re.split(r"\n(?=[A-Z][a-z]+:)", text.strip("\n")):
                if part.startswith(" "):
                    formula.append(inspect.cleandoc(part))
                elif match := re.match(r"(Shapes|Fields|Departures):\s*", part):
                    sections[match.group(1)] = inspect.cleandoc(part[match.end() :])
                else:
                    paper.append(part)
        return cls(summary, "\n\n".join(paper), "\n".join(formula), sections)
