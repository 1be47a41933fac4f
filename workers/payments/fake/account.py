"""One account: its PaymentIntents and refunds, and the rules by which they change.

Objects have the fields of Stripe's that its SDK or we read. Amounts are integers in the currency's minor unit.
"""

import copy
import itertools
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from workers.payments.fake.errors import StripeRefusal, invalid, unexpected

Object = dict[str, Any]

_SUCCEEDS: Final = ("pm_card_visa", "pm_card_mastercard")
_DECLINED: Final = {
    "pm_card_visa_chargeDeclined": ("card_declined", "generic_decline"),
    "pm_card_chargeDeclinedInsufficientFunds": ("card_declined", "insufficient_funds"),
    "pm_card_chargeDeclinedExpiredCard": ("expired_card", None),
}
_AUTHENTICATED: Final = "pm_card_authenticationRequired"
_ASYNCHRONOUS: Final = "pm_usBankAccount_success"
"""Is `processing` until `settle` says how it ended."""

_MOST: Final = 99_999_999
"""The largest amount, of Stripe's documentation."""

_THREE_DECIMALS: Final = ("bhd", "jod", "kwd", "omr", "tnd")
"""Currencies whose amounts are multiples of ten, since card networks know two decimals of three."""

_CANCELABLE: Final = ("requires_payment_method", "requires_confirmation", "requires_action", "requires_capture")


