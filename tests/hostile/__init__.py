"""Attacks that are known, and those that follow from them: on our core, devices, transports and servers, for real."""
