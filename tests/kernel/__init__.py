"""Real Linux as the guest: how kernels are built and booted, and what is tested with them."""
