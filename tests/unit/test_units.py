"""Quantities as people write and read them."""

import pytest

from sleb_cli.units import (
    format_bytes,
    format_change,
    format_count,
    format_milliseconds,
    format_probability,
    format_seconds,
    in_shell,
    parse_bytes,
    parse_count,
    spans,
)
from sleb_plugins import UsageError

SIZES = {
    "5GB": 5 * 10**9,
    "8GiB": 8 << 30,
    "512MiB": 1 << 29,
    "5Gi": 5 << 30,
    "2G": 2 * 10**9,
    "1.5kb": 1500,
    "1.5 GB": 1_500_000_000,
    "500 MB": 500_000_000,
    "7": 7,
}
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


SHOWN = {
    format_count: {512: "512", 134_515_008: "134.5M", 1_190_000_000: "1.19B"},
    format_bytes: {
        12: "12 B",
        1500: "1.5 kB",
        98_362_432: "98.4 MB",
        999_700_000: "1.00 GB",
        2.38e9: "2.38 GB",
    },
    format_change: {0.39: "+39.0%", -0.021: "-2.1%", 13.3: "14.3x", 2309: "2,310x"},
    format_milliseconds: {4.207: "4.21 ms", 42.1: "42.1 ms", 312: "312 ms", 1850: "1.85 s"},
    format_seconds: {48: "48 s", 720: "12 min", 11_520: "3.2 h"},
    format_probability: {0.0001: "< 0.001", 0.031: "0.031", 0.25: "0.25"},
    spans: {(3, 10, 14, 11, 13, 12): "3, 10-14", (7, 8): "7, 8"},
    in_shell: {"a.json": "a.json", "-a": "./-a", "a b": "'a b'", "$(x)": "'$(x)'"},
}


@pytest.mark.parametrize("write", SHOWN)
def test_quantities_are_shown_in_short(write):
    for value, shown in SHOWN[write].items():
        assert write(value) == shown
