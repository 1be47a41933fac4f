"""Webhooks that are sent to the endpoints of other people."""
