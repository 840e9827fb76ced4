"""The study that docs/evidence.md shows is the one whose cells lie beside it."""

import json

from sra_jax.benchmarks import study_report
from tests.conftest import ROOT

PUBLISHED = ROOT / "docs" / "evidence" / "fashion_mnist"


def test_tables_and_numbers_are_those_of_the_cells():
    arms = study_report.read_arms(PUBLISHED)
    tables = study_report.tables(arms)
    assert (PUBLISHED / study_report.TABLE).read_text().splitlines() == tables
    assert json.loads((PUBLISHED / study_report.SUMMARY).read_text()) == json.loads(
        json.dumps(study_report.summary(arms))
    )
    shown = (ROOT / "docs" / "evidence.md").read_text().split("### Results")[1].split("\n## ")[0]
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert rows and set(rows) <= set(tables)
    assert study_report.baseline_of(arms[-1], arms) is arms[0]
    assert all(len(arm.cells) >= 3 for arm in arms)
