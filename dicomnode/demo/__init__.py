"""Demonstration: a procedural phantom and pictures of what a model made of it."""
