"""Change a model for good, and find out what else the change did."""
