"""The papers' experiments: recipes, data, models, training and report. `renorm run RECIPE` on the command line."""
