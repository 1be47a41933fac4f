"""Money: sums are exact, rounded where the invoice says, and add up."""

from decimal import Decimal, localcontext

from hypothesis import given
from hypothesis import strategies as st

from workers.invoices.money import CURRENCIES, minor_unit, rounded, total, totals

AMOUNTS = st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=6)
RATES = st.none() | st.decimals(allow_nan=False, min_value=0, max_value=100, places=2)


def test_halves_are_rounded_away_from_zero() -> None:
    assert rounded(Decimal("0.005"), "EUR") == Decimal("0.01")
    assert rounded(Decimal("2.675"), "EUR") == Decimal("2.68")
    assert rounded(Decimal("-0.005"), "EUR") == Decimal("-0.01")
    assert rounded(Decimal("0.0049999999"), "EUR") == Decimal("0.00")


def test_every_currency_is_rounded_to_its_own_minor_unit() -> None:
    assert rounded(Decimal("100.5"), "JPY") == Decimal(101)
    assert str(rounded(Decimal("1"), "KWD")) == "1.000"
    assert str(rounded(Decimal("1"), "CLF")) == "1.0000"
    assert {minor_unit(code) for code in CURRENCIES} == {
        Decimal(1),
        Decimal("0.01"),
        Decimal("0.001"),
        Decimal("0.0001"),
    }


def test_tax_is_rounded_once_per_rate_and_not_per_line() -> None:
    # Three lines of 0.10 at 5 %: 0.005 a line would come to 0.03, 5 % of 0.30 is 0.015, so 0.02.
    sums = totals([(Decimal(1), Decimal("0.10"), Decimal(5))] * 3, "EUR")
    assert [(tax.rate, tax.net, tax.amount) for tax in sums.taxes] == [
        (Decimal(5), Decimal("0.30"), Decimal("0.02")),
    ]
    assert sums.gross == Decimal("0.32")


def test_rates_that_are_equal_in_value_are_one_rate() -> None:
    sums = totals([(Decimal(1), Decimal(10), Decimal("19")), (Decimal(1), Decimal(10), Decimal("19.00"))], "EUR")
    assert len(sums.taxes) == 1


@given(st.lists(st.tuples(AMOUNTS, AMOUNTS, RATES), min_size=1, max_size=20), st.sampled_from(sorted(CURRENCIES)))
def test_totals_add_up_and_are_whole_minor_units(
    lines: list[tuple[Decimal, Decimal, Decimal | None]], currency: str
) -> None:
    sums = totals(lines, currency)
    with localcontext(prec=100):  # so that the test's own sums are exact, too
        assert sums.net == total(sums.lines)
        assert sums.gross == total([sums.net, *(tax.amount for tax in sums.taxes)])
        assert (
            total(tax.net for tax in sums.taxes)
            + total(amount for amount, line in zip(sums.lines, lines, strict=True) if line[2] is None)
            == sums.net
        )
        half = minor_unit(currency) / 2
        for amount, (quantity, price, _) in zip(sums.lines, lines, strict=True):
            assert amount == amount.quantize(minor_unit(currency))
            # Scaled integers are exact whatever the context's precision.
            exact = int(quantity.scaleb(6)) * int(price.scaleb(6))
            assert abs(int(amount.scaleb(12)) - exact) <= int(half.scaleb(12))
