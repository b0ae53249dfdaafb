"""What ``python -m nodeshape.paper`` repeats. Imports anything; only its command imports it."""
