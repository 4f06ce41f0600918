"""What a driver sees of a device: the register models of the specification and the vhost-user protocol."""