class Account:
    """Thread-safe. Every method gives a copy, as an answer would."""

    def __init__(self, clock: Callable[[], float], happened: Callable[[str, Object], None]) -> None:
        """`happened` is told of each change, by the type of Stripe's event, with the object as it is then."""
        self._clock = clock
        self._happened = happened
        self._objects: dict[str, dict[str, Object]] = {"payment_intents": {}, "refunds": {}}
        self._number = itertools.count(1)
        self._lock = threading.RLock()
        self.charges: list[Object] = []
        """Whenever money moved, in this order: the PaymentIntent, the amount, and its metadata."""

    def create(self, given: Mapping[str, Any]) -> Object:
        """A PaymentIntent, confirmed where that is asked for. Raises StripeRefusal."""
        amount, currency = _amount(given, "amount"), str(given.get("currency", ""))
        if len(currency) != 3 or not currency.isalpha() or not currency.islower():
            raise invalid(f"Invalid currency: {currency}", param="currency")
        if currency in _THREE_DECIMALS and amount % 10:
            raise invalid(f"Amounts in {currency} must be multiples of ten", param="amount")
        method = given.get("payment_method")
        known = (*_SUCCEEDS, *_DECLINED, _AUTHENTICATED, _ASYNCHRONOUS)
        if method is not None and method not in known:
            message = f"No such PaymentMethod: '{method}'"
            raise invalid(message, param="payment_method", code="resource_missing")
        if _true(given, "confirm") and method is None:
            raise invalid("A PaymentIntent that is confirmed needs a payment method", param="payment_method")
        if _true(given, "off_session") and not _true(given, "confirm"):
            raise invalid("off_session goes with confirm", param="off_session")
        with self._lock:
            intent = self._new("payment_intents", "pi", given) | {
                "object": "payment_intent",
                "amount": amount,
                "amount_capturable": 0,
                "amount_received": 0,
                "capture_method": given.get("capture_method", "automatic"),
                "currency": currency,
                "customer": given.get("customer"),
                "description": given.get("description"),
                "last_payment_error": None,
                "latest_charge": None,
                "next_action": None,
                "payment_method": method,
                "status": "requires_payment_method" if method is None else "requires_confirmation",
                "canceled_at": None,
                "cancellation_reason": None,
            }
            self._objects["payment_intents"][intent["id"]] = intent
            self._tell("created", intent)
            if _true(given, "confirm"):
                self._confirm(intent, off_session=_true(given, "off_session"))
            return copy.deepcopy(intent)

    def _confirm(self, intent: Object, *, off_session: bool) -> None:
        method = intent["payment_method"]
        if method in _DECLINED:
            code, decline_code = _DECLINED[method]
            self._decline(intent, code, "Your card was declined.", decline_code)
        if method == _AUTHENTICATED and off_session:
            self._decline(intent, "authentication_required", "This payment needs the customer.", None)
        if method == _AUTHENTICATED:
            intent["status"], intent["next_action"] = "requires_action", {"type": "use_stripe_sdk"}
            self._tell("requires_action", intent)
        elif method == _ASYNCHRONOUS:
            intent["status"] = "processing"
            self._tell("processing", intent)
        elif intent["capture_method"] == "manual":
            intent["status"], intent["amount_capturable"] = "requires_capture", intent["amount"]
            intent["latest_charge"] = self._id("ch")
            self._tell("amount_capturable_updated", intent)
        else:
            self._receive(intent, intent["amount"])

    def _decline(self, intent: Object, code: str, message: str, decline_code: str | None) -> None:
        error = {"type": "card_error", "code": code, "message": message, "decline_code": decline_code}
        intent["status"], intent["last_payment_error"] = "requires_payment_method", error
        intent["payment_method"] = None
        self._tell("payment_failed", intent)
        raise StripeRefusal(
            402,
            "card_error",
            message,
            code=code,
            executed=True,
            decline_code=decline_code,
            payment_intent=copy.deepcopy(intent),
        )

    def _receive(self, intent: Object, amount: int) -> None:
        intent |= {"status": "succeeded", "amount_received": amount, "amount_capturable": 0}
        intent["latest_charge"] = intent["latest_charge"] or self._id("ch")
        self._moved(intent, amount)
        self._tell("succeeded", intent)

    def _tell(self, what: str, intent: Object) -> None:
        self._happened(f"payment_intent.{what}", copy.deepcopy(intent))

    def _moved(self, intent: Object, amount: int) -> None:
        metadata = dict(intent["metadata"])
        self.charges.append({"payment_intent": intent["id"], "amount": amount, "metadata": metadata})

    def capture(self, id: str, given: Mapping[str, Any]) -> Object:
        """Takes what was authorised, or a part of it; the rest is let go. Raises StripeRefusal."""
        with self._lock:
            intent = self._found("payment_intents", id)
            amount = _amount(given, "amount_to_capture") if "amount_to_capture" in given else intent["amount"]
            if intent["status"] != "requires_capture":
                raise self._state(intent, "captured")
            if amount > intent["amount_capturable"]:
                raise unexpected("More than was authorised cannot be captured", "amount_too_large")
            self._receive(intent, amount)
            return copy.deepcopy(intent)

    def cancel(self, id: str, given: Mapping[str, Any]) -> Object:
        """Raises StripeRefusal."""
        with self._lock:
            intent = self._found("payment_intents", id)
            if intent["status"] not in _CANCELABLE:
                raise self._state(intent, "canceled")
            intent |= {"status": "canceled", "amount_capturable": 0, "canceled_at": int(self._clock())}
            intent["cancellation_reason"] = given.get("cancellation_reason")
            self._tell("canceled", intent)
            return copy.deepcopy(intent)

    def settle(self, id: str, *, succeeded: bool) -> Object:
        """Ends what is `processing` or waits for the customer, as the bank or the customer would."""
        with self._lock:
            intent = self._found("payment_intents", id)
            if intent["status"] not in ("processing", "requires_action"):
                raise self._state(intent, "settled")
            intent["next_action"] = None
            if succeeded:
                self._receive(intent, intent["amount"])
            else:
                intent["status"], intent["payment_method"] = "requires_payment_method", None
                intent["last_payment_error"] = {"type": "card_error", "code": "payment_intent_authentication_failure"}
                self._tell("payment_failed", intent)
            return copy.deepcopy(intent)

    def refund(self, given: Mapping[str, Any]) -> Object:
        """Gives back what was received, or a part. Raises StripeRefusal."""
        with self._lock:
            intent = self._found("payment_intents", str(given.get("payment_intent", "")), param="payment_intent")
            refunds = [each for each in self._objects["refunds"].values() if each["payment_intent"] == intent["id"]]
            left = intent["amount_received"] - sum(each["amount"] for each in refunds)
            amount = _amount(given, "amount") if "amount" in given else left
            if not left:
                code = "charge_already_refunded" if refunds else "payment_intent_unexpected_state"
                raise unexpected("There is nothing to be refunded", code)
            if amount > left:
                raise unexpected(f"Refund amount ({amount}) is greater than what is left ({left})", "amount_too_large")
            refund = self._new("refunds", "re", given) | {
                "object": "refund",
                "amount": amount,
                "charge": intent["latest_charge"],
                "currency": intent["currency"],
                "payment_intent": intent["id"],
                "reason": given.get("reason"),
                "status": "succeeded",
            }
            self._objects["refunds"][refund["id"]] = refund
            self._moved(intent, -amount)
            self._happened("refund.created", copy.deepcopy(refund))
            return copy.deepcopy(refund)

    def get(self, kind: str, id: str) -> Object:
        """Raises StripeRefusal."""
        with self._lock:
            return copy.deepcopy(self._found(kind, id))

    def list(self, kind: str, given: Mapping[str, Any]) -> Object:
        """The newest first, in pages. `given` are Stripe's: limit, starting_after, created, customer, payment_intent.
        Raises StripeRefusal."""
        limit = _whole(given, "limit", 10)
        if not 1 <= limit <= 100:
            raise invalid("limit is from 1 to 100", param="limit")
        with self._lock:
            found = [each for each in reversed(self._objects[kind].values()) if _fits(each, given)]
            after = given.get("starting_after")
            if after is not None:
                self._found(kind, after, param="starting_after")
                ids = list(reversed(self._objects[kind]))
                behind = set(ids[ids.index(after) + 1 :])
                found = [each for each in found if each["id"] in behind]
            page = copy.deepcopy(found[:limit])
        return {"object": "list", "url": f"/v1/{kind}", "has_more": len(found) > limit, "data": page}

    def _new(self, kind: str, prefix: str, given: Mapping[str, Any]) -> Object:
        metadata = given.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise invalid("metadata is a hash", param="metadata")
        return {"id": self._id(prefix), "created": int(self._clock()), "livemode": False, "metadata": dict(metadata)}

    def _id(self, prefix: str) -> str:
        return f"{prefix}_fake{next(self._number):012d}"

    def _found(self, kind: str, id: str, param: str = "id") -> Object:
        found = self._objects[kind].get(id)
        if found is None:
            what = kind.removesuffix("s")
            raise invalid(f"No such {what}: '{id}'", param=param, code="resource_missing", status=404)
        return found

    def _state(self, intent: Object, done: str) -> StripeRefusal:
        message = f"This PaymentIntent could not be {done} because it has a status of {intent['status']}."
        return unexpected(message, "payment_intent_unexpected_state", payment_intent=copy.deepcopy(intent))


