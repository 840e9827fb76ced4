"""What the benchmark measures: our side and the peers, and the tables made of both. Nothing else imports this room."""
