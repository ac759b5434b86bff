"""Quantities as people write and read them."""

import pytest

from sleb_cli.units import (
    format_bytes,
    format_change,
    format_count,
    in_shell,
    parse_bytes,
    parse_count,
)
from sleb_plugins import UsageError

SIZES = {
    "5GB": 5 * 10**9, "8GiB": 8 << 30, "512MiB": 1 << 29, "5Gi": 5 << 30, "2G": 2 * 10**9, "1.5kb": 1500,
    "1.5 GB": 1_500_000_000, "500 MB": 500_000_000, "7": 7,
}  # fmt: skip
COUNTS = {"1.2B": 1.2e9, "600m": 6e8, "70k": 7e4, "135000000": 1.35e8}


@pytest.mark.parametrize(("parse", "quantities"), [(parse_bytes, SIZES), (parse_count, COUNTS)])
def test_quantities_are_read_as_people_write_them(parse, quantities):
    assert {text: parse(text, "--option") for text in quantities} == quantities


@pytest.mark.parametrize(
    ("parse", "what", "texts"),
    [
        (
            parse_bytes,
            "size",
            ["", "much", "0", "-1GB", "5XB", "GB", "3 apples", "5GB or so", "5i"],
        ),
        (
            parse_count,
            "number of parameters",
            ["", "B", "-1B", "0", "nan", "inf", "1.2GiB", "many"],
        ),
    ],
)
def test_text_that_is_no_quantity_is_refused(parse, what, texts):
    for text in texts:
        with pytest.raises(UsageError, match=rf"option .*is not a {what}"):
            parse(text, "--option")


def test_quantities_are_shown_in_short():
    assert [format_count(n) for n in (512, 134_515_008, 1_190_000_000)] == [
        "512",
        "134.5M",
        "1.19B",
    ]
    sizes = {
        12: "12 B",
        1500: "1.5 kB",
        98_362_432: "98.4 MB",
        999_700_000: "1.00 GB",
        2.38e9: "2.38 GB",
    }
    assert [format_bytes(size) for size in sizes] == [*sizes.values()]
    assert [format_change(share) for share in (0.39, -0.021, 13.3, 2309)] == [
        "+39.0%",
        "-2.1%",
        "14.3x",
        "2,310x",
    ]
    assert [in_shell(name) for name in ("a.json", "-a", "a b", "$(x)")] == [
        "a.json",
        "./-a",
        "'a b'",
        "'$(x)'",
    ]
