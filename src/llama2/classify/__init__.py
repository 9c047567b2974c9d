"""Small classifiers that come with the package: is a text toxic, is an answer a refusal. They need NumPy alone."""
