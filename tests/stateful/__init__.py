"""Device and driver together as state machines: whatever they do, each request ends once, with the right bytes."""
