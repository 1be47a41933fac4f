"""Payments with Stripe, charged once whatever fails. ``fake/`` is a Stripe to test against."""
