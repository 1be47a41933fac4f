"""Charts as SVG, made of series: a pure function. No style and no script is in them: classes give the colours, so that
they follow light and dark under a strict content security policy, and times are told from now, so they need no zone.

What nobody can see is said: the description has the latest, the lowest and the highest of each line, and for how long
nothing is known.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Final

from markupsafe import Markup

from bridge.postgres.history import Series, Unit
from bridge.process.visible import one_line

_WIDTH: Final = 400
_HEIGHT: Final = 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 8, 10, 28
"""Around the lines: room for what the axes say."""
_Y_TICKS: Final = 4
"""At most, without 0."""
_CLOCK: Final = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800)
"""Seconds between ticks that people read as such."""
_TIMES: Final = ((3600, 1200, "min", 60), (86400, 21600, "h", 3600), (math.inf, 432000, "d", 86400))
"""For spans of so many seconds at most: those between two ticks, and the unit that they are told in."""

LINES: Final = 6
"""Most lines of a chart, each of a look of its own."""


def chart(name: str, title: str, series: Sequence[Series]) -> Markup:
    """A figure with a legend. `name` tells it from the others of its page, and is an identifier; the series have one
    unit and one grid of times. More than `LINES` of them could not be told apart: the first are drawn, and the rest is
    counted.

    Raises ValueError for no series, or for such as do not fit together.
    """
    if len({(one.unit, one.start, one.step, len(one.values)) for one in series}) != 1:
        raise ValueError(f"{title}: a chart has series of one unit over the same times")
    drawn, left_out = series[:LINES], max(0, len(series) - LINES)
    unit = drawn[0].unit
    top, tick = _scale(max((value for one in drawn for value in one.values if value is not None), default=0.0), unit)
    parts = [
        Markup('<figure class="chart"><figcaption><span class="chart-title">{}</span>').format(title),
        _legend(drawn, left_out),
        Markup('</figcaption><svg viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title {}-words">').format(
            _WIDTH, _HEIGHT, name, name
        ),
        Markup('<title id="{}-title">{}</title><desc id="{}-words">{}</desc>').format(name, title, name, _words(drawn)),
        *_y_axis(top, tick, unit),
        *_x_axis(drawn[0]),
        *(_line(number, one, top) for number, one in enumerate(drawn, 1)),
    ]
    if all(value is None for one in drawn for value in one.values):
        parts.append(
            Markup('<text class="chart-none" x="{}" y="{}" text-anchor="middle">no samples yet</text>').format(
                (_LEFT + _WIDTH - _RIGHT) // 2, (_TOP + _HEIGHT - _BOTTOM) // 2
            )
        )
    return Markup("").join([*parts, Markup("</svg></figure>")])


def told(value: float, unit: Unit) -> str:
    """A value as people read it."""
    if unit == "seconds":
        return _seconds(value)
    text = _short(value)
    return f"{text}/s" if unit == "events/s" else text


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:.3g} ms" if value >= 0.0005 or value == 0 else "< 1 ms"
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if value >= size:
            return f"{_digits(value / size)} {name}"
    return f"{_digits(value)} s"


def _short(value: float) -> str:
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{_digits(value / size)}{name}"
    return _digits(value)


def _digits(value: float) -> str:
    """Three of them that count, and no zeros behind a point."""
    if value >= 100:
        return f"{value:.0f}"
    text = f"{value:.{1 if value >= 10 else 2}f}"
    return text.rstrip("0").rstrip(".")


def _scale(highest: float, unit: Unit) -> tuple[float, float]:
    """Where the axis ends, and the distance of its ticks."""
    if highest <= 0:
        return 1.0, 1.0
    if unit == "seconds" and highest > 1:
        steps: Iterable[float] = _CLOCK
    else:
        size = 10.0 ** math.floor(math.log10(highest / _Y_TICKS))
        steps = (size, 2 * size, 5 * size, 10 * size)
    step = next((step for step in steps if step * _Y_TICKS >= highest), None)
    if step is None:  # more than a week
        step = math.ceil(highest / _Y_TICKS / _CLOCK[-1]) * _CLOCK[-1]
    if unit == "events":
        step = max(1.0, step)
    return math.ceil(highest / step) * step, step


def _x(series: Series, place: float) -> str:
    width = _WIDTH - _LEFT - _RIGHT
    return f"{_LEFT + width * place / max(1, len(series.values) - 1):.1f}"


def _y(value: float, top: float) -> str:
    height = _HEIGHT - _TOP - _BOTTOM
    return f"{_TOP + height * (1 - value / top):.1f}"


def _y_axis(top: float, tick: float, unit: Unit) -> Iterable[Markup]:
    for number in range(round(top / tick) + 1):
        y = _y(number * tick, top)
        yield Markup('<line class="chart-grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, _WIDTH - _RIGHT, y, y)
        yield Markup('<text x="{}" y="{}" text-anchor="end" dominant-baseline="middle">{}</text>').format(
            _LEFT - 6, y, "0" if number == 0 else told(number * tick, unit)
        )


def _x_axis(series: Series) -> Iterable[Markup]:
    length = series.step * len(series.values)
    _, step, unit, size = next(each for each in _TIMES if length <= each[0])
    steps = int(length // step)
    for number in range(steps + 1):
        ago = number * step
        anchor = "end" if number == 0 else "start" if ago == length else "middle"
        place = (len(series.values) - 1) * (1 - ago / length)
        words = "now" if number == 0 else f"−{ago // size} {unit}"
        yield Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(
            _x(series, place), _HEIGHT - 8, anchor, words
        )


def _line(number: int, series: Series, top: float) -> Markup:
    """A line that is interrupted where nothing is known, and dots for what is known alone."""
    line: list[str] = []
    dots: list[str] = []
    known = [value is not None for value in (None, *series.values, None)]
    for place, value in enumerate(series.values):
        if value is None:
            continue
        at = f"{_x(series, place)} {_y(value, top)}"
        if known[place]:
            line.append(f"L{at}")
        elif known[place + 2]:
            line.append(f"M{at}")
        else:
            dots.append(f"M{at}h0.1")
    drawn = (("chart-line", line), ("chart-line chart-dots", dots))
    return Markup("").join(
        Markup('<path class="{} chart-line-{}" d="{}"/>').format(kind, number, "".join(commands))
        for kind, commands in drawn
        if commands
    )


def _latest(series: Series) -> str:
    """What is known of the last steps."""
    value = next((value for value in reversed(series.values[-4:]) if value is not None), None)
    return "–" if value is None else told(value, series.unit)


def _legend(series: Sequence[Series], left_out: int) -> Markup:
    entries = [
        Markup(
            '<li><svg class="chart-key" viewBox="0 0 24 8" aria-hidden="true"><path class="chart-line chart-line-{}" '
            'd="M1 4L23 4"/></svg>{} <b>{}</b></li>'
        ).format(number, one_line(one.label), _latest(one))
        for number, one in enumerate(series, 1)
    ]
    if left_out:
        entries.append(Markup("<li>and {} more</li>").format(left_out))
    return Markup('<ul class="chart-legend">{}</ul>').format(Markup("").join(entries))


def _words(series: Sequence[Series]) -> str:
    return " ".join(_sentence(one) for one in series)


def _sentence(series: Series) -> str:
    known = [value for value in series.values if value is not None]
    label = one_line(series.label)
    if not known:
        return f"{label}: no samples."
    said = (
        f"{label}: now {_latest(series)}, lowest {told(min(known), series.unit)}, "
        f"highest {told(max(known), series.unit)}"
    )
    missing = (len(series.values) - len(known)) * series.step
    return f"{said}; nothing is known for {_seconds(missing)}." if missing else f"{said}."


_BAR: Final = 4
"""Width of a bar."""
_SPARK: Final = 20
"""Height of the highest."""


def spark(values: Sequence[int], words: str) -> Markup:
    """Small bars that stand in a line of text or a table, one for each step, the last one now; `words` say it."""
    highest = max(values, default=0)
    width = len(values) * (_BAR + 1) - 1
    bars = "".join(
        f"M{place * (_BAR + 1)} {_SPARK}v-{max(2.0, _SPARK * value / highest):.1f}h{_BAR}V{_SPARK}z"
        for place, value in enumerate(values)
        if value
    )
    return Markup(
        '<svg class="spark" viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>'
        '<path class="spark-ground" d="M0 {}h{}"/><path class="spark-bars" d="{}"/></svg>'
    ).format(width, _SPARK, words, words, _SPARK, width, bars)
