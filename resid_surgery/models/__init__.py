"""What lies on the table: architectures as data, prompts, facts, opened models, traced forwards."""
