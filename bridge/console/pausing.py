"""Pausing a sink or a worker with a reason, and letting it go on; both are written down with who did it."""

from bridge.console.access import Person
from bridge.console.parts import Form, Parts, reason_of
from bridge.postgres.pause import REACTION, Pausable, end_pause, set_pause


async def pause(parts: Parts, person: Person, what: Pausable, form: Form) -> str:
    """The sentence that says so. Raises UsageError without a reason in the form's field `why`, and as `set_pause`."""
    why = reason_of(form, f"give a reason: whoever finds the {what.kind} paused will ask for it")
    async with parts.database.connection() as connection:
        done = await set_pause(connection, what, person.signature, why)
    said = f"is paused: it takes nothing more {REACTION}" if done else "was paused already; its reason stays"
    return f"The {what.kind} {what.name} {said}."


async def resume(parts: Parts, person: Person, what: Pausable) -> str:
    """The sentence that says so. Raises as `end_pause`."""
    async with parts.database.connection() as connection:
        done = await end_pause(connection, what, person.signature)
    said = f"goes on, {REACTION}" if done else "was not paused"
    return f"The {what.kind} {what.name} {said}."
