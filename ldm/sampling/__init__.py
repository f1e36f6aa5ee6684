"""From prompts, and pictures that are given, to pictures."""
