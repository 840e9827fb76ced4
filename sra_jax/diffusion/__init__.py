"""Noise: processes (flow, DDPM), their samplers, guidance. Pure functions that know nothing of networks."""
