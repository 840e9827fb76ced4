"""The train step, the loop around it, evaluation on the way."""
