"""Exact sums of money. An amount is a Decimal; it is rounded half up (away from zero) to the currency's minor unit."""

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import Final

_EXACT: Final = Context(prec=80, rounding=ROUND_HALF_UP)
"""Wide enough that no product or sum of the amounts an invoice may hold is rounded on the way."""

CURRENCIES: Final = frozenset(
    """
    AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CLF CLP
    CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF IDR
    ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT
    MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF SAR SBD
    SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD UYU UZS VED VES
    VND VUV WST XAF XCD XCG XOF XPF YER ZAR ZMW ZWG
    """.split()  # noqa: SIM905 - a list of quoted codes would be four times as long
)
"""Currencies of ISO 4217 that money is paid in."""

_WHOLE: Final = frozenset("BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX VND VUV XAF XOF XPF".split())  # noqa: SIM905
_THOUSANDTHS: Final = frozenset("BHD IQD JOD KWD LYD OMR TND".split())  # noqa: SIM905
_MINOR_UNITS: Final = {
    **dict.fromkeys(_WHOLE, 0),
    **dict.fromkeys(_THOUSANDTHS, 3),
    "CLF": 4,
}
"""Digits of the minor unit, where they are not 2 (ISO 4217)."""


def minor_unit(currency: str) -> Decimal:
    """The smallest amount of a currency: 0.01 of EUR, 1 of JPY, 0.001 of KWD."""
    return Decimal(1).scaleb(-_MINOR_UNITS.get(currency, 2))


def rounded(amount: Decimal, currency: str) -> Decimal:
    """The amount in whole minor units, half up."""
    return amount.quantize(minor_unit(currency), context=_EXACT)


def product(left: Decimal, right: Decimal) -> Decimal:
    """The exact product."""
    return _EXACT.multiply(left, right)


def total(amounts: Iterable[Decimal]) -> Decimal:
    """The exact sum; 0 of none."""
    result = Decimal(0)
    for amount in amounts:
        result = _EXACT.add(result, amount)
    return result


@dataclass(frozen=True, slots=True)
class Tax:
    """The tax of all lines with one rate."""

    rate: Decimal
    """In percent."""
    net: Decimal
    amount: Decimal


@dataclass(frozen=True, slots=True)
class Totals:
    """What an invoice comes to. `net` is the sum of `lines`, and `gross` of `net` and the taxes' amounts."""

    lines: tuple[Decimal, ...]
    net: Decimal
    taxes: tuple[Tax, ...]
    gross: Decimal


def totals(lines: Iterable[tuple[Decimal, Decimal, Decimal | None]], currency: str) -> Totals:
    """The totals of lines of (quantity, unit price, tax rate in percent or None).

    Each line is rounded, and the tax is rounded once per rate, on the sum of that rate's lines.
    """
    amounts: list[Decimal] = []
    by_rate: dict[Decimal, list[Decimal]] = {}
    for quantity, unit_price, rate in lines:
        amount = rounded(product(quantity, unit_price), currency)
        amounts.append(amount)
        if rate is not None:
            by_rate.setdefault(rate, []).append(amount)
    taxes = []
    for rate in sorted(by_rate):
        net = total(by_rate[rate])
        taxes.append(Tax(rate, net, rounded(product(net, rate).scaleb(-2, context=_EXACT), currency)))
    net = rounded(total(amounts), currency)
    return Totals(tuple(amounts), net, tuple(taxes), rounded(total([net, *(tax.amount for tax in taxes)]), currency))
