"""NATS JetStream, as the sink and the workers' queue share it.

`connection` opens and closes, `wire` names subjects and writes headers, `streams` declares streams.
"""
