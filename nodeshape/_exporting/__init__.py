"""Modules and classifiers as files that need no solver, verified. Imports models, data and the solver."""
