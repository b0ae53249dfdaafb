"""Neural-ODE image classifiers: trained fast, exact gradients, exported to run anywhere.

The names below load on first use, so that ``nodeshape.predict`` runs without importing torch.
"""
