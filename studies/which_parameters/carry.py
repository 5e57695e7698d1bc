"""Do selections carry over? Each task is left out in turn; the others choose its tenth of LayerNorm.

python studies/which_parameters/carry.py --tasks sst2,stsb,trec,sst5
"""

from pathlib import Path

from common import load_tasks, options, settings, write

from smidgen.studies.experiments.selection_transfer import measure_transfer
from smidgen.studies.reports.markdown_report import markdown
from smidgen.studies.reports.selection_transfer import transfer_report

if __name__ == "__main__":
    given = options(__doc__, "sst2,stsb,trec,sst5", recipe="LN() | Select('fisher', keep=0.1)", how="mean")
    say = lambda text: print(text, flush=True)  # noqa: E731
    more = {"how": given.how, "seeds": given.seeds, "out": Path(given.runs) / "carry", "say": say}
    result = measure_transfer(given.model, load_tasks(given), given.recipe, **more, **settings(given))
    report = transfer_report(result)
    report.write(Path(given.out) / f"carry-{given.how}")
    columns = ["task", "arm", "seed", "metric", "value", "trained", "head_values", "seconds"]
    rows = [[run[c] for c in columns] for run in result.outcomes]
    write(given, f"carry-{given.how}", columns, rows, markdown(report))
    print(markdown(report))
