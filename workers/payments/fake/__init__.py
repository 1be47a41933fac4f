"""A Stripe for tests and demos that obeys what Stripe documents of idempotency, and fails on command.

    python -m workers.payments.fake --port 12111

It keeps PaymentIntents and refunds in memory, and moves no money. Its way of one request:

1. ``server.py`` reads it, and asks ``faults.py`` whether it fails before anybody looks at it, as a limit of rates does.
2. ``idempotency.py`` looks whether its key was seen, and keeps the first outcome from the moment execution begins.
3. ``account.py`` carries it out, and tells ``webhooks.py`` what has changed.

The rules are those of Stripe's documentation: "Idempotent requests", "Error codes", "Low-level error handling", "Rate
limits", and "Testing" for the payment methods.
"""
