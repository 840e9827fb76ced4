"""Networks: the transformer and its operations, autoencoder, Inception, classifier. They know nothing of noise."""
