"""How a classifier is trained and what a run leaves. Imports models and data."""
