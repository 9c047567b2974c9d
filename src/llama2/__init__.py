"""Llama 2, whole: run, change, train, align, measure and serve Llama-family models."""
