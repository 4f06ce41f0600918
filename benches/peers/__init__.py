"""What we measure against and wrote ourselves: as people write it who have no workbench."""
