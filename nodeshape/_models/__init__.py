"""Modules with an ODE in them. Imports the solver only."""
