"""Many prompts, many hours, many machines: plans as data, and runs that survive."""
