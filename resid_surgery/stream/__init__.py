"""Read the stream: recordings, their addends at any grain, and what they say in the vocabulary."""
