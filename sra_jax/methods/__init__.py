"""The paper's equations: what is aligned to what, distances, heads. Knows neither data nor devices."""
