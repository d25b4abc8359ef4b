"""Fetching: the name of a model becomes its bytes, natively and in the browser."""
