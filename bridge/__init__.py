"""pgbridge turns committed PostgreSQL events into confirmed messages.

The way of one event, in the order in which the files are best read:

1. A trigger calls ``bridge.emit()``: the event becomes a row of ``bridge.outbox`` in the caller's
   own transaction (``sql/migrations``). If the bridge sleeps, the doorbell rings.
2. ``sources/outbox.py`` reads the log by a mark and its gaps, so that neither late commits nor
   rolled back ids lose or repeat a row. ``sources/channels.py`` hears plain ``pg_notify``.
3. ``routes.py`` says which sinks take the event's topic.
4. ``relay.py`` keeps pages in flight, publishes them, and settles each page once every event in it
   is confirmed by a broker or stands in ``bridge.dead_letter``.
5. ``sinks/`` speak to one broker each, and tell for every message whether it was confirmed.
6. ``daemon.py`` builds these parts from ``settings/`` and keeps them running; ``operate/`` is what an
   operator sees of them; ``cli.py`` is the command ``pgbridge``.

The story goes on in ``workers/__init__.py``.
"""

__version__ = "0.1.0"
