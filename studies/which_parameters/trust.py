"""How many examples are enough, and what does the selection owe to the random head?

python studies/which_parameters/trust.py --tasks sst2,trec
"""

from pathlib import Path

from common import load_tasks, options, write

from smidgen.studies.experiments.fisher_stability import measure_stability
from smidgen.studies.reports.fisher_stability import trust_report
from smidgen.studies.reports.markdown_report import markdown

if __name__ == "__main__":
    given = options(__doc__, "sst2,trec", recipe="LN() | Select('fisher', keep=0.1)")
    rows, text = [], []
    for task in load_tasks(given):
        say = lambda line: print(line, flush=True)  # noqa: E731
        result = measure_stability(
            given.model, task, given.recipe, seeds=given.seeds, say=say, max_length=given.max_length
        )
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
