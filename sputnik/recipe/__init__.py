"""Recipes: stages in order with lineage, and the report over a run."""
