"""Safeguards of a deployment: policy, moderation, watermark, provenance."""
