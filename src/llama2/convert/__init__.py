"""A model on disk in another file format or in other number formats."""
