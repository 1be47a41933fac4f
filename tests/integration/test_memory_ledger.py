"""A test's ledger remembers effects as the inbox does."""

from bridge.settings import PostgresSettings
from workers.claim import Claim
from workers.effects import Effect, EffectStore, Recorded
from workers.inbox import Inbox
from workers.testing import MemoryLedger, make_event


class _Claimed:
    """The effects of a claim on the real inbox."""

    def __init__(self, inbox: Inbox, claim: Claim) -> None:
        self._inbox, self._claim = inbox, claim

    async def begin_effect(self, operation: str, given: Recorded | None) -> Effect[Recorded]:
        return await self._inbox.begin_effect(self._claim, operation, given)

    async def begin_effect_again(self, effect: Effect[Recorded], given: Recorded | None) -> Effect[Recorded]:
        return await self._inbox.begin_effect_again(self._claim, effect, given)

    async def end_effect(self, effect: Effect[Recorded]) -> None:
        await self._inbox.end_effect(self._claim, effect)


async def _story(store: EffectStore) -> list[tuple[str, object]]:
    """Two attempts: what the second one finds of an effect that was ended, and of one that was not; and then two times
    the first again."""
    told: list[tuple[str, object]] = []
    charge = await store.begin_effect("charge", {"amount": 1})
    told.append((charge.idempotency_key, charge.result))
    charge.result = {"id": "ch_1", "parts": (1, 2), "none": None}
    await store.end_effect(charge)
    begun = await store.begin_effect("mail", None)
    for operation in ("charge", "mail"):
        found = await store.begin_effect(operation, {"amount": 2})
        told.append((operation, found.given))
        told.append((found.idempotency_key, found.result))
        told.append((operation, found.started_at == {"charge": charge, "mail": begun}[operation].started_at))
    for n in range(2):
        again = await store.begin_effect_again(await store.begin_effect("charge", None), {"amount": n})
        told.append((again.idempotency_key, again.result))
        told.append(("charge", again.started_at > charge.started_at))
        again.result = {"id": f"ch_{n}"}
        await store.end_effect(again)
        found = await store.begin_effect("charge", {"amount": 9})
        told.append(("charge", found.given))
        told.append((found.idempotency_key, found.result))
    return told


async def test_keys_starts_and_results_are_those_that_the_inbox_gives(shop: PostgresSettings) -> None:
    for event in (make_event("a", None), make_event("a", None, id="order-17", source="/other")):
        inbox = Inbox("invoices", shop, concurrency=1)
        try:
            await inbox.open()
            claim = await inbox.claim(event.inbox_id)
            assert isinstance(claim, Claim)
            real = await _story(_Claimed(inbox, claim))
        finally:
            await inbox.close()
        assert await _story(MemoryLedger("invoices").of(event)) == real
