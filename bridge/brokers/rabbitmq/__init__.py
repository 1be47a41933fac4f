"""AMQP 0-9-1 for a publisher that must be fast: frames encoded by hand, confirms counted as ranges.

`frames` (with `times`) encodes publishes, `confirms` counts their confirms, `reader` takes the received bytes apart,
`connection` shakes hands and keeps the socket, `publisher` puts them together on one confirm channel, `address` reads
the URL, `closure` says why something ended. pamqp encodes and decodes whatever is rare.
"""
