"""Games of preferences: equilibria, an oracle of preferences, and tables that play them with the losses of language models."""
