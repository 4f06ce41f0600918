"""One file per device class, and `base`: what they, and a device of one's own, are made from."""
