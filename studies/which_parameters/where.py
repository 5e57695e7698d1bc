"""Where does fine-tuning happen? Changes in four measures after full fine-tuning, and Fisher mass, on several tasks.

python studies/which_parameters/where.py --tasks sst2,stsb,trec,sst5
"""

from pathlib import Path

from common import load_tasks, options, settings, write

import smidgen as sm
from smidgen.studies.experiments.change_measures import MEASURES
from smidgen.studies.experiments.fisher_mass import FisherMass
from smidgen.studies.experiments.tuning_changes import analyze_changes
from smidgen.studies.reports.fisher_mass import fisher_report
from smidgen.studies.reports.markdown_report import markdown
from smidgen.studies.reports.parameter_changes import change_report

POINTS = ("fresh head", "trained head")


def masses(task, given):
    """Fisher mass of every tensor, with a fresh head and with a head that was trained alone."""
    model, tokenizer = sm.load(given.model, task=task)
    trained = sm.fit(model, "Head()", task, tokenizer=tokenizer, **settings(given))
    for point, delta in zip(POINTS, (None, trained), strict=True):
        options = {"tokenizer": tokenizer, "max_length": given.max_length}
        found = sm.fisher(model, task, "Full()", delta, given.examples, **options)
        info = {"examples": found.examples, "point": point}
        yield point, FisherMass.of(model, found, task=task.name, kind="empirical", info=info)


def main():
    given = options(__doc__, "sst2,stsb,trec,sst5", examples=256)
    tasks, out = load_tasks(given), Path(given.out)
    say = lambda text: print(text, flush=True)  # noqa: E731
    changed = analyze_changes(
        given.model, tasks, "Full()", given.seeds, out=Path(given.runs) / "where", say=say, **settings(given)
    )
    report = change_report(changed)
    report.write(out / "changes")
    rows = []
    for measure in MEASURES:
        for (component,), cell in changed.table(measure).items():
            rows.append(["change", measure, "all", component, "", cell.mean, cell.seeds, cell.tasks])
    text = [markdown(report)]
    for task in tasks:
        for point, mass in masses(task, given):
            page = fisher_report(mass)
            page.write(out / f"fisher-{task.name}-{point.split()[0]}")
            text.append(markdown(page, ("By component", "By term")))
            for (component, term), m in mass.table(("component", "term")).items():
                rows.append(["fisher", point, task.name, component, term, m.share, m.mean, m.values])
            for (stack, layer), m in mass.table(("stack", "layer")).items():
                rows.append(["fisher by layer", point, task.name, f"{stack}.{layer}", "", m.share, m.mean, m.values])
    columns = ["what", "measure or point", "task", "component", "term", "mean or share", "seeds or mean", "tasks or n"]
    write(given, "where", columns, rows, "\n\n".join(text))


if __name__ == "__main__":
    main()
