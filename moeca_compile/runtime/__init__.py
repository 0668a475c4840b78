"""What happens between two calls: which step this is, what to run, which rows exist, what ran."""
