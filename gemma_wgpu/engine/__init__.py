"""Generation: how tokens come out of a model, for one text or for many."""
