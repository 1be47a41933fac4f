"""How Google Cloud Pub/Sub is reached and spoken to, by the sink and by the workers' queue.

``connection.py`` connects and tells errors apart, ``wire.py`` is an event as a Pub/Sub message, ``resources.py``
looks at topics and subscriptions and declares them.
"""
