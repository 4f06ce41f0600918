"""The guest's side: a driver model over any transport's registers; one file per device class."""
