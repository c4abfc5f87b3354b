"""Further tasks, small models for them, and an exact oracle."""
