"""A regular package: torch-fidelity installs one of the same name, which would go before a folder without this file."""
