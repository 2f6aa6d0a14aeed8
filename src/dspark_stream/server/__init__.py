"""The service: sockets in, engine commands out. The only folder that touches sockets.

A request's way through it: `websocket` or `http` decodes with `bodies` and `wire`, `plan` checks every value,
`session` orders the lanes of a socket, `service` admits, tokenises and submits, `hub` brings the engine's events
back to the loop, `lifecycle` turns them into the protocol's events, `outbox` numbers them and `delivery` writes.
"""
