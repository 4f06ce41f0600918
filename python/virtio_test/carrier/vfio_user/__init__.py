"""The vfio-user protocol: a PCI function served over a UNIX socket, to QEMU or to our own client.

* `messages`, `payloads`, `capabilities`, `rules`: the protocol as data; `messages.render()` shows it.
* `codec`: bytes and fds to messages and back; `wire`: the same over a socket.
* `server`: `VfioUserServer` and `serve`; `connection` (order, and memory that a client withholds), `session` (what
  commands do), `dma` and `irqs` are its parts.
* `client`: the other end.
"""
