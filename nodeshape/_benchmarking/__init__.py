"""What ``python -m nodeshape.bench`` measures. Imports anything; only its command and the experiments import it."""
