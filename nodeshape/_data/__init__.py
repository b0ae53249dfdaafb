"""Images, drawn or of a user's files. Imports no sibling folder; ``images`` and ``shapes`` never import torch."""
