"""The README promises what tests prove: its matrix has a row a promise, all pass, and their tests exist."""

import re

import pytest

from tests.support_matrix import ROOT, Row, make_table, read_results, read_rows, table_of


@pytest.mark.parametrize("row", read_rows(), ids=lambda row: row.feature)
def test_every_promise_has_tests_and_a_row_that_works(row):
    for test in row.tests:
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name or 'test_'}", (ROOT / file).read_text(), re.MULTILINE), f"{test} does not exist"
    rows = [line for line in table_of((ROOT / "README.md").read_text()).splitlines() if f"| {row.feature} |" in line]
    assert rows and rows[0].endswith("| works |"), "run `make matrix`"


def test_a_failed_or_missing_test_shows_in_the_table(tmp_path):
    (tmp_path / "results.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="test_x[1]"/>'
        '<testcase classname="tests.test_a" name="test_y"><failure message="no"/></testcase>'
        '<testcase classname="tests.test_b" name="test_z"/></testsuite></testsuites>'
    )
    results = read_results(tmp_path / "results.xml")
    assert results == {
        "tests/test_a.py::test_x[1]": True,
        "tests/test_a.py::test_y": False,
        "tests/test_b.py::test_z": True,
    }
    rows = [Row("a", ("tests/test_a.py",)), Row("b", ("tests/test_b.py::test_z",)), Row("c", ("tests/test_c.py",))]
    assert make_table(rows, results).splitlines()[2:] == [
        "| a | 1 of 2 pass | fails |",
        "| b | 1 of 1 pass | works |",
        "| c | 0 of 0 pass | not tested |",
    ]
