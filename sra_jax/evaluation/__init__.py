"""Metrics of images and features: FID, sFID, inception score, precision and recall, KID; references and extractors."""
