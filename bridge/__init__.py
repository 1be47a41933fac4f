"""pgbridge turns committed PostgreSQL events into confirmed messages.

The way of one event, in the order in which the files are best read:

1. A trigger calls ``bridge.emit()``: the event becomes a row of ``bridge.outbox`` in the caller's own transaction
   (``sql/migrations``). If no bridge is awake, the doorbell rings.
2. ``sources/outbox.py`` reads the log by a mark and its gaps, so that neither late commits nor ids that were rolled
   back lose or repeat a row. ``sources/channels.py`` hears plain ``pg_notify``.
3. ``relay.py`` asks the routes which sinks take the event's topic, keeps pages in flight, and settles each page once
   every event in it is confirmed by a broker or is in ``bridge.dead_letter``.
4. ``lane.py`` is the way to one sink: it keeps the order of each key through failures.
5. ``brokers/`` has one folder for each kind of broker, with all that it needs: settings, connection, sink, the
   workers' queue, topology, dead letters. ``brokers/contract.py`` says what each of them promises.
6. ``daemon.py`` builds these parts from ``settings/`` and keeps them running. ``commands/`` is what an operator does,
   one file a verb; ``cli.py`` is the group ``pgbridge``. ``postgres/`` and ``process/`` are what all of them share.

The story goes on in ``workers/__init__.py``.
"""

__version__ = "0.2.0"
