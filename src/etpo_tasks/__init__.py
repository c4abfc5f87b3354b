"""Tasks: data science, household, TextArena and token MDPs, with the small models made for them."""
