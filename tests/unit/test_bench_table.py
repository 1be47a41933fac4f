"""The benchmark's arithmetic: rounds to medians, ratios, targets, and the table and JSON that are published."""

import json
from pathlib import Path

import pytest

from tests.bench.bridge import (
    OTHER,
    Drained,
    Measured,
    Sample,
    alone,
    beside_other,
    between,
    processor_times,
    rate,
)
from tests.bench.gaps import on_the_way
from tests.bench.handlers import RECORD
from tests.bench.latency import percentile
from tests.bench.peers.frames import Confirms
from tests.bench.processor import Look, microseconds
from tests.bench.registry import selected
from tests.bench.results import Interleaved, Row, as_json, at_least, at_most, faster, number, table, within, write_json
from tests.bench.rounds import Plan, interleave
from tests.bench.workers import AIO_PIKA, FASTSTREAM, VARIANTS, beside, rows
from tests.bench.world import payloads


def row(ours: list[float], peer: list[float], **more: object) -> Row:
    return Row("r", "events/s", ours, peer, "peer", **more)  # type: ignore[arg-type]


def test_a_ratio_is_taken_within_each_round_and_not_between_medians() -> None:
    slow_machine_in_round_two = row([100.0, 10.0, 120.0], [50.0, 5.0, 100.0])
    assert slow_machine_in_round_two.ratios == (2.0, 2.0, 1.2)
    assert as_json(slow_machine_in_round_two)["ratio"] == 2.0
    assert as_json(slow_machine_in_round_two)["ratio_min"] == 1.2
    assert as_json(slow_machine_in_round_two)["ours"] == 100.0
    assert as_json(slow_machine_in_round_two)["peer"] == 50.0


@pytest.mark.parametrize(
    ("target", "ratio", "met"),
    [
        (at_least(0.8), 0.8, True),
        (at_least(0.8), 0.79, False),
        (faster(), 1.0, False),
        (faster(), 1.01, True),
        (None, 5.0, None),
    ],
)
def test_a_target_of_the_ratio_is_met_by_the_median(target: object, ratio: float, met: bool | None) -> None:
    assert row([ratio * 10] * 3, [10.0] * 3, target=target).met is met


def test_a_target_of_our_own_value_needs_no_peer() -> None:
    assert Row("r", "ms", [2.0, 9.0, 2.5], target=at_most(3)).met is True
    assert Row("r", "ms", [3.1, 3.2, 1.0], target=at_most(3)).met is False


def test_a_target_may_be_at_most_so_many_times_the_peer() -> None:
    assert row([8.0, 2.0, 2.0], [1.0, 1.0, 1.0], target=within(2)).met is True
    assert row([2.1, 2.1, 2.0], [1.0, 1.0, 1.0], target=within(2)).met is False
    assert str(within(2)) == "ratio <= 2"


def test_a_row_with_an_error_or_without_a_value_never_meets_its_target() -> None:
    assert Row("r", "ms", [1.0], target=at_most(3), error="the peer ended").met is False
    assert Row("r", "ms", [], target=at_most(3)).met is False
    assert row([5.0, 6.0], [1.0], target=at_least(1), error="round 2 failed").ratios == (5.0,)


def test_rounds_of_unequal_length_without_an_error_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        row([1.0, 2.0], [1.0])


def test_contenders_take_turns_and_one_that_fails_leaves_the_others_alone() -> None:
    order: list[str] = []

    def contender(name: str, fails: bool = False) -> float:
        order.append(name)
        if fails:
            raise RuntimeError("no broker")
        return float(len(order))

    found = interleave(
        Plan(3),
        {"ours": lambda: contender("a"), "broken": lambda: contender("b", True), "peer": lambda: contender("c")},
    )
    assert order == ["a", "b", "c", "a", "c", "c", "a"]
    assert len(found.values["ours"]) == len(found.values["peer"]) == 3
    assert found.row("r", "x", "peer").error == ""
    assert found.row("r", "x", "broken", at_least(1)).error == "broken: RuntimeError: no broker"
    assert found.row("r", "x", "broken", at_least(1)).met is False


def test_the_table_shows_medians_ranges_targets_and_failures() -> None:
    text = table([row([40_000.4], [50_000.0], target=at_least(0.8)), Row("lost", "", [], error="Traceback\n  at\nwhy")])
    lines = text.splitlines()
    assert lines[2].split("|")[1:-1] == [
        cell.ljust(len(head))
        for cell, head in zip(
            [" r ", " events/s ", " 40000 ", " 50000 ", " peer ", " 0.80 [0.80..0.80] ", " ratio >= 0.8 ", " yes "],
            lines[0].split("|")[1:-1],
            strict=True,
        )
    ]
    assert "FAILED" in lines[3]
    assert lines[-1] == "FAILED lost: why"
    assert len({len(line) for line in lines[:4]}) == 1


def test_the_json_is_a_list_of_rows_with_the_agreed_keys(tmp_path: Path) -> None:
    write_json([row([4.0], [2.0], target=faster())], tmp_path / "build" / "bench.json")
    (read,) = json.loads((tmp_path / "build" / "bench.json").read_text())
    assert {"row", "ours", "peer", "peer_name", "ratio", "target", "rounds", "unit"} <= read.keys()
    assert read["ratio"] == 2.0
    assert read["target"] == "ratio > 1"
    assert read["rounds"] == {"ours": [4.0], "peer": [2.0]}


@pytest.mark.parametrize(("value", "text"), [(31415.9, "31416"), (31.4159, "31.4"), (0.0314159, "0.0314")])
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert percentile(values, 0.99) == 99.0
    assert percentile(values, 0.5) == 50.0
    assert percentile([7.0], 0.99) == 7.0
    with pytest.raises(ValueError, match="no event"):
        percentile([], 0.5)


