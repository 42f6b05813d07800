"""Measures of how far a model's words follow the picture: pure functions on lists of object names,
no model needed."""
