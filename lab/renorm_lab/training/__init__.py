"""Training one run, and measuring what came of it."""
