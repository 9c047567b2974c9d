"""The interfaces that clients know, a module each, and what they share."""
