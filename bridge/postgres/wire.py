"""A connection to PostgreSQL as what reads the log, and what works on every event, needs it.

Statements of one kind follow each other all day, so what is done for each counts: a statement of psycopg's cursor took
more processor time than the eight events that it brought. So these go through libpq (`psycopg.pq`), prepared once, and
the socket is watched for as long as the connection lives. Whatever else psycopg does with it works as ever.
"""

import asyncio
import contextlib
import itertools
import os
import select
import socket
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeVar

import psycopg
from psycopg import AsyncConnection, generators
from psycopg.abc import PQGen
from psycopg.adapt import Transformer
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus, Format, TransactionStatus
from psycopg.pq.abc import PGresult
from psycopg.rows import TupleRow
from psycopg.waiting import READY_R, READY_W, WAIT_R, WAIT_W

T = TypeVar("T")

Value = str | int | float | bool | None | Sequence[str | float | None]
"""What a prepared statement takes; a sequence is an array of one dimension."""

_GRACE: Final = 0.2
"""Seconds in which a statement whose task was cancelled may end by itself, as nearly all do. To cancel it takes another
connection, which a busy server may be long in giving."""

_CANCEL_LIMIT: Final = 1.0
"""Seconds that the server has to take the request to cancel a statement."""

_END_LIMIT: Final = 5.0
"""Seconds that it then has to end the statement."""

_TURN: Final = 0.002
"""Seconds for which what comes is read without a turn of the event loop."""

_DONE: Final = (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK)


