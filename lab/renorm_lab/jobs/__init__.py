"""Carrying out all runs of a recipe: processes, interruptions, progress."""
