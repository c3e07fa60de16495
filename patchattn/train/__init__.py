"""Conversion: recipes, the stages they are made of, the data they need, and the Trainer that runs them."""