def _amount(given: Mapping[str, Any], name: str) -> int:
    amount = _whole(given, name, None)
    if amount < 1:
        raise invalid(f"{name} must be at least 1", param=name, code="parameter_invalid_integer")
    if amount > _MOST:
        raise invalid(f"{name} must be no more than {_MOST}", param=name, code="amount_too_large")
    return amount


def _whole(given: Mapping[str, Any], name: str, default: int | None) -> int:
    value = given.get(name, default)
    if value is None:
        raise invalid(f"Missing required param: {name}.", param=name, code="parameter_missing")
    if isinstance(value, int):
        return value
    if not (isinstance(value, str) and value.lstrip("-").isdecimal()):
        raise invalid(f"Invalid integer: {value}", param=name, code="parameter_invalid_integer")
    return int(value)


def _true(given: Mapping[str, Any], name: str) -> bool:
    return given.get(name) == "true"


def _fits(one: Object, given: Mapping[str, Any]) -> bool:
    created = given.get("created") or {}
    bounds: Mapping[str, Any] = created if isinstance(created, dict) else {"gte": created, "lte": created}
    return (
        all(given[name] == one.get(name) for name in ("customer", "payment_intent") if name in given)
        and one["created"] >= int(bounds.get("gte", 0))
        and one["created"] > int(bounds.get("gt", -1))
        and one["created"] <= int(bounds.get("lte", one["created"]))
        and one["created"] < int(bounds.get("lt", one["created"] + 1))
    )
