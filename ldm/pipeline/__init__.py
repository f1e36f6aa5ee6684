"""A pipeline: its parts, and its folder on disk in the layout of diffusers."""
