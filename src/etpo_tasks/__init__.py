"""Tasks with their small models: data science, text worlds, questions and token MDPs."""
