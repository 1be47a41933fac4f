"""What people do with dead letters on the console: replay, discard, and stop either."""

from typing import Final, Literal

from bridge.brokers.contract import Letter
from bridge.commands.dead_letters import Outcome, replay_or_discard
from bridge.console.access import Person
from bridge.console.dead.asked import Asked
from bridge.console.dead.fitting import fitting
from bridge.console.parts import Form, Parts, reason_of
from bridge.console.work import Job
from bridge.errors import UsageError

NO_REASON: Final = "give a reason: it is all that stays of what is discarded"


async def replay(parts: Parts, person: Person, form: Form) -> str:
    """Replays what the page before it has shown. Raises UsageError, also where something goes on already."""
    return await _act("replay", parts, person, form)


async def discard(parts: Parts, person: Person, form: Form) -> str:
    """Discards it. Raises UsageError."""
    return await _act("discard", parts, person, form)


async def _act(action: Literal["replay", "discard"], parts: Parts, person: Person, form: Form) -> str:
    asked = Asked.of_query(form.get("choice", ""))
    if not asked.get("until"):
        raise UsageError("look first at what would be done: the buttons of the page Dead letters lead there")
    rate, why = _rate(form.get("rate", "")), reason_of(form, NO_REASON) if action == "discard" else ""
    await parts.require_acting()
    choice = asked.choice()
    boxes = choice.workers
    total = len((await fitting(parts, asked, await parts.dead.look())).letters)
    title = f"{'Replay' if action == 'replay' else 'Discard'} of {total:,} dead letter{'s' * (total != 1)}"

    async def do(job: Job) -> str:
        def count(_: Letter, problem: str | None) -> None:
            if problem is None:
                job.done += 1
            else:
                job.refused += 1

        async with parts.dead.acting_on(boxes):
            outcome = await replay_or_discard(
                parts.settings, action, choice, person=person.signature, why=why, rate=rate, report=count, stop=job.stop
            )
        return _said(action, outcome, job)

    return await parts.work.told(parts.work.begin(title, person.signature, total, do))


def _said(action: str, outcome: Outcome, job: Job) -> str:
    done = f"{outcome.done:,} dead letter{'s' if outcome.done != 1 else ''} {action}ed"
    if outcome.refused:
        done += f", {outcome.refused:,} refused again: they stay, with the new reason"
    if outcome.stopped:
        return f"Stopped by {job.stopped_by}: {done}, of {job.total:,}."
    if not outcome.seen:
        return "Nothing was done: none of these letters is there any more."
    return f"{done}."


def _rate(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0.01 <= rate < 1e9:
        raise UsageError(
            f"rate: {text!r} is no number of letters a second, from 0.01 on; without one it is as fast as it goes"
        )
    return rate


async def stop(parts: Parts, person: Person, _: Form) -> str:
    """Ends what a person has begun, this one or another."""
    job = parts.work.stop(person.signature)
    if job is None:
        raise UsageError("nothing goes on that could be stopped")
    await parts.work.wait()
    return job.words or f"{job.title}: it ends."
