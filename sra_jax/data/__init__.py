"""Examples: where they come from (sources), how they are stored (shards) and read in order (the grain pipeline)."""
