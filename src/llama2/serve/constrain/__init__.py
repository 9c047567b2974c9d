"""Answers that follow a grammar: JSON, schemas, regular expressions, and calls of functions."""
