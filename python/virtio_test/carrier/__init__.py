"""How the other side reaches a device or a driver: in this process, over a socket, in an emulator."""
