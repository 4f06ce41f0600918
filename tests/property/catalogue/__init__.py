"""The robustness catalogue, sections 2.1 to 2.5, as tables: one legal ring and one defect for each case."""
