"""Properties that hold for every ring: against a reference model, one defect at a time, and under pure chaos."""
