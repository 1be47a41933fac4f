"""Charts: what is drawn, what is said, and that gaps are gaps."""

import re
from datetime import UTC, datetime
from xml.etree import ElementTree

import pytest

from bridge.console.chart import LINES, chart, spark, told
from bridge.postgres.history import DAY, HOUR, MONTH, Series, Unit

SVG = ".//svg[@role='img']"


def series(*values: float | None, label: str = "events", unit: Unit = "events/s", step: int = 15) -> Series:
    return Series(label, unit, datetime(2026, 2, 3, tzinfo=UTC), step, values)


def drawn(*lines: Series) -> ElementTree.Element:
    return ElementTree.fromstring(chart("c", "Rates", lines))  # noqa: S314 - what we have just written


def paths(figure: ElementTree.Element) -> list[str]:
    return [path.attrib["d"] for path in figure.findall(f"{SVG}/path")]


def ticks(figure: ElementTree.Element, anchor: str = "end") -> list[str]:
    found = [text for text in figure.findall(f"{SVG}/text") if text.get("dominant-baseline")]
    return [text.text or "" for text in found]


def test_a_line_is_interrupted_where_nothing_is_known_and_what_is_known_alone_is_a_dot() -> None:
    line, dots = paths(drawn(series(1, 2, None, 3, None, None, 4, 5)))
    assert re.sub(r"[\d. ]", "", line) == "MLML"
    assert re.sub(r"[\d. ]", "", dots) == "Mh"


def test_nothing_known_says_so_and_draws_no_line() -> None:
    figure = drawn(series(None, None))
    assert paths(figure) == []
    assert [text.text for text in figure.findall(f"{SVG}/text[@class='chart-none']")] == ["no samples yet"]
    assert "events: no samples." in str(figure.findtext(f"{SVG}/desc"))


def test_whoever_does_not_see_it_is_told_the_latest_the_lowest_the_highest_and_what_is_not_known() -> None:
    figure = drawn(series(1, None, None, None, 7, 3, label="a"), series(*[0.25] * 6, label="b"))
    svg = figure.find(SVG)
    assert svg is not None
    assert svg.attrib["aria-labelledby"] == "c-title c-words"
    assert (figure.findtext(f"{SVG}/title"), svg.find("title").attrib["id"]) == ("Rates", "c-title")  # type: ignore[union-attr]
    assert figure.findtext(f"{SVG}/desc") == (
        "a: now 3/s, lowest 1/s, highest 7/s; nothing is known for 45 s. b: now 0.25/s, lowest 0.25/s, highest 0.25/s."
    )


def test_what_is_not_known_for_a_minute_is_not_shown_as_the_latest() -> None:
    figure = drawn(series(5, None, None, None, None))
    assert [key.text for key in figure.findall(".//li/b")] == ["–"]


@pytest.mark.parametrize(
    ("highest", "unit", "wanted"),
    [
        (0, "events/s", ["0", "1/s"]),
        (3.2, "events/s", ["0", "1/s", "2/s", "3/s", "4/s"]),
        (420, "events/s", ["0", "200/s", "400/s", "600/s"]),
        (0.0032, "seconds", ["0", "1 ms", "2 ms", "3 ms", "4 ms"]),
        (100, "seconds", ["0", "30 s", "1 min", "1.5 min", "2 min"]),
        (9000, "seconds", ["0", "1 h", "2 h", "3 h"]),
        (40 * 86400, "seconds", ["0", "10 d", "20 d", "30 d", "40 d"]),
        (1, "events", ["0", "1"]),
        (2_300_000, "events", ["0", "1M", "2M", "3M"]),
    ],
)
def test_an_axis_has_few_ticks_of_numbers_that_people_use(highest: float, unit: Unit, wanted: list[str]) -> None:
    figure = drawn(series(0, highest, unit=unit))
    assert ticks(figure) == wanted


@pytest.mark.parametrize(
    ("span", "wanted"),
    [
        (HOUR, ["now", "−20 min", "−40 min", "−60 min"]),
        (DAY, ["now", "−6 h", "−12 h", "−18 h", "−24 h"]),
        (MONTH, ["now", "−5 d", "−10 d", "−15 d", "−20 d", "−25 d", "−30 d"]),
    ],
)
def test_times_are_told_from_now(span: type[HOUR], wanted: list[str]) -> None:  # type: ignore[valid-type]
    figure = drawn(series(*[1.0] * span.steps, step=span.step))  # type: ignore[attr-defined]
    found = [text.text for text in figure.findall(f"{SVG}/text") if not text.get("dominant-baseline")]
    assert found == wanted


def test_a_label_is_text_and_its_control_characters_are_seen() -> None:
    text = str(chart("c", "<b>", [series(1, label="</svg><script>\x1b[2J")]))
    assert "<script>" not in text
    assert "\x1b" not in text
    assert "\\x1b" in text


def test_no_style_is_in_it_and_no_colour() -> None:
    text = str(chart("c", "Rates", [series(1, 2), series(3, None)]))
    assert not re.search(r"style|fill=|stroke=|on\w+=|#[0-9a-f]{3}|http", text)


def test_more_lines_than_can_be_told_apart_are_counted() -> None:
    figure = drawn(*(series(n, n, label=f"sink-{n}") for n in range(LINES + 2)))
    assert len(paths(figure)) == LINES
    assert [item.text for item in figure.findall(".//ul/li")][-1] == "and 2 more"


def test_series_that_do_not_fit_together_are_refused() -> None:
    for lines in ([], [series(1), series(1, 2)], [series(1), series(1, unit="seconds")]):
        with pytest.raises(ValueError, match="Rates: a chart has series of one unit over the same times"):
            chart("c", "Rates", lines)


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [(0, "seconds", "0 ms"), (0.0001, "seconds", "< 1 ms"), (0.0123, "seconds", "12.3 ms"), (59.96, "seconds", "60 s"),
     (90, "seconds", "1.5 min"), (999.6, "events/s", "1k/s"), (0.333, "events/s", "0.33/s"), (1234, "events", "1.23k")],
)  # fmt: skip
def test_values_have_three_digits_that_count(value: float, unit: Unit, words: str) -> None:
    assert told(value, unit) == words


def test_a_spark_has_a_bar_for_each_step_with_something_and_no_bar_is_too_small_to_be_seen() -> None:
    svg = ElementTree.fromstring(spark([0, 1, 0, 1000], "1,001 <in> 4 h"))  # noqa: S314 - what we have just written
    assert (svg.get("aria-label"), svg.findtext("title")) == ("1,001 <in> 4 h", "1,001 <in> 4 h")
    assert svg.findall("path")[1].get("d") == "M5 20v-2.0h4V20zM15 20v-20.0h4V20z"
    assert ElementTree.fromstring(spark([0, 0], "none")).findall("path")[1].get("d") == ""  # noqa: S314 - as above
