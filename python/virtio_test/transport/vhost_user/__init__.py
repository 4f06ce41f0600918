"""The vhost-user protocol: one message table, a codec without sockets, a back-end and a front-end.

* `messages`, `payloads`, `rules`: the protocol as data; `messages.render()` shows it.
* `codec`: bytes and fds to messages and back.
* `backend`: `Backend` and `serve`; `session` (what messages do), `runner` and `rings` (when queues run), `memory`,
  `channel` (the back-end's own requests) and `endpoint` (where front-ends connect) are its parts.
* `frontend`: the other end, over `wire`; `registers` makes it what a `Driver` drives, with `link` (one connection),
  `frontrings` (what outlives it) and `inflight` (the record that a back-end leaves to the next).
"""