def test_a_backlogs_rate_counts_from_the_lead_and_its_tenths_from_samples() -> None:
    samples = [Sample(mark, 10.0 + mark / 100, mark / 1000) for mark in range(10, 1001, 10)]
    assert Drained(1000, 9.0, samples, 80.0).rate == pytest.approx(1000 / 11.0)
    seconds, cpu = between(samples, 900, 1000)
    assert seconds == pytest.approx(0.01)
    assert cpu == pytest.approx(0.001)
    with pytest.raises(ValueError, match="only 1 samples"):
        between(samples, 1000, 1005)


def drained(seconds: float, marks: int) -> Drained:
    """1,000 events at 5 us each, of whose marks so many were seen."""
    samples = [Sample(mark, seconds * mark / 1000, 0.5 + mark * 5e-6) for mark in range(1000, 0, -1000 // marks)]
    return Drained(1000, 0.0, samples[::-1], 80.0)


def test_processor_time_is_that_of_the_bridges_and_a_peer_has_none() -> None:
    found = Interleaved[Measured]({"ours": [drained(2.0, 10), drained(1.0, 5)], "peer": [700.0, 800.0]}, {})
    assert found.each(rate).values == {"ours": [500.0, 1000.0], "peer": [700.0, 800.0]}
    times = processor_times(found)
    assert times.row("r", "us/event").ours == pytest.approx([5.0, 5.0])
    assert times.values["peer"] == []


def test_a_bridge_whose_mark_was_seen_once_has_a_rate_and_no_processor_time() -> None:
    found = Interleaved[Measured]({"ours": [drained(2.0, 1)]}, {})
    assert found.each(rate).row("r", "events/s").ours == [500.0]
    assert "only 1 samples" in processor_times(found).row("r", "us/event").error


def test_the_other_version_takes_part_in_rows_only_where_it_is_measured() -> None:
    one, two = Interleaved({"ours": [4.0]}, {}), Interleaved({"ours": [4.0], OTHER: [2.0]}, {})
    assert alone(one, "r", "ms", at_most(5)).peer_name == ""
    assert alone(one, "r", "ms", at_most(5)).met is True
    assert alone(two, "r", "ms").peer == [2.0]
    assert beside_other(one, "r", "ms") == []
    assert [row.ratios for row in beside_other(two, "r", "ms")] == [(2.0,)]


def test_single_events_above_gaps_count_from_their_commits(tmp_path: Path) -> None:
    records = tmp_path / "records"
    records.write_bytes(RECORD.pack(9.9, 10.004, 0, 1) + RECORD.pack(9.8, 10.002, 0, 0))
    assert on_the_way(records, {0: 10.0, 1: 10.001}) == pytest.approx([3.0, 2.0])


def test_a_workers_processor_time_counts_from_the_first_look_that_saw_it_at_work() -> None:
    assert microseconds(Look(500, 2.0), Look(2500, 2.5)) == pytest.approx(250.0)
    with pytest.raises(ValueError, match="no event was finished"):
        microseconds(Look(2000, 2.0), Look(2000, 2.1))


def test_a_worker_is_compared_only_with_peers_that_have_a_reply_where_it_has_one() -> None:
    plain, replying = VARIANTS[0], VARIANTS[1]
    assert (plain.reply, replying.reply) == (False, True)
    values = {name: [4.0] for name in (plain.name, replying.name)}
    values |= {beside(peer, plain): [1.0] for peer in (FASTSTREAM, AIO_PIKA)}
    values |= {beside(peer, replying): [2.0] for peer in (FASTSTREAM, AIO_PIKA)}
    errors = {beside(AIO_PIKA, replying): "RuntimeError: it ended"}
    times = Interleaved({name: [plain.processor_time] for name in values}, errors)
    made = [one for variant in (plain, replying) for one in rows(variant, Interleaved(values, errors), times)]
    assert [one.row for one in made if not one.row.startswith("workers: ")] == []
    assert [list(one.ratios) for one in made] == [[4.0], [4.0], [1.0], [2.0], [2.0], [1.0]]
    assert [one.met for one in made] == [True, True, True, False, False, False]
    assert [bool(one.error) for one in made] == [False, False, False, False, True, True]


def test_confirms_are_counted_in_any_order_split_and_multiple() -> None:
    def ack(tag: int, multiple: bool = False) -> bytes:
        return bytes([1, 0, 1, 0, 0, 0, 13, 0, 60, 0, 80]) + tag.to_bytes(8) + bytes([multiple, 0xCE])

    confirms = Confirms()
    data = ack(2) + ack(1) + ack(5)
    confirms.feed(data[:30])
    confirms.feed(data[30:])
    assert (confirms.floor, confirms.confirmed) == (2, 3)
    confirms.feed(ack(5, multiple=True))
    assert (confirms.floor, confirms.confirmed) == (5, 5)
    with pytest.raises(RuntimeError, match=r"method 20\.40"):
        confirms.feed(bytes([1, 0, 1, 0, 0, 0, 13, 0, 20, 0, 40]) + bytes(9) + b"\xce")


@pytest.mark.parametrize("size", [200, 10_000])
def test_payloads_are_json_of_exactly_the_size_asked_for(size: int) -> None:
    texts = list(payloads(3, size))
    assert [len(text.encode()) for text in texts] == [size] * 3
    assert [json.loads(text)["n"] for text in texts] == [0, 1, 2]


def test_rows_are_chosen_by_the_beginning_of_their_names_and_an_unknown_one_is_told() -> None:
    assert selected(["watch", "rabbitmq: Node.js"]) == ["rabbitmq", "watch"]
    assert selected([])[0] == "rabbitmq"
    with pytest.raises(ValueError, match="no row 'rabitmq'"):
        selected(["rabitmq"])
