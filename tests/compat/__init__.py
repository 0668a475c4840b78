"""Third-party models under the contracts: exact, whole, fresh, oracle. One file per source."""
