"""Alignment: answers of a model, judged by reward models, become data to tune it with (paper 3.2)."""
