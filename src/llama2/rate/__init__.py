"""Human evaluation on a local page: what people rate, what they said, how far they agree."""
