"""Operate on the stream: interventions as values, an engine that runs them, their effects."""