class Connection(AsyncConnection[TupleRow]):
    """A connection whose rows are tuples, as all of ours are, and which can be given up.

    A statement that is cancelled does not wait for a server that does not answer. psycopg would wait 5 s for the server
    to take the request, and as long again for the statement to end.
    """

    signs_of_life = 0
    """Rises whenever the peer has sent something, or has taken something that we sent."""
    _watched: int | None = None
    """The socket, while the event loop tells of it."""
    _waiter: asyncio.Future[None] | None = None
    """Of the statement under way."""
    _ready = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._names: dict[str, bytes] = {}
        """The names of prepared statements, by their texts."""
        self._numbers = itertools.count()
        self._transformer = Transformer.from_context(self)

    # Statements

    async def rows(self, query: str, *values: Value) -> list[TupleRow]:
        """The rows of a statement with the parameters $1, $2..., whose types are PostgreSQL's to find; it is prepared
        the first time. Raises psycopg's errors."""
        async with self.lock:
            result = await self._run(query, values, Format.BINARY)
            self._transformer.set_pgresult(result)
            rows = self._transformer.load_rows(0, result.ntuples, tuple)
            self._transformer.set_pgresult(None)  # which may be megabytes
            return rows

    async def texts(self, query: str, *values: Value) -> list[list[str | None]]:
        """The same, and each value of a row is as PostgreSQL writes it."""
        async with self.lock:
            result = await self._run(query, values, Format.TEXT)
        value, columns = result.get_value, range(result.nfields)
        return [[_read(value(row, column)) for column in columns] for row in range(result.ntuples)]

    async def _run(self, query: str, values: Sequence[Value], result_format: Format) -> PGresult:
        try:
            name = self._names.get(query)
            if name is None:
                # A number is used once: the server may have prepared what was cancelled here.
                name = b"pgbridge%d" % next(self._numbers)
                self.pgconn.send_prepare(name, query.encode())
                await self._result()
                self._names[query] = name
            self.pgconn.send_query_prepared(name, [_text(value) for value in values], result_format=result_format)
            return await self._result()
        except psycopg.Error:
            if self.closed:
                self._unwatch()
            raise

    async def _result(self) -> PGresult:
        """What the server says to what was just sent. Raises psycopg's error where it refuses."""
        result: PGresult
        # The last one: a commit may be refused behind the rows.
        *_, result = await self.wait(generators.execute(self.pgconn))
        if result.status not in _DONE:
            raise error_from_result(result)
        return result

    # Waiting

    async def wait(self, gen: PQGen[T], interval: float = 0.0, timeout: float | None = None) -> T:  # noqa: ASYNC109
        """As psycopg's, with a socket that is watched once for all statements."""
        if timeout is not None:
            # For notifications: psycopg's own way, which watches for itself.
            self._unwatch()
            return await super().wait(gen, timeout=timeout)
        try:
            return await self._drive(gen)
        except asyncio.CancelledError:
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                await self._call_off(gen)
            raise
        except psycopg.Error:
            if self.closed:
                self._unwatch()
            raise

    async def _drive(self, gen: PQGen[T], ready: int | None = None) -> T:
        """Runs it to its end; one that waits already goes on with `ready`. Whenever the socket is ready, that is a sign
        of life.

        Of a long answer libpq reads some ten kilobytes at a time. What has come meanwhile is taken without asking the
        event loop, which took a sixth of the bridge's processor time for payloads of that size.
        """
        try:
            wanted = next(gen) if ready is None else gen.send(ready)
            while True:
                ready = await self._until_ready(wanted)
                self.signs_of_life += 1
                wanted = gen.send(ready)
                if wanted == WAIT_R:
                    turn_ends = time.monotonic() + _TURN
                    while wanted == WAIT_R and self._is_readable() and time.monotonic() < turn_ends:
                        wanted = gen.send(READY_R)
        except StopIteration as done:
            result: T = done.value
            return result

    async def _until_ready(self, wanted: int) -> int:
        loop = asyncio.get_running_loop()
        fd = self._watch()
        self._ready = 0
        self._waiter = loop.create_future()
        if wanted & WAIT_W:
            loop.add_writer(fd, self._can_write)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if wanted & WAIT_W:
                loop.remove_writer(fd)
        return self._ready

    def _watch(self) -> int:
        """Gives the socket."""
        if self._watched is None:
            self._watched = self.pgconn.socket
            asyncio.get_running_loop().add_reader(self._watched, self._can_read)
        return self._watched

    def _unwatch(self) -> None:
        """Whoever waits is told; what closes the socket must come behind, since its number is soon another's."""
        if self._watched is not None:
            asyncio.get_running_loop().remove_reader(self._watched)
            self._watched = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(psycopg.OperationalError("the connection was closed"))

    def _can_read(self) -> None:
        self._ready |= READY_R
        if self._waiter is None:
            self._hear()
        elif not self._waiter.done():
            self._waiter.set_result(None)

    def _can_write(self) -> None:
        self._ready |= READY_W
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _hear(self) -> None:
        """What comes while nobody waits: the end of the session, a notification, a notice, or what a cancelled
        statement still says."""
        try:
            self.pgconn.consume_input()
        except psycopg.Error:
            self._unwatch()
            return
        # psycopg looks for notifications only once more has come.
        while (notification := self.pgconn.notifies()) is not None:
            if self.pgconn.notify_handler is not None:
                self.pgconn.notify_handler(notification)

    def _is_readable(self) -> bool:
        poll = select.poll()
        poll.register(self.pgconn.socket, select.POLLIN)
        return bool(poll.poll(0))

    # Giving up

    async def _call_off(self, gen: PQGen[T]) -> None:
        """Has the server end the statement of a task that was cancelled, so that the connection can be used again; one
        that does not end is given up."""
        # What came meanwhile was heard already: hence READY_R.
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GRACE):
                    await self._drive(gen, READY_R)
                return
            async with asyncio.timeout(_END_LIMIT):
                await self.cancel_safe()
                await self._drive(gen, READY_R)
        except (psycopg.Error, TimeoutError):
            if self.pgconn.transaction_status in (TransactionStatus.ACTIVE, TransactionStatus.UNKNOWN):
                self._give_up()
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        self._unwatch()
        self.pgconn.finish()

    async def cancel_safe(self, *, timeout: float = _CANCEL_LIMIT) -> None:  # noqa: ASYNC109 - psycopg names it so
        try:
            await super().cancel_safe(timeout=min(timeout, _CANCEL_LIMIT))
        except psycopg.Error:
            self.end_wire()
            raise

    def end_wire(self) -> None:
        """Ends the socket, so that whoever waits for an answer gets an error at once."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.pgconn.socket)) as wire:
            wire.shutdown(socket.SHUT_RDWR)  # OSError: the peer was first

    async def close(self) -> None:
        """Whoever still waits for an answer gets an error."""
        self._unwatch()
        await super().close()


def array_text(values: Iterable[str | float | None]) -> str:
    """As PostgreSQL reads it as an array of one dimension, where the statement says of what."""
    return f"{{{','.join(map(_element, values))}}}"


def _element(value: str | float | None) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return "NULL" if value is None else repr(value)


def _text(value: Value) -> bytes | None:
    if value is None:
        return None
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, int | float):
        return repr(value).encode()
    return array_text(value).encode()


def _read(value: bytes | None) -> str | None:
    return None if value is None else value.decode()
