"""The solver: odeint, methods, step control, stage solvers, gradients, the fused ops. Imports no sibling folder."""
