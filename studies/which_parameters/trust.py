"""How many examples are enough, and what does the selection owe to the random head?

python studies/which_parameters/trust.py --tasks sst2,trec
"""

from pathlib import Path

from common import load_tasks, options, write

from smidgen.analyze.markdown import markdown
from smidgen.analyze.trust import trust
from smidgen.analyze.trust_report import trust_report

if __name__ == "__main__":
    given = options(__doc__, "sst2,trec", recipe="LN() | Select('fisher', keep=0.1)")
    rows, text = [], []
    for task in load_tasks(given):
        say = lambda line: print(line, flush=True)  # noqa: E731
        result = trust(given.model, task, given.recipe, seeds=given.seeds, say=say, max_length=given.max_length)
        report = trust_report(result)
        report.write(Path(given.out) / f"trust-{task.name}")
        text.append(markdown(report))
        for count, draws, reference in zip(result.enough, result.draws, result.reference, strict=True):
            rows += [[task.name, "two draws", count, value] for value in draws]
            rows += [[task.name, "with the most", count, value] for value in reference]
        for name in ("heads", "warmed", "fresh_to_warmed"):
            rows += [[task.name, name, result.enough[-1], value] for value in getattr(result, name)]
        rows += [[task.name, kind, result.enough[-1], value] for kind, value in result.kinds.items()]
    write(given, "trust", ["task", "compared", "examples", "overlap"], rows, "\n\n".join(text))
    print("\n\n".join(text))
