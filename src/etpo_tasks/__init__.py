"""Tasks besides data science, with the small models made for them and an exact oracle."""
