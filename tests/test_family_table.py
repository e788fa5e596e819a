"""The README's table of families has a row for every registered model, and counts the code that is there."""

import re

import pytest

from sat_lightning.model.registry import registered_models
from tests.family_table import ROOT, code_lines, family_lines, read_rows, table_of

ROWS = read_rows()
TABLE = table_of((ROOT / "README.md").read_text(encoding="utf-8")).splitlines()

CODE = '''"""Docstring
of two lines."""

from a import Base, unused
from b import helper

# A comment.
SIZES = {
    "a": 1,
}
TABLE = [SIZES]


def _read(
    value,
):
    """Say so."""
    return helper(value)  # and more


class Family(Base):
    """A family."""

    key_maps = (
        TABLE,
    )
    field: "Text" = """kept,
for it is a value"""
    """What the field means."""

    def forward(self, x):
        return _read(x)


Text = str
'''


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.family)
def test_every_family_has_a_row_that_is_not_stale(row):
    rows = [line for line in TABLE if line.startswith(f"| [{row.family}](")]
    assert len(rows) == 1 and rows[0].startswith(row.begin), "run `python -m tests.family_table`"
    theirs, _, parity = (cell.strip() for cell in rows[0].split("|")[4:7])
    assert bool(re.findall(r"`modeling_\w+`: \d+", theirs)) == (parity != "-") == any(c.key_maps for c in row.classes)


def test_every_registered_model_is_in_the_table():
    ours = {name for name, cls in registered_models().items() if cls.__module__.startswith("sat_lightning.")} - {
        "BaseModel"
    }
    assert ours == {cls.__name__ for row in ROWS for cls in row.classes}


def test_code_is_counted_without_what_says_nothing_to_the_machine():
    assert len(code_lines(CODE)) == 19
    # Left out: the table, and what only it uses; the import that nothing uses shares a line with one that is used.
    assert family_lines(CODE, {"Family"}) == 12
