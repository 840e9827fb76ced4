"""What a recipe needs on a machine that is not there: compiled programs read, reports, search for settings."""
