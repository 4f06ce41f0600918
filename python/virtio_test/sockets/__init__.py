"""UNIX sockets with fds beside the bytes: what vhost-user and vfio-user have in common, and no message of either."""
