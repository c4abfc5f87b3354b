"""Builder of the embedded model; it is not part of the wheel."""
