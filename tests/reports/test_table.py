"""Markdown tables, and numbers as reports print them."""

from __future__ import annotations

import math
import random

import pytest

from arcopo_fast.reports.table import markdown_table, plain, signed


def test_a_table_as_it_is_written() -> None:
    rows = [["a", "1.5"], ["longer", "−20.25"]]
    assert markdown_table(["name", "value"], rows) == (
        "| name   | value  |\n| ------ | ------ |\n| a      | 1.5    |\n| longer | −20.25 |\n"
    )
    assert markdown_table(["name", "value"], rows, numbers=True) == (
        "| name   |  value |\n| ------ | -----: |\n| a      |    1.5 |\n| longer | −20.25 |\n"
    )
    assert markdown_table(["name", "value"], rows, padded=False) == "| name | value |\n| --- | --- |\n| a | 1.5 |\n| longer | −20.25 |\n"
    assert markdown_table(["name", "value"], []) == "| name | value |\n| ---- | ----- |\n"


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_cells_come_back_from_a_table(numbers: bool, padded: bool) -> None:
    columns, count = random.randint(1, 5), random.randint(1, 6)
    cells = [["".join(random.choices("abc −.5", k=random.randint(0, 9))).strip() for _ in range(columns)] for _ in range(count)]
    lines = markdown_table(cells[0], cells[1:], numbers=numbers, padded=padded).splitlines()
    assert [[cell.strip() for cell in line[2:-2].split(" | ")] for line in [lines[0], *lines[2:]]] == cells
    assert {len(line) for line in lines} == {len(lines[0])} or not padded, "columns have one width"


def test_rows_of_another_length_are_no_table() -> None:
    with pytest.raises(ValueError, match="shorter"):
        markdown_table(["a", "b"], [["1"]])


@pytest.mark.parametrize(
    ("value", "unsigned", "with_sign"),
    [
        (1.23456, "1.235", "+1.235"),
        (-1.23456, "−1.235", "−1.235"),
        (0.0, "0.000", "0.000"),
        (-0.0004, "−0.000", "0.000"),
        (0.0004, "0.000", "0.000"),
        (math.nan, "–", "–"),
        (-math.inf, "–", "–"),
    ],
)
def test_numbers(value: float, unsigned: str, with_sign: str) -> None:
    assert (plain(value), signed(value)) == (unsigned, with_sign)
    assert signed(0.126, 2) == "+0.13" and signed(-0.001, 2) == "0.00"
