"""Find who wrote a prediction: scores, certified search, query sources."""
