"""Looking inside: tokens after any block at any noise, linear probe, principal components, figures."""
